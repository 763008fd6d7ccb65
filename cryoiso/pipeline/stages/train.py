"""The stage and the command that train generators."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from cryoiso.core import products
from cryoiso.core.config import AuxiliarySection
from cryoiso.core.errors import InputError
from cryoiso.core.protocols import RefineRequest
from cryoiso.core.types import HALVES, DensityMap, Particles
from cryoiso.io.atomic import write_json, write_text
from cryoiso.io.sources import as_recorded
from cryoiso.methods.auxiliary.condition import fit_scale
from cryoiso.methods.auxiliary.generator import Generator
from cryoiso.methods.auxiliary.noise import on_grid, residual_spectra
from cryoiso.methods.auxiliary.settings import Training, network, training
from cryoiso.methods.auxiliary.training import GeneratorTraining, curves, train_generators
from cryoiso.parallel.abort import on_root
from cryoiso.parallel.context import Context
from cryoiso.physics.filters import lowpass
from cryoiso.pipeline.context import RunContext
from cryoiso.pipeline.job_inputs import Inputs
from cryoiso.pipeline.stages.confirmation import homologue_found
from cryoiso.pipeline.stages.rounds import (
    UNCONFIRMED,
    is_settled,
    noise_after,
    nothing_confirmed,
    poses_after,
    references_after,
    skip,
)

logger = logging.getLogger("cryoiso")


def train_stage(round_: int, run: RunContext, inputs: Inputs, *, resume: bool) -> None:
    """A generator for each half-set, or one for both, on the poses that the round before left; none where the raw
    particles confirm nothing of the homologue."""
    name, section = f"train-{round_}", run.job.auxiliary
    if is_settled(run, round_):
        return skip(run, name)
    source = inputs.source()
    particles = poses_after(run, inputs, round_ - 1)
    source.particles = particles
    references = references_after(run, round_ - 1)
    _require_evidence(run, inputs, source, round_)
    evidence = homologue_found(run, inputs, round_)
    if nothing_confirmed(evidence):
        return skip(run, name, UNCONFIRMED, round=round_, **evidence)
    facts = {"round": round_, "inverted": bool(source.index["inverted"])}
    train_into(
        run.folder.stage(name), source, particles, references, section, run.comm, run.job.run.seed, facts,
        resume=resume, note=lambda label, step: run.note_checkpoint(name, generator=label, step=step),
        # where auxiliary particles shared the raw ones' groups, the noise of the co-refinement is not that of the raw
        noise=noise_after(run, inputs, round_ - 1 if section.noise_group == "own" else 0),
    )  # fmt: skip
    if evidence is not None:  # for the co-refinement, which need not ask again
        on_root(run.comm, _add_facts, run.folder.stage(name) / products.facts("train"), dict(evidence))


def _add_facts(path: Path, more: dict[str, Any]) -> None:
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **more})


def _require_evidence(run: RunContext, inputs: Inputs, source: Any, round_: int) -> None:
    """Stops where the raw images do not know the references; the native engine asks in every refinement itself."""
    from cryoiso.methods.auxiliary.reference_check import require_evidence

    job = run.job
    if run.control is not None:  # it is about images that do not
        return
    if job.refine.engine == "native" and (round_ > 1 or job.auxiliary.poses == "refine"):
        return
    references = references_after(run, round_ - 1, with_micelle=False)
    request = RefineRequest(
        source=source, reference=references[1], half_references=references if round_ > 1 else None,
        symmetry=job.sample.symmetry, folder=run.folder.stage(f"train-{round_}"),
        settings=job.refine.model_copy(update={"local_deg": None}), seed=job.run.seed,
        diameter_A=on_root(run.comm, inputs.diameter_A), lowpass_A=job.reference.lowpass_A,
    )  # fmt: skip
    match = require_evidence(request, run.comm)
    if run.comm.rank == 0:
        logger.info("%d raw images match the reference beyond chance", match.images)


def train_into(
    folder: Path,
    source: Any,
    particles: Particles,
    references: dict[int, DensityMap],
    section: AuxiliarySection,
    comm: Context,
    seed: int,
    facts: dict[str, Any],
    *,
    resume: bool = False,
    note: Any = None,
    noise: np.ndarray | None = None,
) -> None:
    """Trains into a folder: generator1.npz and generator2.npz (or generator.npz), train.json, timing.json
    (collective).

    Args:
        references: half -> map on the images' grid.
        facts: kept with each generator: round, inverted.
        noise: (G, S) noise spectra that a refinement of the same images estimated, for ``coloured-noise``; None: they
            are measured, against the reference at the particles' poses.
    """
    # a generator learns images with the microscope's noise, whatever was done to those that it learns from
    source, particles = as_recorded(source, particles)
    settings = training(section, comm.device())
    recipe = settings.facts() if section.has_network else {"preset": section.generators}
    trainings = _trainings(folder, particles, references, section, {**facts, "seed": seed, **recipe})
    if not section.has_network:
        coloured = section.generators == "coloured-noise"
        return _without_network(folder, trainings, source, particles, comm, facts, coloured, noise)
    for half_training in trainings:
        on_root(comm, half_training.folder.mkdir, parents=True, exist_ok=True)
    if comm.rank == 0:
        config = network(settings, source.box_px)
        logger.info(
            "training %s: %d latent layers, width %d, %d steps of %d images",
            "a generator of each half-set" if len(trainings) == 2 else "one generator",
            config.latent_layers, config.width, settings.steps, settings.batch,
        )  # fmt: skip
    outcomes = train_generators(
        trainings, source, particles, settings, comm, seed=seed, resume=resume, on_checkpoint=note
    )  # fmt: skip
    halves = {label: curves(outcome) for label, outcome in outcomes.items()}
    shown = {**settings.facts(), **_shape(settings, source.box_px)}
    on_root(comm, _finish, folder, trainings, halves, shown, facts)


def _without_network(
    folder: Path,
    trainings: list[GeneratorTraining],
    source: Any,
    particles: Particles,
    comm: Context,
    facts: dict[str, Any],
    coloured: bool,
    noise: np.ndarray | None,
) -> None:
    """The baselines: projections on the images' grey scale with white noise of their background's variance, or with
    noise of their spectrum."""
    facts_written: dict[str, Any] = {"round": facts.get("round"), "halves": {}, "settings": {}}
    if coloured:
        facts_written["noise"] = {"from": "images" if noise is None else "refinement", "spectra": {}}
    for half_training in trainings:
        rows, reference, seed = half_training.rows, half_training.reference, half_training.facts["seed"]
        scale, spectra = fit_scale(source, particles, rows, reference, comm, seed), None
        if coloured:
            measured = noise
            if measured is None:
                measured = residual_spectra(source, particles, rows, reference, scale, comm, seed)
            spectra = on_grid(measured, particles, reference.pixel_size_A)
            facts_written["noise"]["spectra"][half_training.label] = np.round(spectra, 6).tolist()
        generator = Generator(None, reference, scale, 1.0, half_training.facts, spectra)
        on_root(comm, generator.save, half_training.file)
    on_root(comm, write_json, folder / products.facts("train"), facts_written)


def _shape(settings: Training, box_px: int) -> dict[str, Any]:
    config = network(settings, box_px)
    return {"levels": list(config.levels), "width": config.width, "latent_channels": config.latent_channels}


def _trainings(
    folder: Path,
    particles: Particles,
    references: dict[int, DensityMap],
    section: AuxiliarySection,
    facts: dict[str, Any],
) -> list[GeneratorTraining]:
    half = particles.half if particles.half is not None else np.zeros(len(particles), np.int8)
    if section.generators == "shared":
        filtered_map = _filtered(references[1], section.condition_lowpass_A)
        facts = {**facts, "half": 0}
        return [
            GeneratorTraining(
                "both", np.arange(len(half)), filtered_map, folder / "both", folder / products.SHARED_GENERATOR, facts
            )
        ]
    trainings = []
    for h in HALVES:
        rows = np.flatnonzero(half == h)
        if len(rows) == 0:
            raise InputError(
                f"half-set {h} is empty",
                hint="Both half-sets need particles: check rlnRandomSubset.",
                code="half-set-empty",
            )
        reference = _filtered(references[h], section.condition_lowpass_A)
        file = folder / products.generator(h)
        trainings.append(GeneratorTraining(str(h), rows, reference, folder / f"half{h}", file, {**facts, "half": h}))
    return trainings


def _filtered(reference: DensityMap, lowpass_A: float) -> DensityMap:
    if not lowpass_A or lowpass_A <= 2 * reference.pixel_size_A:
        return reference
    data = lowpass(reference.data, reference.pixel_size_A, lowpass_A)
    return DensityMap(np.asarray(data, np.float32), reference.pixel_size_A)


def _finish(
    folder: Path,
    trainings: list[GeneratorTraining],
    halves: dict[str, Any],
    settings: dict[str, Any],
    facts: dict[str, Any],
) -> None:
    """Curves and speeds; the checkpoints have done their duty."""
    times: dict[str, Any] = {}
    for half_training in trainings:
        timing = half_training.folder / products.TIMING
        if timing.exists():
            timing_record = json.loads(timing.read_text(encoding="utf-8"))
            steps = [n["images_per_s"] for n in timing_record["notes"]]
            times[half_training.label] = {
                "seconds": timing_record["seconds"],
                "images_per_s": float(np.median(steps)) if steps else None,
                **{key: timing_record.get(key) for key in ("gflop_per_image", "tflops", "share_of_products")},
            }
        shutil.rmtree(half_training.folder)
    write_text(folder / products.TIMING, json.dumps(times, indent=1) + "\n")
    write_json(folder / products.facts("train"), {"round": facts.get("round"), "halves": halves, "settings": settings})
