"""The stage ``classify``: classes of the refined particles, and which of them the run goes on with."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np

from cryoiso.core import products
from cryoiso.core.errors import InputError
from cryoiso.core.protocols import RefineRequest
from cryoiso.core.types import HALVES, Particles
from cryoiso.io import read_particle_file
from cryoiso.io.atomic import write_json
from cryoiso.io.mrc import read_map
from cryoiso.io.star.write import write_particles
from cryoiso.parallel.abort import on_root
from cryoiso.pipeline.context import RunContext
from cryoiso.pipeline.inputs.particle_tables import bare
from cryoiso.pipeline.job_inputs import Inputs
from cryoiso.pipeline.stages import engines

logger = logging.getLogger("cryoiso")
LEAST_PARTICLES = 2
"""of each half-set, that the selected classes must have"""


def classify(run: RunContext, inputs: Inputs, *, resume: bool) -> None:
    """Sorts the particles into classes at the poses of the stage ``refine``, and selects some."""
    request = engines.class_request(_request(run, inputs, resume), run.job.classify, ())
    on_root(run.comm, engines.check_classes, request)
    engines.classify(request, run.comm)
    on_root(run.comm, _select, run)


def _request(run: RunContext, inputs: Inputs, resume: bool) -> RefineRequest:
    """What the classification asks of the engine. Collective."""
    job, comm, sample = run.job, run.comm, inputs.sample()
    source = inputs.source()
    source.particles = on_root(comm, _posed, run, inputs)
    if comm.rank == 0:  # every column of the source goes on
        posed = inputs.particles().with_poses(*source.particles.require_poses())
        source.particles = replace(
            posed, signal_scale=source.particles.signal_scale, noise_level=source.particles.noise_level
        )
    return RefineRequest(
        source=source,
        reference=on_root(comm, read_map, run.folder.stage("reference") / products.REFERENCE, sample.pixel_size_A),
        symmetry=job.sample.symmetry,
        folder=run.folder.stage("classify"),
        settings=job.refine.model_copy(update={"solvent_mask": False}),
        seed=job.run.seed,
        diameter_A=sample.diameter_A,
        mask=sample.mask,
        resume=resume,
        lowpass_A=job.classify.lowpass_A,
        local_deg=job.classify.local_deg if job.classify.align == "local" else None,
        on_checkpoint=lambda record: run.note_checkpoint("classify", iteration=record.get("iteration")),
    )


def _posed(run: RunContext, inputs: Inputs) -> Particles:
    path = run.folder.stage("refine") / products.PARTICLES
    posed, particles = read_particle_file(path, run.job.particles.project, ("pose",)), bare(inputs.particles())
    if not np.array_equal(posed.uid, particles.uid):
        raise InputError("the refined particles are not those of this run", file=path, hint="Start a new run.",
                         code="run-particles-differ")  # fmt: skip
    return particles.with_poses(*posed.require_poses(path)).with_intensity(posed.signal_scale, posed.noise_level)


def _select(run: RunContext) -> None:
    """Writes selected.star, and adds to classify.json what was selected."""
    folder, section = run.folder.stage("classify"), run.job.classify
    path = folder / products.facts("classify")
    facts = json.loads(path.read_text(encoding="utf-8"))
    particles = read_particle_file(folder / products.PARTICLES, run.job.particles.project, ("pose",))
    assert particles.table is not None
    number = particles.table["rlnClassNumber"].astype(int).to_numpy()
    chosen = section.selected or (largest_class(facts["classes"]),)
    keep = np.isin(number, chosen)
    _require_enough(particles, keep, chosen, path)
    write_particles(folder / products.SELECTED, particles.take(keep))
    facts["selected"] = {"classes": list(chosen), "particles": int(keep.sum()), "of": len(keep)}
    write_json(path, facts)
    logger.info("the run goes on with class %s: %d of %d particles", ", ".join(map(str, chosen)), keep.sum(), len(keep))


def largest_class(classes: list[dict[str, float]]) -> int:
    """Number of the class with most particles; the first of several.

    Args:
        classes: as in classify.json.
    """
    return int(max(classes, key=lambda class_record: (class_record["particles"], -class_record["number"]))["number"])


def _require_enough(particles: Particles, keep: np.ndarray, chosen: tuple[int, ...], file: Path) -> None:
    half = particles.half if particles.half is not None else np.zeros(len(keep))
    for h in HALVES:
        count = int((keep & (half == h)).sum())
        if count < LEAST_PARTICLES:
            raise InputError(
                f"the selected classes ({', '.join(map(str, chosen))}) have too few particles in half-set {h}",
                file=file, expected=f"{LEAST_PARTICLES} or more", found=count,
                hint="Select other classes (classify.select) in a new run.", code="particles-too-few",
            )  # fmt: skip
