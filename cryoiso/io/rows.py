"""Some rows of a particle file as a file of the same kind, with every column and every value as they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.types import Particles
from cryoiso.io.alignment import is_body_table
from cryoiso.io.atomic import atomic_write
from cryoiso.io.cs import read_cs_field
from cryoiso.io.csfile import read_rows
from cryoiso.io.star.columns import Columns
from cryoiso.io.star.read import particle_block
from cryoiso.io.star.text import StarBlock, read_blocks, write_blocks


def write_rows(source: object, out: object, rows: np.ndarray) -> None:
    """Writes rows of a STAR or .cs file, in their order.

    A STAR file keeps its other tables whole, but for those of a multi-body refinement, which have a row per particle
    too. A .cs file keeps the fields of the file itself, those of passthrough files not among them, and is written in
    NumPy's format.

    Args:
        source: the particle file. out: the file to write, with the same suffix.
        rows: (n,) bool, one per particle of ``source``.

    Raises:
        InputError: ``source`` cannot be read, or has another number of particles.
        DiskFullError: no space.
    """
    if Path(str(source)).suffix.lower() == ".cs":
        array = read_rows(source)
        _require_number(len(array), rows, source)
        with atomic_write(out) as stream:
            np.lib.format.write_array(stream, array[rows], allow_pickle=False)
        return
    blocks = read_blocks(source)
    particles = particle_block(blocks, source)
    _require_number(len(particles), rows, source)
    cut = [b for b in blocks if b is particles or (is_body_table(b.name) and len(b) == len(rows))]
    write_blocks(out, [_taken(b, rows) if any(b is c for c in cut) else b for b in blocks])


def _require_number(count: int, rows: np.ndarray, source: object) -> None:
    if count != len(rows):
        raise InputError("the file has changed while it was read", file=source, expected=f"{len(rows):,} particles",
                         found=f"{count:,}", code="particle-sets-differ")  # fmt: skip


def _taken(block: StarBlock, rows: np.ndarray) -> StarBlock:
    index = np.flatnonzero(rows).tolist()
    return StarBlock(block.name, block.loop, {k: [v[i] for i in index] for k, v in block.columns.items()})


def column_of(path: object, particles: Particles, name: str, passthrough: Sequence[object] = ()) -> np.ndarray:
    """(n,) float64: numbers of a column of a particle file that need not be one which this program knows.

    Args:
        path: STAR or .cs file. particles: as read from it.
        name: the STAR column with or without its underscore, or the field of the .cs file.
        passthrough: further .cs files with fields that ``path`` lacks.

    Raises:
        InputError: no such column, or a value that is no finite number.
    """
    if Path(str(path)).suffix.lower() == ".cs":
        return read_cs_field(path, name, passthrough)
    columns = Columns(particles.table, path)
    if not columns.has(name.removeprefix("_")):
        names = ", ".join(str(c) for c in columns.frame.columns)
        wanted = f"_{name.removeprefix('_')}"
        raise InputError("no such column", file=path, expected=wanted, found=names, code="star-column-missing")
    return columns.number(name.removeprefix("_"), ranged=False)
