"""The stages of the workflows ``auxiliary`` and ``both``: rounds of training, generation and co-refinement, then a
local refinement; in ``both`` references are also corrected between the iterations of every co-refinement.

In every round r: ``train-r`` trains a generator for each half-set on its own particles, conditioned on projections of
that half's reference; ``generate-r`` makes auxiliary particles with even views; ``corefine-r`` refines raw and
auxiliary particles together, forgets the auxiliaries and reconstructs the raw ones, half by half: the next round's
references. Nothing but numbers (FSC curves, grey scales of common groups) crosses from one half to the other.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import Any

import numpy as np

from cryoiso.core import products
from cryoiso.core.config import Job
from cryoiso.core.records import IterationRecord
from cryoiso.core.types import HALVES, Particles
from cryoiso.io.atomic import write_json
from cryoiso.io.mrc import write_map
from cryoiso.io.shards import ShardSource
from cryoiso.io.sources import SubsetSource
from cryoiso.io.star.write import write_particles
from cryoiso.parallel.abort import on_root
from cryoiso.pipeline.context import RunContext
from cryoiso.pipeline.inputs.particle_tables import bare
from cryoiso.pipeline.job_inputs import Inputs, Sample
from cryoiso.pipeline.stages import engines
from cryoiso.pipeline.stages.generate import planned_particles
from cryoiso.pipeline.stages.post_command import post_process
from cryoiso.pipeline.stages.requests import request_for, round_request
from cryoiso.pipeline.stages.rounds import (
    engine_folder,
    found_before,
    is_settled,
    known_grey_scale,
    last_round,
    nothing_confirmed,
    poses_after,
    references_after,
    skip,
)
from cryoiso.pipeline.workflow import kind_of, starts_a_program

logger = logging.getLogger("cryoiso")


def micelle(run: RunContext, inputs: Inputs, *, resume: bool) -> None:
    """The density around the protein (detergent, nanodisc), solved for with the protein held fixed."""
    from cryoiso.methods.micelle.protein import protein_mask
    from cryoiso.methods.micelle.recover import MicelleSettings
    from cryoiso.pipeline.stages.micelle import write_micelle

    comm, section = run.comm, run.job.micelle
    source = inputs.source()
    source.particles = poses_after(run, inputs, 0)
    homologue = references_after(run, 0, with_micelle=False)[1]
    mask = on_root(comm, lambda: protein_mask(homologue, section.threshold, run.job.reference.file))
    settings = MicelleSettings(symmetry=run.job.sample.symmetry, lowpass_A=section.lowpass_A)
    write_micelle(source, source.particles, homologue, mask, settings, run.folder.stage("micelle"), comm, resume=resume)


def corefine(round_: int, run: RunContext, inputs: Inputs, *, resume: bool) -> None:
    """Raw and auxiliary particles together; raw ones alone are kept and reconstructed."""
    from cryoiso.methods.auxiliary.corefine import co_refine, refine_raw

    name, comm, job = f"corefine-{round_}", run.comm, run.job
    if is_settled(run, round_):
        return skip(run, name)
    sample, exported = inputs.sample(), starts_a_program(job)
    source = inputs.source(once=exported)
    before = poses_after(run, inputs, round_ - 1)
    request = round_request(run, sample, source, round_, name, engine_folder(run, name), resume=resume)
    engine, section = engines.engine(job.refine.engine), job.auxiliary
    evidence = found_before(run, round_)
    if nothing_confirmed(evidence):
        refined = refine_raw(engine, request, comm, evidence)
        known = refined.auxiliary
    else:
        auxiliary = ShardSource(run.folder.stage(f"generate-{round_}"))
        if inputs.scratch is not None:
            inputs.scratch.attach(auxiliary, once=exported)
        known = on_root(comm, planned_particles, inputs, before, round_)
        auxiliary.particles = known
        refined = co_refine(
            engine,
            request,
            auxiliary,
            comm,
            pooled=section.noise_group == "raw",
            weight=section.weight,
            evidence=evidence,
        )
    facts = _facts(job, round_, before, refined, known)
    _finish_round(run, inputs, sample, name, source, refined.raw, facts)
    if section.post_command:
        on_root(comm, _post_process, run, round_)


def _post_process(run: RunContext, round_: int) -> None:
    """The user's command on the reference of each half, so that the halves stay apart."""
    folder = run.folder.stage(f"corefine-{round_}")
    for half in HALVES:
        half_reference, processed = folder / products.half_reference(half), folder / products.post_processed(half)
        post_process(run.job.auxiliary.post_command, half_reference, processed, half, round_)


def _facts(job: Job, round_: int, before: Particles, refined: Any, known: Particles) -> dict[str, Any]:
    """What the report says of a round."""
    from cryoiso.methods.auxiliary.corefine import movement
    from cryoiso.metrics.orientation import view_distribution

    symmetry = job.sample.symmetry
    moved = movement(before, refined.raw, symmetry)
    views = {}
    for label, particles in (("before", before), ("after", refined.raw)):
        spread = view_distribution(particles.require_poses()[0], symmetry)
        views["cells_per_ring"] = spread.grid.cells.tolist()
        views[label] = {**spread.summary(), "counts": spread.counts.tolist()}
    return {
        "round": round_,
        "raw": len(refined.raw),
        "auxiliary": len(refined.auxiliary),
        "moved": moved,
        "resolution_A": refined.result.resolution_A,
        **_weight_facts(refined.first, refined.last, len(known)),
        "auxiliary_error_deg": (
            None if refined.auxiliary is known else movement(known, refined.auxiliary, symmetry)["median_deg"]
        ),
        "views": views,
        "settled": bool(moved["upper_quartile_deg"] < job.auxiliary.settle_deg),
    }


def _weight_facts(first: IterationRecord, last: IterationRecord, auxiliaries: int) -> dict[str, Any]:
    """What the auxiliary particles weighed at the end, and why; None where the engine does not say."""
    facts: dict[str, Any] = {"auxiliary_weight_share": last.get("auxiliary_weight_share") if auxiliaries else 0.0}
    if "homologue" in first:
        facts["homologue"] = first["homologue"]
        facts |= {name: last[name] for name in ("auxiliary_factor", "homologue_precision") if name in last}
    return facts


def _finish_round(
    run: RunContext,
    inputs: Inputs,
    sample: Sample,
    name: str,
    source: Any,
    raw: Particles,
    facts: dict[str, Any],
    posed: Particles | None = None,
) -> None:
    """Maps of the raw particles alone, the next references among them, and the poses. Collective.

    Args:
        raw: of which the maps are made.
        posed: all raw particles, where those are a subset.
    """
    comm, folder, job = run.comm, run.folder.stage(name), run.job
    prior, precision = references_after(run, 0), facts.get("homologue_precision")
    plain, damped, curve = engines.reference_reconstructor()(
        source, raw, comm, symmetry=job.sample.symmetry, padding=job.reconstruct.padding, device=comm.device(),
        diameter_A=sample.diameter_A, prior=prior, pixel_size_A=prior[1].pixel_size_A,
        precision=None if precision is None else np.array(precision),
    )  # fmt: skip

    def write() -> None:
        for half in HALVES:
            write_map(folder / products.half_map(half), plain[half].data, plain[half].pixel_size_A)
            write_map(folder / products.half_reference(half), damped[half].data, damped[half].pixel_size_A)
        mean = (damped[1].data.astype(np.float64) + damped[2].data) / 2
        write_map(folder / products.RAW_MAP, mean.astype(np.float32), damped[1].pixel_size_A)
        write_particles(folder / products.PARTICLES, _with_source_columns(inputs, raw if posed is None else posed))
        write_json(folder / products.facts(kind_of(name)), {**facts, "fsc": np.round(curve, 6).tolist()})
        if "moved" in facts:
            logger.info(
                "%s: raw particles moved by %.2f° (median), %.1f %% of them by more than 20°",
                name, facts["moved"]["median_deg"], 100 * facts["moved"]["over_20"],
            )  # fmt: skip

    on_root(comm, write)


def _with_source_columns(inputs: Inputs, posed: Particles) -> Particles:
    """The source's particles, every column, with these poses and results."""
    all_particles = inputs.particles().with_poses(*posed.require_poses())
    return replace(all_particles, results={**all_particles.results, **posed.results})


def local(run: RunContext, inputs: Inputs, *, resume: bool) -> None:
    """Local refinement of a subset with balanced views, from the corrected poses; the others keep theirs."""
    from cryoiso.methods.auxiliary.balance import balanced_subset
    from cryoiso.methods.auxiliary.corefine import movement
    from cryoiso.methods.auxiliary.reference_check import require_evidence

    comm, job, sample = run.comm, run.job, inputs.sample()
    rounds = on_root(comm, last_round, run)
    posed = poses_after(run, inputs, rounds)
    section = job.auxiliary
    balanced = balanced_subset(posed, job.sample.symmetry, section.balance_cap, job.run.seed, keep=section.balance_keep)
    source = inputs.source(once=starts_a_program(job))
    source.particles = posed
    subset = SubsetSource(source, balanced.keep)
    request = request_for(
        run, sample, engine_folder(run, "local"), subset, references_after(run, rounds),
        lowpass_A=_start_resolution(run, inputs, rounds), local_deg=job.auxiliary.local_deg, judged=True, resume=resume,
        grey_scale=known_grey_scale(run, rounds),
        on_checkpoint=lambda record: run.note_checkpoint("local", iteration=record.get("iteration")),
    )  # fmt: skip
    if run.control is None:
        require_evidence(replace(request, source=source), comm)
    result = engines.engine(job.refine.engine).refine(request, comm)
    refined = _merged(posed, result.particles, balanced.keep)
    moved = movement(posed.take(balanced.keep), refined.take(balanced.keep), job.sample.symmetry)
    facts = {**balanced.facts(posed), "resolution_A": result.resolution_A, "moved": moved}
    facts |= on_root(comm, _confirmed_in, run, rounds)
    kept = SubsetSource(source, balanced.keep)
    _finish_round(run, inputs, sample, "local", kept, refined.take(balanced.keep), facts, refined)


def _confirmed_in(run: RunContext, round_: int) -> dict[str, Any]:
    """What a round found of the homologue; empty where it was not asked (reads a file)."""
    facts = json.loads((run.folder.stage(f"corefine-{round_}") / products.facts("corefine")).read_text())
    return {name: facts[name] for name in ("homologue", "homologue_precision") if name in facts}


def _start_resolution(run: RunContext, inputs: Inputs, rounds: int) -> float:
    """Where the half-maps of the last round agree (FSC 0.143)."""
    from cryoiso.metrics.fsc_curve import resolution_at

    def read() -> float:
        name = f"corefine-{rounds}"
        curve = json.loads((run.folder.stage(name) / products.facts("corefine")).read_text())["fsc"]
        return resolution_at(np.array(curve), 0.143, *inputs.grid())

    return float(on_root(run.comm, read))


def _merged(posed: Particles, refined: Particles, keep: np.ndarray) -> Particles:
    """All particles, the kept ones with their refined poses, and a column that says which those are."""
    rotation, shift_A = (a.copy() for a in posed.require_poses())
    rotation[keep], shift_A[keep] = refined.require_poses()
    merged = bare(posed).with_poses(rotation, shift_A).with_results(cryoisoBalanced=keep.astype(np.int64))
    return merged.with_intensity(*(
        _with_kept(getattr(posed, name), getattr(refined, name), keep) for name in ("signal_scale", "noise_level")
    ))  # fmt: skip


def _with_kept(before: np.ndarray | None, refined: np.ndarray | None, keep: np.ndarray) -> np.ndarray | None:
    """Intensities of all particles, those of the kept ones as refined; None where neither has any."""
    if before is None and refined is None:
        return None
    values = np.ones(len(keep)) if before is None else before.copy()
    values[keep] = 1.0 if refined is None else refined
    return values
