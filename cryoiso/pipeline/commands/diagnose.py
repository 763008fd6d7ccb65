"""The command ``diagnose`` on plain files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from cryoiso.core import products
from cryoiso.core.config import DiagnoseSection
from cryoiso.core.records import DiagnoseRecord
from cryoiso.core.types import Particles
from cryoiso.io import read_particle_file
from cryoiso.io.mrc import read_map
from cryoiso.pipeline.inputs.grids import read_mask, require_grid
from cryoiso.pipeline.inputs.map_pairs import read_half_maps
from cryoiso.pipeline.inputs.placed_model import read_model_map
from cryoiso.pipeline.inputs.standard_frame import warn_of_symmetry
from cryoiso.pipeline.stages.half_maps import make_mask
from cryoiso.pipeline.stages.map_numbers import add_model, check_models, mean_of, measure_locally, note_flags


def diagnose_files(
    half1: Path, half2: Path, mask: Path | None, particles: Path | None, symmetry: str,
    truth_particles: Path | None, truth_map: Path | None, *, pixel_size_A: float | None = None, seed: int = 1,
    section: DiagnoseSection | None = None, model_map: Path | None = None, local_resolution: Path | None = None,
    table: Path | None = None,
) -> DiagnoseRecord:  # fmt: skip
    """The numbers of ``methods.assess.measure`` from files, and what ``section`` asks for beside them.

    Args:
        model_map: the map that the model belongs to; None: the mean of the half-maps.
        local_resolution: where that map is written; None: it is not measured.
        table: where the Q-scores by residue are written.

    Raises:
        InputError: unreadable files, or maps on different grids.
    """
    from cryoiso.methods.assess.measure import diagnose
    from cryoiso.physics.symmetry import point_group

    point_group(symmetry)
    half_map1, half_map2, _ = read_half_maps(half1, half2, pixel_size_A)
    check_models(section or DiagnoseSection(), (half_map1.box_px, half_map1.pixel_size_A))
    truth = read_map(truth_map, pixel_size_A) if truth_map else None
    if truth is not None:
        require_grid(truth, half_map1.box_px, half_map1.pixel_size_A, truth_map, "the half-maps")
    full = replace(half_map1, data=(half_map1.data + half_map2.data) / 2)
    inside = read_mask(mask, half_map1.box_px, half_map1.pixel_size_A).data if mask else make_mask(full)
    doubt = warn_of_symmetry(full, symmetry, f"the mean of {half1.name} and {half2.name}")
    record = diagnose(
        half_map1.data, half_map2.data, inside, half_map1.pixel_size_A,
        _posed(particles, symmetry),
        symmetry,
        truth_particles=_posed(truth_particles, symmetry),
        truth_map=None if truth is None else truth.data,
        seed=seed,
    )  # fmt: skip
    record["notes"] += [doubt] if doubt else []
    section = section or DiagnoseSection()
    note_flags(record, None)
    if local_resolution is not None:
        measure_locally(record, half_map1, half_map2, inside, section, local_resolution)
    if section.model:
        density, extent_px = (
            read_model_map(model_map, pixel_size_A) if model_map else (mean_of(half_map1, half_map2), None)
        )
        add_model(record, density, section, symmetry, table or Path(products.Q_TABLE), extent_px)
    return record


def diagnose_model(
    model_map: Path, section: DiagnoseSection, symmetry: str, table: Path, *, pixel_size_A: float | None = None
) -> DiagnoseRecord:
    """A model against a map, of which there are no half-maps.

    Raises:
        InputError: unreadable files, or a model that does not belong to the map.
    """
    density, extent_px = read_model_map(model_map, pixel_size_A)
    record: DiagnoseRecord = {"schema": 1, "box_px": density.box_px, "pixel_size_A": density.pixel_size_A, "notes": []}
    add_model(record, density, section, symmetry, table, extent_px)
    return record


def _posed(file: Path | None, symmetry: str) -> Particles | None:
    return read_particle_file(file, "", ("pose",), symmetry=symmetry) if file else None


def write_volume(
    kind: Literal["fsc3d", "phase-cosine"],
    half1: Path,
    half2: Path,
    mask: Path | None,
    out: Path,
    *,
    pixel_size_A: float | None = None,
) -> None:
    """3DFSC, or spIsoNet's mean phase cosine, of two half-map files as an MRC file (its voxel is that of the maps).

    Raises:
        InputError: unreadable files, or maps on different grids.
    """
    from cryoiso.io.mrc import write_map
    from cryoiso.metrics.anisotropy import phase_cosine
    from cryoiso.metrics.directional_fsc import fsc3d
    from cryoiso.pipeline.inputs.grids import read_mask
    from cryoiso.pipeline.inputs.map_pairs import read_half_maps
    from cryoiso.pipeline.stages.half_maps import make_mask

    half_map1, half_map2, _ = read_half_maps(half1, half2, pixel_size_A)
    full = replace(half_map1, data=(half_map1.data + half_map2.data) / 2)
    inside = read_mask(mask, half_map1.box_px, half_map1.pixel_size_A).data if mask else make_mask(full)
    measure = fsc3d if kind == "fsc3d" else phase_cosine
    write_map(out, measure(half_map1.data, half_map2.data, inside), half_map1.pixel_size_A)
