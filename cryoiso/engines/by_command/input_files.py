"""The files that the user's program reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from cryoiso.core.protocols import RefineRequest
from cryoiso.core.types import HALVES, Particles
from cryoiso.engines.by_command import template as names_of
from cryoiso.engines.by_command.template import Template
from cryoiso.engines.relion.images import relion_particles, relion_source, write_input
from cryoiso.io.cistem import write_cistem, write_par
from cryoiso.io.cs_write import fields_of_particles, write_fields
from cryoiso.io.mrc import write_map, write_stack
from cryoiso.io.restore import in_cs_frame
from cryoiso.parallel.partition import chunk_bounds


def write_inputs(
    folder: Path, request: RefineRequest, template: Template, particles: Particles, rows: np.ndarray, names: list[str],
    references: dict[int, np.ndarray], half: int, *, with_poses: bool, unfiltered: dict[int, np.ndarray] | None = None,
) -> None:  # fmt: skip
    """Writes particles, references and mask, and images and cisTEM's tables where the command wants them (rank 0).

    Args:
        particles: all, with the poses to start from. rows: of those that this run is for.
        names: of all images; empty where one stack of these rows is to be written.
        references: half -> map. half: that this run is for; 0: both.
        with_poses: whether poses are among what the program should see.
        unfiltered: half -> the map of the first round as it was given; None: ``references``.
    """
    source, pixel = request.source, request.reference.pixel_size_A
    originals = replace(relion_source(source).particles, rotation=particles.rotation, shift_A=particles.shift_A)
    some = originals.take(rows)
    if template.one_stack:
        stack = folder / names_of.STACK
        _write_stack(stack, request, rows)
        image_names = [f"{i + 1:06d}@{stack}" for i in range(len(rows))]
    else:
        image_names = [names[row] for row in rows.tolist()]
    write_input(folder / names_of.PARTICLES, some, image_names, with_poses=with_poses, box_px=source.box_px)
    seen = relion_particles(some, with_poses=with_poses)
    if "cs" in template.names:
        import pandas as pd

        table = pd.DataFrame({"rlnImageName": image_names})
        groups = tuple(replace(group, box_px=source.box_px) for group in seen.groups)
        theirs = in_cs_frame(replace(seen, table=table, groups=groups), request.symmetry)
        write_fields(folder / names_of.CS, fields_of_particles(theirs))
    if "cistem" in template.names:
        write_cistem(folder / names_of.CISTEM, seen)
    if "par" in template.names:
        write_par(folder / names_of.PAR, seen)
    for number in HALVES:
        write_map(folder / names_of.reference_of(number), references[number], pixel)
    write_map(folder / names_of.REFERENCE, references[half or 1], pixel)
    if "unfiltered" in template.names:
        write_map(folder / names_of.UNFILTERED, (unfiltered or references)[half or 1], pixel)
    if request.mask is not None:
        write_map(folder / names_of.MASK, request.mask.data.clip(0, 1), pixel)


def _write_stack(path: Path, request: RefineRequest, rows: np.ndarray) -> None:
    source = relion_source(request.source)
    with write_stack(path, source.box_px, request.reference.pixel_size_A) as stack:
        for start, stop in chunk_bounds(len(rows), 256):
            stack.append(source.read(rows[start:stop]))
