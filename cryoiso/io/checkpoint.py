"""Checkpoints: named arrays and plain values in one file, written atomically, the previous generation kept.

A digest over everything lies in the file, so that damage anywhere is found before anything is made of it. Trained
networks are kept in the same way, without generations.
"""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.identity import Identity, digest_of, plain, require_same
from cryoiso.core.log import logger
from cryoiso.io.atomic import atomic_write, fsync_dir
from cryoiso.io.regular_file import open_regular

FORMAT = 2
WITHOUT_DIGEST = 1
"""Format of earlier versions; their networks can be read."""
IDENTITY = "identity"
Contents = tuple[dict[str, np.ndarray], dict[str, Any]]


def save(path: Path, arrays: dict[str, np.ndarray], values: dict[str, Any], identity: Identity | None = None) -> None:
    """Writes a checkpoint to ``path`` (.npz); the file that was there becomes ``path`` with .previous before the
    suffix.

    Args:
        identity: what it is made from, see ``core.identity``; for what ``load_same`` reads.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    values = plain(values if identity is None else {**values, IDENTITY: identity})
    meta = {"format": FORMAT, "digest": _digest(arrays, values), **values}
    temporary = path.with_name(f".{path.name}.new")
    with atomic_write(temporary) as stream:
        np.savez(stream, **{"meta": np.frombuffer(json.dumps(meta).encode(), np.uint8), **arrays})  # type: ignore[arg-type]
    if path.exists():
        os.replace(path, previous(path))
    os.replace(temporary, path)
    fsync_dir(path.parent)


def previous(path: Path) -> Path:
    """Name of the generation before ``path``."""
    return path.with_suffix(".previous" + path.suffix)


def remove(path: Path) -> None:
    """Removes both generations."""
    for candidate in (Path(path), previous(Path(path))):
        candidate.unlink(missing_ok=True)


def load(path: Path) -> Contents | None:
    """The newest generation that is whole, or None where there is none; damaged ones are named in the log.

    Raises:
        InputError: another version wrote it.
    """
    damaged = 0
    for candidate in (Path(path), previous(Path(path))):
        if not candidate.exists():
            continue
        try:
            return read(candidate)
        except DamagedError as error:
            damaged += 1
            logger.warning("%s; trying the one before it", error)
    if damaged:
        logger.warning("%s: no checkpoint is whole; beginning anew", path)
    return None


def load_same(path: Path, identity: Identity, what: str) -> Contents | None:
    """As :func:`load`, of a checkpoint that was made from the same.

    Args:
        what: the kind of computation, for the message.

    Raises:
        InputError: it was made from something else, or by another version.
    """
    saved = load(path)
    if saved is not None:
        require_same(saved[1].pop(IDENTITY, None), identity, path, what)
    return saved


class DamagedError(InputError):
    """A file that is not what was written."""

    def __init__(self, problem: str, *, file: object, expected: object = None, found: object = None) -> None:
        super().__init__(problem, code="checkpoint-damaged", file=file, expected=expected, found=found)


def read(path: Path) -> Contents:
    """Arrays and values of one file.

    Raises:
        DamagedError: not a checkpoint, or not as it was written.
        InputError: of a later version.
    """
    arrays, meta = _parsed(path)
    format_number, digest = meta.pop("format", None), meta.pop("digest", "")
    if isinstance(format_number, int) and format_number > FORMAT:
        raise InputError(
            "a later version of the program wrote this file",
            file=path,
            expected=f"format {FORMAT}",
            found=format_number,
            code="version-mismatch",
        )
    if format_number not in (FORMAT, WITHOUT_DIGEST):
        raise DamagedError(
            "this file is damaged or no checkpoint", file=path, expected=f"format {FORMAT}", found=format_number
        )
    if format_number == FORMAT and digest != _digest(arrays, meta):
        raise DamagedError("this file is damaged: its checksum is wrong", file=path)
    return arrays, meta


def read_kind(path: Path, kind: str, problem: str, hint: str) -> Contents:
    """Arrays and values of a trained network: one file, of which there are no generations.

    Args:
        kind: the value ``kind`` that it must have.
        problem, hint: of the error.

    Raises:
        InputError: no such file, damaged, or of another kind.
    """
    if not Path(path).exists():
        raise InputError(f"{problem}: no such file", file=path, hint=hint, code="file-not-found")
    try:
        arrays, values = read(Path(path))
    except DamagedError as error:
        raise InputError(f"{problem}: {error.problem}", file=path, hint=hint, code="network-file-damaged") from None
    if values.get("kind") != kind:
        raise InputError(
            problem,
            file=path,
            expected=kind,
            found=values.get("kind", "a file of another kind"),
            hint=hint,
            code="network-file-damaged",
        )
    return arrays, values


def _parsed(path: Path) -> Contents:
    try:
        with (
            open_regular(path) as stream,
            zipfile.ZipFile(stream) as archive,
        ):  # what this program writes is not compressed: nothing can unpack to more
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("it is compressed")
        with open_regular(path) as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name]) for name in file.files}
        meta = json.loads(arrays.pop("meta").tobytes())
        if not isinstance(meta, dict):
            raise ValueError("its description is no object")
    except InputError as error:
        raise DamagedError(error.problem, file=path, expected=error.expected, found=error.found) from None
    except Exception as error:  # damage in an archive makes errors of a dozen kinds
        reason = f"{type(error).__name__}: {error}"
        raise DamagedError(f"this file is damaged or no checkpoint ({reason[:200]})", file=path) from None
    return arrays, meta


def _digest(arrays: dict[str, np.ndarray], values: dict[str, Any]) -> str:
    parts: list[object] = [json.dumps(values)]
    for name in sorted(arrays):
        parts += [name, np.asarray(arrays[name])]
    return digest_of(*parts)
