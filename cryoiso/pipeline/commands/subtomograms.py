"""``refine`` and ``realign`` of subtomograms: RELION reads them itself, so there are no shards."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from cryoiso.core import products
from cryoiso.core.config import Job
from cryoiso.core.errors import UsageError
from cryoiso.core.protocols import RefineRequest
from cryoiso.core.types import DensityMap
from cryoiso.io.atomic import make_folder, write_text
from cryoiso.io.mrc import write_map
from cryoiso.io.subtomograms import SubtomogramSource
from cryoiso.parallel.abort import on_root
from cryoiso.parallel.context import Context
from cryoiso.pipeline.commands.begin import begin_or_go_on
from cryoiso.pipeline.inputs.grids import read_mask
from cryoiso.pipeline.inputs.half_sets import assign_halves
from cryoiso.pipeline.inputs.reference import Reference, model_choice, prepare_reference
from cryoiso.pipeline.stages import engines

logger = logging.getLogger("cryoiso")


def refine_subtomograms(job: Job, out: Path, comm: Context, *, resume: bool = False) -> None:
    """Refines subtomograms into a folder. Collective.

    Raises:
        UsageError: another engine than RELION was asked for.
        InputError: as ``io.subtomograms.SubtomogramSource``, ``pipeline.inputs.reference.prepare_reference`` and the
            engine.
    """
    comm.device_preference = job.run.device
    comm.install_signal_handlers()
    source = on_root(comm, _open, job)
    group = source.particles.first_group
    reference = on_root(comm, _reference, job, source.box_px, group.pixel_size_A)
    mask = on_root(comm, _mask, job, source.box_px, group.pixel_size_A)
    on_root(comm, begin_or_go_on, out, job, source.particles, reference.map, mask, resume)
    on_root(comm, _write_reference, job, reference, out)
    request = RefineRequest(
        source=source,
        reference=reference.map,
        symmetry=job.sample.symmetry,
        folder=out.absolute(),
        settings=job.refine,
        seed=job.run.seed,
        diameter_A=job.sample.diameter_A or reference.diameter_A,
        mask=mask,
        resume=resume,
        lowpass_A=job.reference.lowpass_A,
        local_deg=job.refine.local_deg,
        correction=engines.correction(job),
        program=job.relion,
    )
    engines.engine(job.refine.engine).refine(request, comm)


def _open(job: Job) -> SubtomogramSource:
    section = job.particles
    if job.refine.engine != "relion":
        raise UsageError(
            f"{section.file} holds subtomograms, which only RELION refines: use --engine relion",
            code="subtomograms-unsupported",
        )
    engines.require_engine(job)
    source = SubtomogramSource(section.file, section.project)
    source.particles = assign_halves(source.particles, job.run.seed, section.file)
    logger.info("%d subtomograms of %d px, as they are for RELION", len(source.particles), source.box_px)
    return source


def _mask(job: Job, box_px: int, pixel_size_A: float) -> DensityMap | None:
    name = job.sample.mask
    return read_mask(Path(name), box_px, pixel_size_A, job.sample.symmetry) if name else None


def _reference(job: Job, box_px: int, pixel_size_A: float) -> Reference:
    section = job.reference
    return prepare_reference(
        Path(section.file), box_px, pixel_size_A, section.lowpass_A,
        map_pixel_size_A=section.pixel_size_A, resample=section.resample, symmetry=job.sample.symmetry,
        fit=Path(section.fit) if section.fit else None, fit_resolution_A=section.fit_resolution_A,
        model=model_choice(section),
    )  # fmt: skip


def _write_reference(job: Job, reference: Reference, out: Path) -> None:
    section, folder = job.reference, out / "reference"
    make_folder(folder)
    write_map(folder / products.REFERENCE, reference.map.data, reference.map.pixel_size_A)
    facts = {"source": reference.source, "lowpass_A": section.lowpass_A, "diameter_A": round(reference.diameter_A, 3)}
    write_text(folder / products.facts("reference"), json.dumps(facts, indent=1) + "\n")
