"""The way back of a conversion: the original rows, with what has changed in the meantime.

Rows of the side table come back bit by bit. Where the file that is converted says something else than the side table
did on its way there, the new value takes the place of the old one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cryoiso.core.types import Particles
from cryoiso.io.alignment import is_body_table
from cryoiso.io.changes import OF_GROUPS, QUANTITIES, changes, quantities_of
from cryoiso.io.conventions import from_cryosparc_frame, to_cryosparc_frame
from cryoiso.io.cs import joined_fields, particles_of_fields
from cryoiso.io.cs_write import FITS, fields_of_particles, structured
from cryoiso.io.side_table import rows_of_uids
from cryoiso.io.star.text import StarBlock

logger = logging.getLogger("cryoiso")
POSE = ("rotation", "shift")


@dataclass(frozen=True)
class Restored:
    """Rows of a side table with changes."""

    changed: dict[str, int]
    """Quantity -> number of rows that have a new value."""
    rows: np.ndarray | None = None
    """Of a .cs file."""
    blocks: list[StarBlock] | None = None
    """Of a STAR file in which nothing changed."""
    particles: Particles | None = None
    """Of a STAR file in which something did."""


def restored_rows(
    old: np.ndarray, before: Particles, new: Particles, to_cs: Callable[[Particles], Particles]
) -> Restored:
    """The rows of a .cs file.

    Args:
        old: (n,) rows of the side table, in the order of ``new``.
        before: the particles of these rows.
        new: the particles as they are now.
        to_cs: takes particles' poses into cryoSPARC's frame.
    """
    changed = changes(quantities_of(before), quantities_of(new))
    columns = {name: old[name].copy() for name in old.dtype.names or ()}
    if changed:
        fresh = fields_of_particles(to_cs(new))
        for name, rows in changed.items():
            for field in QUANTITIES[name].fields:
                _overwrite(columns, field, fresh, rows)
        if "alignments3D/pose" in columns:  # a slot is whole, or cryoSPARC does not take it
            for field in (f for f in fresh.dtype.names or () if f.startswith("alignments3D/")):
                columns.setdefault(field, fresh[field])
        if any(name in changed for name in POSE):
            _forget_fits(columns)
    return Restored({name: int(rows.sum()) for name, rows in changed.items()}, rows=structured(columns))


def rows_of_result(
    particles: Particles, source: str, passthrough: Sequence[object] = (), symmetry: str = "C1"
) -> np.ndarray:
    """Rows of a .cs file of a refinement's result: those of the .cs file that was refined, every field of it, with the
    new poses and half-sets; fresh ones where something else was refined.

    Args:
        particles: with the uids of the source.
        source: what was refined. passthrough: further files of a .cs file.
        symmetry: point group of the poses.
    """
    if not source.lower().endswith(".cs"):
        return fields_of_particles(in_cs_frame(particles, symmetry))
    data = joined_fields(source, (), passthrough)
    old = structured(data)[rows_of_uids(data["uid"], particles.uid, source)]
    before = in_our_frame(particles_of_fields({n: old[n] for n in old.dtype.names or ()}, source, "", ()), symmetry)
    rows = restored_rows(old, before, particles, lambda new: in_cs_frame(new, symmetry)).rows
    return old if rows is None else rows


def in_our_frame(particles: Particles, symmetry: str) -> Particles:
    """Particles with poses in cryoSPARC's frame of a point group, with poses in ours."""
    if particles.rotation is None:
        return particles
    return replace(particles, rotation=from_cryosparc_frame(particles.rotation, symmetry))


def in_cs_frame(particles: Particles, symmetry: str) -> Particles:
    """Inverse of ``in_our_frame``."""
    if particles.rotation is None:
        return particles
    return replace(particles, rotation=to_cryosparc_frame(particles.rotation, symmetry))


def _overwrite(columns: dict[str, np.ndarray], field: str, fresh: np.ndarray, rows: np.ndarray) -> None:
    if field not in (fresh.dtype.names or ()):
        return
    values = fresh[field]
    if field not in columns:
        columns[field] = values
    elif columns[field].dtype.kind in "SU":  # a longer text needs a wider column
        same_kind = values if columns[field].dtype.kind == "S" else np.char.decode(values, "utf-8")
        columns[field] = np.where(rows, same_kind, columns[field])
    else:
        columns[field][rows] = values[rows].astype(columns[field].dtype)


def _forget_fits(columns: dict[str, np.ndarray]) -> None:
    """How particles fitted at their old poses says nothing of new ones."""
    for name, value in FITS.items():
        field = f"alignments3D/{name}"
        if field in columns:
            columns[field] = np.full_like(columns[field], value)


def restored_star(blocks: list[StarBlock], table: StarBlock, rows: np.ndarray, old: Particles, before: Particles,
                  new: Particles) -> Restored:  # fmt: skip
    """The tables of a STAR file.

    Args:
        blocks: of the side table. table: that of particles among them.
        rows: (n,) row of each particle in it.
        old: particles of these rows. before: the same as a .cs file has them.
        new: the particles as they are now.
    """
    new_values = changes(quantities_of(before), quantities_of(new))
    changed = {name: int(where.sum()) for name, where in new_values.items()}
    bodies = [b for b in blocks if is_body_table(b.name) and len(b) == len(table)]
    others = [_taken(b, rows) if any(b is body for body in bodies) else b for b in blocks]
    if not new_values:
        return Restored(changed, blocks=[_taken(b, rows) if b is table else b for b in others])
    merged = _merged(old, new, new_values)
    if merged.table is not None:
        merged.table.attrs["star_block"] = table.name
        kept = [b for b, was in zip(others, blocks, strict=True) if was is not table and b.name != "optics"]
        merged.table.attrs["star_others"] = [(b.name, b.loop, b.columns) for b in kept]
    return Restored(changed, particles=merged)


def _taken(block: StarBlock, rows: np.ndarray) -> StarBlock:
    index = rows.tolist()
    return StarBlock(block.name, block.loop, {k: [v[i] for i in index] for k, v in block.columns.items()})


ATTRIBUTES = {
    "defocus U": "defocus_u_A", "defocus V": "defocus_v_A", "defocus angle": "defocus_angle_deg",
    "phase shift": "phase_shift_deg", "B-factor": "ctf_bfactor_A2", "scale": "ctf_scale", "half-set": "half",
    "rotation": "rotation", "shift": "shift_A",
}  # fmt: skip
COLUMNS = {"image": "rlnImageName", "class": "rlnClassNumber", "sign": "cryoisoSign"}


def _merged(old: Particles, new: Particles, changed: dict[str, np.ndarray]) -> Particles:
    """The old particles with what is new."""
    values: dict[str, Any] = {}
    for name, attribute in ATTRIBUTES.items():
        if name in changed:
            values[attribute] = _where(changed[name], getattr(new, attribute), getattr(old, attribute))
    if "rotation" in changed and "shift" not in changed and old.shift_A is None:
        values["shift_A"] = new.shift_A
    results = dict(old.results)
    for name, column in COLUMNS.items():
        fresh = _column(new, column)
        if name in changed and fresh is not None:
            was = _column(old, column)
            results[column] = fresh if was is None else np.where(changed[name], fresh, was)
    merged = replace(old, results=results, **values)
    return _with_groups(merged, old, new, changed) if any(name in changed for name in OF_GROUPS) else merged


def _where(rows: np.ndarray, fresh: np.ndarray, was: np.ndarray | None) -> np.ndarray:
    if was is None:
        return fresh
    picked: np.ndarray = np.where(rows.reshape(-1, *[1] * (fresh.ndim - 1)), fresh, was)
    return picked


def _column(particles: Particles, name: str) -> np.ndarray | None:
    if name in particles.results:
        return np.asarray(particles.results[name]).astype(str)
    table = particles.table
    return None if table is None or name not in table.columns else np.asarray(table[name].tolist(), dtype=str)


def _with_groups(merged: Particles, old: Particles, new: Particles, changed: Container[str]) -> Particles:
    """Optics groups with the new values: one for each pair of an old and a new one that has particles.

    What only the old ones have (Zernike terms, flags, columns of other programs) stays.
    """
    attributes = [attribute for name, attribute in VALUES.items() if name in changed]
    pairs, optics = np.unique(np.stack([old.optics, new.optics], 1), axis=0, return_inverse=True)
    split = len(np.unique(pairs[:, 0])) < len(pairs)
    groups = []
    for number, (was, now) in enumerate(pairs.tolist(), start=1):
        kept, fresh = old.groups[was], new.groups[now]
        groups.append(replace(
            kept, number=number if split else kept.number, name=f"{kept.name}_{number}" if split else kept.name,
            **{name: _known(getattr(fresh, name), getattr(kept, name)) for name in attributes},
        ))  # fmt: skip
    table = None
    if old.optics_table is not None and len(old.optics_table) == len(old.groups):
        table = old.optics_table.iloc[pairs[:, 0]].reset_index(drop=True)
        if split and "rlnOpticsGroupName" in table:
            table["rlnOpticsGroupName"] = [group.name for group in groups]
    return replace(merged, optics=optics.reshape(-1).astype(np.int32), groups=tuple(groups), optics_table=table)


VALUES = {
    "pixel": "pixel_size_A", "box": "box_px", "voltage": "voltage_kV",
    "spherical aberration": "spherical_aberration_mm", "amplitude contrast": "amplitude_contrast",
    "beam tilt": "beam_tilt_mrad", "magnification": "magnification",
}  # fmt: skip
"""Quantity -> attribute of the optics group."""


def _known(fresh: Any, was: Any) -> Any:
    """The new value unless it is unknown."""
    unknown = fresh == 0 if isinstance(fresh, int) else np.isnan(np.asarray(fresh)).any()
    return was if unknown else fresh
