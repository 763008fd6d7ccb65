"""The command ``convert`` on plain files: cryoSPARC's .cs to RELION's STAR and back, without loss."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cryoiso.core.errors import InputError, UsageError
from cryoiso.core.identity import particle_identity
from cryoiso.core.types import Particles
from cryoiso.io import side_table
from cryoiso.io.cs import joined_fields, particles_of_fields, unmapped_terms
from cryoiso.io.cs_write import classes, fields_of_particles, require_expressible, structured, write_fields
from cryoiso.io.dimensionality import require_images
from cryoiso.io.restore import Restored, in_cs_frame, in_our_frame, restored_rows, restored_star
from cryoiso.io.side_table import Origin, rows_of_uids, side_table_of
from cryoiso.io.star.read import particle_block, particles_of_blocks, read_particles
from cryoiso.io.star.text import StarBlock, read_blocks, write_blocks
from cryoiso.io.star.write import write_particles

logger = logging.getLogger("cryoiso")
NONE = "none"
KINDS = (".star", ".cs")


@dataclass(frozen=True)
class Conversion:
    """How to convert."""

    symmetry: str | None = None
    """Point group of the poses; None: that of the side table, else C1."""
    passthrough: Sequence[str] = ()
    project: str = ""
    carried: str = ""
    """Side table of the source; empty: the one beside it, if there is one; "none": none."""
    unconverted: Literal["refuse", "carry"] = "refuse"
    """What to do with aberrations and flags that the other format has no known place for."""
    csdat: bool = False
    overwrite: bool = False


def convert_files(source: Path, out: Path, how: Conversion) -> dict[str, Any]:
    """Converts a particle file to the kind that the name of ``out`` says, with a side table beside it.

    Returns:
        particles, side_table (what was written), restored_from (a side table, or ""), changed (quantity -> rows with
        another value than the side table), symmetry.

    Raises:
        UsageError: names that do not end in .star or .cs, two STAR files, a file that is there already, another
            symmetry than on the way there.
        InputError: unreadable particles, subtomograms, or something that cannot be converted.
    """
    kinds = (source.suffix.lower(), out.suffix.lower())
    for file, kind in zip((source, out), kinds, strict=True):
        if kind not in KINDS:
            raise InputError(
                "unknown kind of particle file", file=file, expected="a name that ends in .star or .cs",
                code="particle-file-unknown-kind",
            )  # fmt: skip
    if kinds == (".star", ".star"):
        raise UsageError("convert takes a STAR file to a .cs file, or a .cs file to either", code="options-conflict")
    _require_free(source, [out] if kinds == (".cs", ".cs") else [out, side_table_of(out)], how)
    if kinds == (".cs", ".cs"):
        rows = structured(joined_fields(source, (), how.passthrough))
        write_fields(out, rows, csdat=how.csdat)
        return {"particles": len(rows), "side_table": "", "restored_from": "", "changed": {}, "symmetry": ""}
    return _to_star(source, out, how) if kinds[1] == ".star" else _to_cs(source, out, how)


def identity_of_file(file: Path, passthrough: Sequence[str] = ()) -> tuple[str, int]:
    """``core.identity.particle_identity`` of a particle file, and the number of its particles."""
    if file.suffix.lower() == ".cs":
        particles = particles_of_fields(joined_fields(file, (), passthrough), file, "", ())
    else:
        particles = read_particles(file, "", ())
    return particle_identity(particles), len(particles)


def _require_free(source: Path, files: list[Path], how: Conversion) -> None:
    inputs = [source, side_table_of(source), *map(Path, how.passthrough), *([Path(how.carried)] if how.carried else [])]
    for file in files:
        if file.resolve() in [known.resolve() for known in inputs]:
            raise UsageError(f"{file} would overwrite a file that is read", code="file-exists")
        if file.exists() and not how.overwrite:
            raise UsageError(f"{file} already exists; give --overwrite to replace it", code="file-exists")


def _side_table(source: Path, how: Conversion) -> Path | None:
    if how.carried == NONE:
        return None
    if how.carried:
        return Path(how.carried)
    beside = side_table_of(source)
    return beside if beside.exists() else None


def _symmetry(how: Conversion, origin: Origin | None, side: Path | None) -> str:
    """The point group in whose frames the poses are."""
    if origin is None:
        return how.symmetry or "C1"
    if how.symmetry is not None and how.symmetry.upper() != origin.symmetry.upper():
        raise UsageError(
            f"--symmetry {how.symmetry}: on the way there it was {origin.symmetry} (side table {side})",
            code="options-conflict",
        )
    return origin.symmetry


def _to_star(source: Path, out: Path, how: Conversion) -> dict[str, Any]:
    data = joined_fields(source, ("image",), how.passthrough)
    _refuse_unmapped(data, source, how)
    side = _side_table(source, how)
    blocks, origin = side_table.load_blocks(side) if side else (None, None)
    symmetry = _symmetry(how, origin, side)
    new = in_our_frame(particles_of_fields(data, source, how.project, ("image",)), symmetry)
    restored = None if blocks is None else _restored_star(blocks, side, new, symmetry, how)
    side_table.save_rows(side_table_of(out), structured(data), Origin(source.name, symmetry))  # no file without its own
    changed: dict[str, int] = {}
    if restored is None:
        write_particles(out, _with_columns(new, data))
    else:
        changed = _write_restored(out, restored)
    return _facts(new, side_table_of(out), side, changed, symmetry)


def _restored_star(blocks: list[StarBlock], side: Path | None, new: Particles, symmetry: str,
                   how: Conversion) -> Restored:  # fmt: skip
    known = particles_of_blocks(blocks, side, how.project, ())
    rows = rows_of_uids(known.uid, new.uid, side)
    old = known.take(rows)
    seen = fields_of_particles(in_cs_frame(old, symmetry), side)
    fields = {name: seen[name] for name in seen.dtype.names or ()}
    before = in_our_frame(particles_of_fields(fields, side, how.project, ()), symmetry)
    return restored_star(blocks, particle_block(blocks, side), rows, old, before, new)


def _write_restored(out: Path, restored: Restored) -> dict[str, int]:
    if restored.blocks is not None:
        write_blocks(out, restored.blocks)
    elif restored.particles is not None:
        write_particles(out, restored.particles)
    return restored.changed


def _to_cs(source: Path, out: Path, how: Conversion) -> dict[str, Any]:
    require_images(source, how.project)
    blocks = read_blocks(source)
    new = particles_of_blocks(blocks, source, how.project, ())
    if how.unconverted == "refuse":
        require_expressible(new, source)
    side = _side_table(source, how)
    known, origin = side_table.load_rows(side) if side else (None, None)
    symmetry = _symmetry(how, origin, side)
    changed: dict[str, int] = {}
    if known is None:
        rows = fields_of_particles(in_cs_frame(new, symmetry), source)
    else:
        old = known[rows_of_uids(known["uid"], new.uid, side)]
        fields = {name: old[name] for name in old.dtype.names or ()}
        before = in_our_frame(particles_of_fields(fields, side, how.project, ()), symmetry)
        restored = restored_rows(old, before, new, lambda particles: in_cs_frame(particles, symmetry))
        changed = restored.changed
        rows = old if restored.rows is None else restored.rows
    side_table.save_blocks(side_table_of(out), blocks, Origin(source.name, symmetry))
    write_fields(out, rows, csdat=how.csdat)
    return _facts(new, side_table_of(out), side, changed, symmetry)


def _facts(
    particles: Particles, written: Path, side: Path | None, changed: dict[str, int], symmetry: str
) -> dict[str, Any]:
    return {
        "particles": len(particles), "side_table": str(written), "restored_from": str(side or ""), "changed": changed,
        "symmetry": symmetry,
    }  # fmt: skip


def _refuse_unmapped(data: dict[str, np.ndarray], source: Path, how: Conversion) -> None:
    terms = unmapped_terms(data)
    if terms and how.unconverted == "refuse":
        why = "Cs is too small for that term to be a beam tilt" if terms[0] == "ctf/tilt_A" else (
            "its unit and sign in cryoSPARC are not public"
        )  # fmt: skip
        raise InputError(
            f"{terms[0]} cannot be converted: {why}", file=source, expected="zeros", found=f"{data[terms[0]][0]}",
            hint="--unconverted carry converts the rest; this stays in the file's side table, for the way back. "
            "Fit the aberrations again in RELION.", code="not-convertible",
        )  # fmt: skip
    for name in terms:
        logger.warning("%s: %s is not converted; it is only in the side table", source, name)


def _with_columns(particles: Particles, data: dict[str, np.ndarray]) -> Particles:
    """Particles with what RELION needs beside poses and CTF: classes, and micrographs, by which it groups images."""
    results = dict(particles.results)
    number = classes(particles) if particles.rotation is not None else None
    if number is not None:
        results["rlnClassNumber"] = number + 1
    paths = data.get("location/micrograph_path")
    if paths is not None and paths.dtype.kind in "SU":
        names = [p.decode("utf-8", "surrogateescape") if isinstance(p, bytes) else p for p in paths.tolist()]
        if all(names):
            results["rlnMicrographName"] = np.array([name.lstrip(">") for name in names])
    return replace(particles, results=results)
