"""Reading images out of MRC stacks, image by image with plain reads.

Headers and open files are cached, so reading 256 images from many micrograph stacks costs little more than the bytes.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.io.imagenames import distinct
from cryoiso.io.mrc import MrcHeader, read_header
from cryoiso.io.regular_file import open_regular_handle

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

logger = logging.getLogger("cryoiso")

MAX_IMAGE_PX = 16_384
"""Side of the largest image that is read."""


NO_STACK = (
    "Relative paths start from the project folder: give it with --project (particles.project in a job file) if it is "
    "neither the current folder nor above the particle file."
)


class StackReader:
    """Reads images of many stacks with few system calls; keeps at most ``max_open`` of them open."""

    def __init__(self, max_open: int = 64) -> None:
        self._headers: dict[str, MrcHeader] = {}
        self._open: OrderedDict[str, int] = OrderedDict()
        self._max_open = max_open
        self._told = False

    def __enter__(self) -> StackReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for handle in self._open.values():
            os.close(handle)
        self._open.clear()

    def header(self, path: str, file: object = None, row: int | None = None) -> MrcHeader:
        """The stack's header, cached. ``file`` and ``row`` say in an error who asked for the stack.

        Raises:
            InputError: missing or truncated stack, or one that does not hold images.
        """
        if path not in self._headers:
            try:
                self._headers[path] = _header_of_images(path)
            except InputError as error:
                if file is None:
                    raise
                problem = f"image stack {path}: {error.problem}"
                hint = error.hint
                if error.code == "file-not-found":
                    hint = NO_STACK
                raise InputError(
                    problem,
                    file=file,
                    row=row,
                    expected=error.expected,
                    found=error.found,
                    hint=hint,
                    code=error.code,
                ) from None
            if self._headers[path].spare_bytes and not self._told:
                self._told = True
                logger.warning("%s: longer than its header says; the last %d bytes are left out (others may be, too)",
                               path, self._headers[path].spare_bytes)  # fmt: skip
        return self._headers[path]

    def check(self, path: str, index: np.ndarray, file: object = None, rows: np.ndarray | None = None) -> MrcHeader:
        """Header of a stack after making sure that it holds these images (0-based).

        Raises:
            InputError: names file, row, how many images there are and which one was asked for.
        """
        index = np.asarray(index)
        first = None if rows is None or not len(rows) else int(rows[0]) + 1
        header = self.header(path, file, first)
        bad = np.flatnonzero((index < 0) | (index >= header.shape[0]))
        if len(bad):
            row = None if rows is None else int(np.asarray(rows)[bad[0]]) + 1
            raise InputError(
                f"the image is beyond the end of its stack {path}"
                if file is not None
                else "no such image in the stack",
                file=file if file is not None else path,
                row=row,
                expected=f"an image from 1 to {header.shape[0]}",
                found=f"image {int(index[bad[0]]) + 1}",
                code="stack-too-short",
            )
        return header

    def read(
        self,
        path: str,
        index: Shaped[np.ndarray, " n"],
        file: object = None,
        rows: Shaped[np.ndarray, " n"] | None = None,
    ) -> Float[np.ndarray, "n y x"]:
        """Images of one stack: (n, ny, nx) float32 in the order of ``index`` (0-based), y and x as the header says."""
        index = np.asarray(index, np.int64)
        header = self.check(path, index, file, rows)
        handle = self._handle(path)
        raw = np.empty((len(index), header.image_bytes), np.uint8)
        for start, stop in runs(index):
            view = raw[start:stop].data.cast("B")
            _read_fully(handle, view, header.offset + int(index[start]) * header.image_bytes, path)
        images = raw.view(header.dtype).reshape(-1, *header.shape[1:]).astype(np.float32, copy=False)
        return images if header.axes[2] == 0 else np.ascontiguousarray(images.transpose(0, 2, 1))

    def _handle(self, path: str) -> int:
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        if len(self._open) >= self._max_open:
            os.close(self._open.popitem(last=False)[1])
        self._open[path] = open_regular_handle(path)
        return self._open[path]


def _header_of_images(path: str) -> MrcHeader:
    header = read_header(path)
    header.require_right_angles(path, images=True)
    if header.axes[0] != 2 or header.volumes > 1:
        content = f"{header.volumes} volumes" if header.volumes > 1 else f"sections along {'xyz'[header.axes[0]]}"
        raise InputError(
            "not a stack of images",
            file=path,
            expected="images of x and y, one a section",
            found=content,
            code="stack-not-of-images",
        )
    if max(header.shape[1:]) > MAX_IMAGE_PX:
        raise InputError(
            "the images are too large",
            file=path,
            expected=f"at most {MAX_IMAGE_PX} px",
            found=max(header.shape[1:]),
            code="size-above-limit",
        )
    return header


def number_of_file(stacks: Shaped[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """(n,) numbers, equal for names that lead to one file (links included), else different."""
    names, inverse = distinct(stacks)
    first: dict[object, int] = {}
    numbers = np.empty(len(names), np.int64)
    for k, name in enumerate(names.tolist()):
        try:
            facts = os.stat(name)
            key: object = (facts.st_dev, facts.st_ino)
        except (OSError, ValueError):
            key = name
        numbers[k] = first.setdefault(key, k)
    of_rows: np.ndarray = numbers[inverse]
    return of_rows


def runs(index: Shaped[np.ndarray, " n"]) -> list[tuple[int, int]]:
    """Cuts an index array into stretches of consecutive numbers: [(start, stop), ...] positions in ``index``."""
    if not len(index):
        return []
    cuts = np.flatnonzero(np.diff(index) != 1) + 1
    edges = [0, *cuts.tolist(), len(index)]
    return list(pairwise(edges))


def _read_fully(handle: int, view: memoryview, offset: int, path: object) -> None:
    done = 0
    while done < len(view):
        got = os.preadv(handle, [view[done:]], offset + done)
        if got <= 0:
            raise InputError(
                "the file ended while it was read", file=path, hint="Copy it again.", code="file-truncated"
            )
        done += got
