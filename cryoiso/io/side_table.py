"""Side tables of converted particle files: the file that they were converted from, row by row, keyed by uid.

Beside ``particles.star`` lies ``particles.carried.npz`` with the rows of the .cs file; beside ``particles.cs`` lies
``particles.carried.star`` with the tables of the STAR file. What the converted file has no place for is in them, and
comes back from there on the way back.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.io.atomic import atomic_path
from cryoiso.io.star.text import StarBlock, read_blocks, write_blocks

MARK = "cryoiso_carried"


@dataclass(frozen=True)
class Origin:
    """Where a converted file came from."""

    source: str
    """Name of the file."""
    symmetry: str
    """Point group in whose frames the poses were converted."""


def side_table_of(path: Path) -> Path:
    """Where the side table of a converted file lies.

    >>> side_table_of(Path("a/particles.star")).as_posix(), side_table_of(Path("a/particles.cs")).as_posix()
    ('a/particles.carried.npz', 'a/particles.carried.star')
    """
    return path.with_name(f"{path.stem}.carried{'.npz' if path.suffix.lower() == '.star' else '.star'}")


def save_rows(path: Path, rows: np.ndarray, origin: Origin) -> None:
    """The rows of a .cs file, as the side table of a STAR file."""
    with atomic_path(path) as part, open(part, "wb") as stream:
        np.savez(stream, rows=rows, facts=np.array(json.dumps(asdict(origin))))


def load_rows(path: Path) -> tuple[np.ndarray, Origin]:
    """
    Raises:
        InputError: not such a side table.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            rows, facts = archive["rows"], json.loads(str(archive["facts"]))
        if rows.ndim != 1 or "uid" not in (rows.dtype.names or ()):
            raise ValueError("no rows of particles")
        return rows, Origin(str(facts["source"]), str(facts["symmetry"]))
    except FileNotFoundError:
        raise InputError("no such file", file=path, code="file-not-found") from None
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise _not_one(path, error) from None


def save_blocks(path: Path, blocks: list[StarBlock], origin: Origin) -> None:
    """The tables of a STAR file, as the side table of a .cs file."""
    head = StarBlock(MARK, False, {name: [value] for name, value in asdict(origin).items()})
    write_blocks(path, [head, *(b for b in blocks if b.name != MARK)])


def load_blocks(path: Path) -> tuple[list[StarBlock], Origin]:
    """
    Raises:
        InputError: not such a side table.
    """
    blocks = read_blocks(path)
    head = next((b.columns for b in blocks if b.name == MARK and not b.loop), None)
    if head is None or not {"source", "symmetry"} <= head.keys():
        raise _not_one(path, f"no table data_{MARK}")
    return [b for b in blocks if b.name != MARK], Origin(head["source"][0], head["symmetry"][0])


def rows_of_uids(known: np.ndarray, wanted: np.ndarray, path: object) -> np.ndarray:
    """(n,) row of every wanted uid among the known ones.

    Raises:
        InputError: a particle that the side table does not have.
    """
    order = np.argsort(known, kind="stable")
    place = np.minimum(np.searchsorted(known[order], wanted), len(known) - 1)
    rows: np.ndarray = order[place]
    bad = np.flatnonzero(known[rows] != wanted)
    if len(bad):
        raise InputError(
            f"it lacks {len(bad):,} of {len(wanted):,} particles, the first of them uid {int(wanted[bad[0]])}",
            file=path, expected="the side table of the same particles",
            hint="Name the right one with --carried, or --carried none to convert without.",
            code="side-table-mismatch",
        )  # fmt: skip
    return rows


def _not_one(path: object, why: object) -> InputError:
    return InputError(
        f"not a side table that 'cryoiso convert' wrote ({why})", file=path,
        hint="Name another one with --carried, or --carried none to convert without.", code="side-table-mismatch",
    )  # fmt: skip
