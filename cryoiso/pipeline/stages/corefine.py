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
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cryoiso.core.config import Job
from cryoiso.core.protocols import RefineRequest
from cryoiso.core.types import HALVES, DensityMap, Particles
from cryoiso.io.atomic import write_json
from cryoiso.io.mrc import write_map
from cryoiso.io.shards import ShardSource
from cryoiso.io.sources import SubsetSource
from cryoiso.io.star.write import write_particles
from cryoiso.parallel.abort import on_root
from cryoiso.pipeline.inputs.particle_tables import bare
from cryoiso.pipeline.stages import engines
from cryoiso.pipeline.stages.generate import generate_stage, planned_particles
from cryoiso.pipeline.stages.post_command import post_process
from cryoiso.pipeline.stages.rounds import engine_folder, is_settled, last_round, poses_after, references_after, skip
from cryoiso.pipeline.stages.train import train_stage
from cryoiso.pipeline.work import Work

logger = logging.getLogger("cryoiso")


def stages_between(job: Job) -> list[tuple[str, Callable[[Work], None]]]:
    """(name, what it does) from the first poses to the last ones."""
    found: list[tuple[str, Callable[[Work], None]]] = []
    if job.micelle.enable:
        found.append(("micelle", micelle))
    for r in range(1, job.auxiliary.rounds + 1):
        found.append((f"train-{r}", partial(train_stage, r)))
        found.append((f"generate-{r}", partial(generate_stage, r)))
        found.append((f"corefine-{r}", partial(corefine, r)))
    if job.auxiliary.balance:
        found.append(("local", local))
    return found


def micelle(work: Work) -> None:
    """The density around the protein (detergent, nanodisc), solved for with the protein held fixed."""
    from cryoiso.methods.micelle.protein import protein_mask
    from cryoiso.methods.micelle.recover import MicelleSettings
    from cryoiso.pipeline.stages.micelle import write_micelle

    comm, section = work.comm, work.job.micelle
    source = work.source()
    source.particles = poses_after(work, 0)
    homologue = references_after(work, 0, with_micelle=False)[1]
    mask = on_root(comm, lambda: protein_mask(homologue, section.threshold, work.job.reference.file))
    settings = MicelleSettings(symmetry=work.job.sample.symmetry, lowpass_A=section.lowpass_A)
    write_micelle(
        source, source.particles, homologue, mask, settings, work.folder.stage("micelle"), comm, resume=work.resume
    )


def request_for(work: Work, folder: Path, source: Any, references: dict[int, DensityMap], **options: Any) -> Any:
    """What the engine is asked for in this workflow."""
    job, comm = work.job, work.comm
    same = references[1] is references[2]
    return RefineRequest(
        source=source,
        reference=references[1],
        half_references=None if same else references,
        symmetry=job.sample.symmetry,
        folder=folder,
        settings=job.refine,
        seed=job.run.seed,
        diameter_A=on_root(comm, work.diameter_A),
        mask=on_root(comm, work.mask),
        resume=work.resume,
        program=job.relion,
        **options,
    )


def corefine(round_: int, work: Work) -> None:
    """Raw and auxiliary particles together; raw ones alone are kept and reconstructed."""
    from cryoiso.methods.auxiliary.corefine import co_refine

    name, comm = f"corefine-{round_}", work.comm
    if is_settled(work, round_):
        return skip(work, name)
    exported = work.job.refine.engine == "relion"
    source = work.source(once=exported)
    before = poses_after(work, round_ - 1)
    auxiliary = ShardSource(work.folder.stage(f"generate-{round_}"))
    if work.scratch is not None:
        work.scratch.attach(auxiliary, once=exported)
    known = on_root(comm, planned_particles, work, before, round_)
    auxiliary.particles = known
    references = references_after(work, round_ - 1)
    folder = engine_folder(work, name)
    request = request_for(
        work, folder, source, references, lowpass_A=work.job.reference.lowpass_A,
        correction=engines.correction(work.job),
        on_checkpoint=lambda record: work.note_checkpoint(name, iteration=record.get("iteration")),
    )  # fmt: skip
    section = work.job.auxiliary
    found = co_refine(
        engines.engine(work.job.refine.engine), request, auxiliary, comm,
        pooled=section.noise_group == "raw", weight=section.weight,
    )  # fmt: skip
    facts = _facts(work, round_, before, found, known)
    _finish_round(work, name, source, found.raw, facts)
    if work.job.auxiliary.post_command:
        on_root(comm, _post_process, work, round_)


def _post_process(work: Work, round_: int) -> None:
    """The user's command on the reference of each half, so that the halves stay apart."""
    folder = work.folder.stage(f"corefine-{round_}")
    for half in HALVES:
        given, made = folder / f"reference{half}.mrc", folder / f"post{half}.mrc"
        post_process(work.job.auxiliary.post_command, given, made, half, round_)


def _facts(work: Work, round_: int, before: Particles, found: Any, known: Particles) -> dict[str, Any]:
    """What the report says of a round."""
    from cryoiso.methods.auxiliary.corefine import movement
    from cryoiso.metrics.orientation import view_distribution

    symmetry = work.job.sample.symmetry
    moved = movement(before, found.raw, symmetry)
    views = {}
    for label, particles in (("before", before), ("after", found.raw)):
        spread = view_distribution(particles.require_poses()[0], symmetry)
        views["cells_per_ring"] = spread.grid.cells.tolist()
        views[label] = {**spread.summary(), "counts": spread.counts.tolist()}
    return {
        "round": round_,
        "raw": len(found.raw),
        "auxiliary": len(found.auxiliary),
        "moved": moved,
        "resolution_A": found.result.resolution_A,
        "auxiliary_weight_share": (found.result.iterations or [{}])[-1].get("auxiliary_weight_share"),
        "auxiliary_error_deg": movement(known, found.auxiliary, symmetry)["median_deg"],
        "views": views,
        "settled": bool(moved["upper_quartile_deg"] < work.job.auxiliary.settle_deg),
    }


def _finish_round(
    work: Work, name: str, source: Any, raw: Particles, facts: dict[str, Any], posed: Particles | None = None
) -> None:
    """Maps of the raw particles alone, the next references among them, and the poses. Collective.

    Args:
        raw: of which the maps are made.
        posed: all raw particles, where those are a subset.
    """
    comm, folder, job = work.comm, work.folder.stage(name), work.job
    prior = references_after(work, 0)
    plain, damped, curve = engines.reference_reconstructor()(
        source, raw, comm, symmetry=job.sample.symmetry, padding=job.reconstruct.padding, device=comm.device(),
        diameter_A=on_root(comm, work.diameter_A), prior=prior, pixel_size_A=prior[1].pixel_size_A,
    )  # fmt: skip

    def write() -> None:
        for half in HALVES:
            write_map(folder / f"half{half}.mrc", plain[half].data, plain[half].pixel_size_A)
            write_map(folder / f"reference{half}.mrc", damped[half].data, damped[half].pixel_size_A)
        mean = (damped[1].data.astype(np.float64) + damped[2].data) / 2
        write_map(folder / "raw_map.mrc", mean.astype(np.float32), damped[1].pixel_size_A)
        write_particles(folder / "particles.star", _with_source_columns(work, raw if posed is None else posed))
        write_json(folder / f"{name.split('-')[0]}.json", {**facts, "fsc": np.round(curve, 6).tolist()})
        if "moved" in facts:
            logger.info(
                "%s: raw particles moved by %.2f° (median), %.1f %% of them by more than 20°",
                name, facts["moved"]["median_deg"], 100 * facts["moved"]["over_20"],
            )  # fmt: skip

    on_root(comm, write)


def _with_source_columns(work: Work, posed: Particles) -> Particles:
    """The source's particles, every column, with these poses and results."""
    whole = work.particles().with_poses(*posed.require_poses())
    return replace(whole, results={**whole.results, **posed.results})


def local(work: Work) -> None:
    """Local refinement of a subset with balanced views, from the corrected poses; the others keep theirs."""
    from cryoiso.methods.auxiliary.balance import balanced_subset
    from cryoiso.methods.auxiliary.corefine import movement
    from cryoiso.methods.auxiliary.reference_check import require_evidence

    comm, job = work.comm, work.job
    rounds = on_root(comm, last_round, work)
    posed = poses_after(work, rounds)
    section = job.auxiliary
    balanced = balanced_subset(posed, job.sample.symmetry, section.balance_cap, job.run.seed, keep=section.balance_keep)
    source = work.source(once=job.refine.engine == "relion")
    source.particles = posed
    subset = SubsetSource(source, balanced.keep)
    references = references_after(work, rounds)
    request = request_for(
        work, engine_folder(work, "local"), subset, references, lowpass_A=_start_resolution(work, rounds),
        local_deg=job.auxiliary.local_deg, judged=True,
        on_checkpoint=lambda record: work.note_checkpoint("local", iteration=record.get("iteration")),
    )  # fmt: skip
    require_evidence(replace(request, source=source), comm)
    result = engines.engine(job.refine.engine).refine(request, comm)
    refined = _merged(posed, result.particles, balanced.keep)
    moved = movement(posed.take(balanced.keep), refined.take(balanced.keep), job.sample.symmetry)
    facts = {**balanced.facts(posed), "resolution_A": result.resolution_A, "moved": moved}
    _finish_round(work, "local", SubsetSource(source, balanced.keep), refined.take(balanced.keep), facts, refined)


def _start_resolution(work: Work, rounds: int) -> float:
    """Where the half-maps of the last round agree (FSC 0.143)."""
    from cryoiso.metrics.fsc_curve import resolution_at

    def read() -> float:
        name = f"corefine-{rounds}"
        curve = json.loads((work.folder.stage(name) / "corefine.json").read_text())["fsc"]
        return resolution_at(np.array(curve), 0.143, *work.grid())

    return float(on_root(work.comm, read))


def _merged(posed: Particles, refined: Particles, keep: np.ndarray) -> Particles:
    """All particles, the kept ones with their refined poses, and a column that says which those are."""
    rotation, shift_A = (a.copy() for a in posed.require_poses())
    rotation[keep], shift_A[keep] = refined.require_poses()
    return bare(posed).with_poses(rotation, shift_A).with_results(cryoisoBalanced=keep.astype(np.int64))
