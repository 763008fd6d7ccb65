"""HDF5 shards: particle images written once, with uid, optics and CTF, read in large blocks by any number of processes.

``index.json`` names the files ``shard-NNNNN.h5``. Each holds ``images`` (n, D, D) in float16 or float32,
uncompressed, in HDF5 chunks of about 1 MiB of whole images, and one dataset a metadata column. Poses are not here:
they change, images do not.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cryoiso.core import products
from cryoiso.core.errors import InputError
from cryoiso.core.types import OpticsGroup, Particles
from cryoiso.io.regular_file import read_regular_text, require_regular_file
from cryoiso.io.shardcheck import (
    AGAIN,
    HDF5_ERRORS,
    check_columns,
    check_images,
    check_index,
    first_not_finite,
    open_shard,
    read_columns,
)
from cryoiso.io.stack import runs
from cryoiso.io.staging import ScratchCopies

FORMAT = "cryoiso-shard"
VERSION = 1
CHUNK_IMAGES = 128
"""Images of a chunk, the smallest amount that ranks share out; it never depends on the number of ranks."""

COLUMNS = (
    "uid",
    "optics",
    "index",
    "defocus_u_A",
    "defocus_v_A",
    "defocus_angle_deg",
    "phase_shift_deg",
    "ctf_bfactor_A2",
    "ctf_scale",
    "half",
)


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.h5"


def read_attributes(path: Path) -> dict[str, Any]:
    """Root attributes of a shard, or an empty dict if it cannot be read."""
    try:
        require_regular_file(path)
        with open_shard(path) as file:
            return {k: v.item() if isinstance(v, np.generic) else v for k, v in file.attrs.items()}
    except (*HDF5_ERRORS, InputError):
        return {}


def groups_to_json(groups: tuple[OpticsGroup, ...]) -> list[dict[str, Any]]:
    """Flags that are not set are left out, so that shards of images as they came are those of earlier versions."""
    optional = ("ctf_premultiplied", "phase_flipped")
    return [{k: v for k, v in asdict(g).items() if v or k not in optional} for g in groups]


def groups_from_json(items: list[dict[str, Any]]) -> tuple[OpticsGroup, ...]:
    def group(values: dict[str, Any]) -> OpticsGroup:
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return OpticsGroup(**plain)

    return tuple(group(g) for g in items)


class ShardSource:
    """Images and metadata of a folder of shards (an ``ImageSource``).

    Attributes:
        particles: uid, optics, CTF and half-sets in the order of the source; no poses.
        box_px: image side.
        chunks: [(start, stop), ...] of at most ``CHUNK_IMAGES`` rows, none across two shards.
        index: contents of index.json.
    """

    def __init__(self, folder: object, max_open: int = 32) -> None:
        self.folder = Path(str(folder))
        self.index = read_index(self.folder)
        self.box_px = int(self.index["box_px"])
        self._edges = np.array([s["start"] for s in self.index["shards"]] + [self.index["images"]], np.int64)
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._max_open = max_open
        self._copies = ScratchCopies()
        self.chunks = [
            (start, min(start + CHUNK_IMAGES, s["stop"]))
            for s in self.index["shards"]
            for start in range(s["start"], s["stop"], CHUNK_IMAGES)
        ]
        self.particles = self._read_particles()

    def __len__(self) -> int:
        return int(self.index["images"])

    def __enter__(self) -> ShardSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def shards_of(self, rows: np.ndarray) -> list[int]:
        """Numbers of the shards that these rows are in."""
        numbers: list[int] = np.unique(np.searchsorted(self._edges, rows, side="right") - 1).tolist()
        return numbers

    def use_copies(self, copies: ScratchCopies) -> None:
        """From now on images are read from copies of the shards, where there are any that can be read."""
        self.close()
        self._copies = copies

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Images of these rows in their order: (n, D, D) float32, protein white, normalised.

        Neighbouring rows are read in one go, whatever the order they are asked for.

        Raises:
            InputError: a row that does not exist, a shard that is missing or damaged, or an image with values that are
                no numbers.
        """
        rows = np.asarray(rows)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows.astype(np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise InputError(
                "no such image in the shards",
                file=self.folder,
                found=f"rows {rows.min()} to {rows.max()}",
                code="shards-damaged",
            )
        out = np.empty((len(rows), self.box_px, self.box_px), np.float32)
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        in_order = bool((order[1:] > order[:-1]).all())
        shard = np.searchsorted(self._edges, ordered, side="right") - 1
        for start, stop in runs(ordered + shard):  # adding the shard's number makes a gap between two shards
            number = int(shard[start])
            first = int(ordered[start] - self._edges[number])
            block = self._block(number, slice(first, first + stop - start))
            # a slice takes half of the time of an index array; batches of a half-set are many short runs
            out[slice(start, stop) if in_order else order[start:stop]] = block
        return self._finite(out, rows)

    def _finite(self, images: np.ndarray, rows: np.ndarray) -> np.ndarray:
        bad = first_not_finite(images)
        if bad is not None:
            row = int(rows[bad])
            number = self.shards_of(rows[bad : bad + 1])[0]
            problem = "an image has values that are not numbers"
            raise InputError(problem, file=self._path(number), row=row + 1, hint=AGAIN, code="shards-damaged")
        return images

    def _name(self, number: int) -> str:
        return str(self.index["shards"][number]["file"])

    def _path(self, number: int) -> Path:
        return self.folder / self._name(number)

    def _block(self, number: int, rows: slice) -> np.ndarray:
        """Images of one shard; where its copy fails, those of the original."""
        while True:
            try:
                images: np.ndarray = self._file(number)["images"][rows]
                return images
            except HDF5_ERRORS as error:
                opened = self._open.pop(number, None)
                if opened is not None and opened.filename == str(self._path(number)):
                    raise InputError(
                        f"cannot be read: {error}", file=self._path(number), code="file-unreadable"
                    ) from None
                self._copies.lost(self._name(number), error)
                with suppress(*HDF5_ERRORS):
                    opened.close()

    def _file(self, number: int) -> Any:
        """
        Raises:
            OSError: the shard's copy cannot be opened.
            InputError: the shard itself cannot.
        """
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        if len(self._open) >= self._max_open:
            self._open.popitem(last=False)[1].close()
        path, shard = self._path(number), self.index["shards"][number]
        copy = self._copies.get(self._name(number))
        file: Any = None
        try:
            require_regular_file(copy or path)
            file = open_shard(copy or path)
            check_images(file, path, shard["stop"] - shard["start"], self.index)
        except (*HDF5_ERRORS, InputError) as error:
            with suppress(*HDF5_ERRORS):
                file.close()
            if copy is not None:
                raise OSError(str(error)) from None
            if isinstance(error, InputError):
                raise
            raise InputError(f"cannot open the shard: {error}", file=path, hint=AGAIN, code="shards-damaged") from None
        self._open[number] = file
        return file

    def _read_particles(self) -> Particles:
        parts: dict[str, list[np.ndarray]] = {name: [] for name in (*COLUMNS, "stack")}
        for number, shard in enumerate(self.index["shards"]):
            file, path = self._file(number), self._path(number)
            try:
                if file.attrs.get("plan") != self.index["plan"]:
                    raise InputError("not of this index", file=path, hint=AGAIN, code="shards-damaged")
                of_shard = read_columns(file, path, shard["stop"] - shard["start"], COLUMNS)
            except HDF5_ERRORS as error:
                raise InputError(f"damaged shard: {error}", file=path, hint=AGAIN, code="shards-damaged") from None
            for name, values in of_shard.items():
                parts[name].append(values)
        columns: dict[str, Any] = {name: np.concatenate(values) for name, values in parts.items()}
        check_columns(columns, self.index, self.folder / products.INDEX)
        if (columns["half"] < 0).all():
            columns["half"] = None
        return Particles(groups=groups_from_json(self.index["groups"]), **columns)


def read_index(folder: Path) -> dict[str, Any]:
    """The contents of a folder's index.json.

    Raises:
        InputError: not there, unreadable, not of this version, or it names a file outside of the folder.
    """
    path = folder / products.INDEX
    try:
        index: dict[str, Any] = json.loads(read_regular_text(path))
    except FileNotFoundError:
        raise InputError(
            "no shards in this folder",
            file=folder,
            expected=path.name,
            code="shards-missing",
            hint="Give the folder that 'cryoiso ingest' wrote (and let it finish), or a STAR or .cs file.",
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot be read: {error}", file=path, hint=AGAIN, code="shards-damaged") from None
    ours = isinstance(index, dict) and (index.get("format"), index.get("version")) == (FORMAT, VERSION)
    if not ours:
        raise InputError("no index of this version", file=path, expected=f"{FORMAT} {VERSION}", code="version-mismatch")
    check_index(index, folder, path)
    return index
