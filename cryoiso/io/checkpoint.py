"""Checkpoints: named arrays and plain values in one file, written atomically, the previous generation kept."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.log import logger
from cryoiso.io.atomic import atomic_write, fsync_dir
from cryoiso.io.regular_file import open_regular

FORMAT = 1


def save(path: Path, arrays: dict[str, np.ndarray], values: dict[str, Any]) -> None:
    """Writes a checkpoint to ``path`` (.npz); the file that was there becomes ``path`` with .previous before the
    suffix."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = np.frombuffer(json.dumps({"format": FORMAT, **values}).encode(), np.uint8)
    temporary = path.with_name(f".{path.name}.new")
    with atomic_write(temporary) as stream:
        np.savez(stream, **{"meta": meta, **arrays})  # type: ignore[arg-type]
    if path.exists():
        os.replace(path, previous(path))
    os.replace(temporary, path)
    fsync_dir(path.parent)


def previous(path: Path) -> Path:
    """Name of the generation before ``path``."""
    return path.with_suffix(".previous" + path.suffix)


def load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """The newest generation that can be read whole, or None where there is none."""
    for candidate in (Path(path), previous(Path(path))):
        if not candidate.exists():
            continue
        try:
            with open_regular(candidate) as stream, np.load(stream) as file:
                arrays = {k: file[k] for k in file.files}
            values = json.loads(arrays.pop("meta").tobytes())
        except (InputError, OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            logger.warning("%s: checkpoint cannot be read (%s); trying the one before it", candidate, error)
            continue
        if values.pop("format", None) == FORMAT:
            return arrays, values
    return None
