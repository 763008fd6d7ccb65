"""What each stage of a run does. All ranks call a stage together; rank 0 writes, except for the shards."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cryoiso.core.errors import CryoisoError, InputError, Interrupted
from cryoiso.core.log import ProgressLine
from cryoiso.core.progress import board
from cryoiso.core.protocols import Progress, RefineRequest
from cryoiso.core.types import Particles
from cryoiso.io import ingest as io_ingest
from cryoiso.io import read_particle_file
from cryoiso.io.atomic import write_json
from cryoiso.io.mrc import read_map, write_map
from cryoiso.io.shards import read_index, shard_name
from cryoiso.io.sources import SubsetSource
from cryoiso.io.star.write import write_particles
from cryoiso.parallel import signals
from cryoiso.parallel.abort import agree, on_root
from cryoiso.parallel.context import Context
from cryoiso.parallel.group_stop import on_root_heeding
from cryoiso.pipeline.inputs.particle_tables import bare
from cryoiso.pipeline.records.checksums import write_sums
from cryoiso.pipeline.records.hashing import hash_shared
from cryoiso.pipeline.stages import engines
from cryoiso.pipeline.stages.half_maps import Support, write_reconstruction
from cryoiso.pipeline.stages.input_hashes import hashed_meanwhile
from cryoiso.pipeline.stages.result_folder import fill_result
from cryoiso.pipeline.stages.rounds import last_round, pose_file, poses_after
from cryoiso.pipeline.work import Work

logger = logging.getLogger("cryoiso")
SHARED_NETWORK = (
    "The poses were found with references made by one network that saw both half-sets (realign.mode = paired): the "
    "half-map FSC is no gold standard."
)
STOPPED = "stopped by a signal; what is finished is kept"


def ingest(work: Work) -> None:
    """Images into shards, unless the job's particles are shards already; either way the run's images are hashed."""
    comm, folder = work.comm, work.folder.stage("ingest")
    with hashed_meanwhile(work) as note_hashes:
        if on_root(comm, lambda: work.shards != folder):
            facts = on_root(comm, lambda: _facts_of_shards(work))
        else:
            plan = on_root(comm, lambda: bare_plan(work.plan()))

            def note(done: int, of: int) -> None:
                work.note_checkpoint("ingest", images=done, of=of)
                note_hashes()

            write_shards(plan, folder, comm, note)
            facts = _ingest_facts(plan)
    on_root(comm, write_json, folder / "ingest.json", facts)


def bare_plan(plan: Any) -> Any:
    """The plan as all ranks need it, without the source's text."""
    return replace(plan, particles=bare(plan.particles))


def write_shards(
    plan: Any, folder: Path, comm: Context, note: Progress | None = None, known: dict[str, str] | None = None
) -> None:  # fmt: skip
    """Writes the shards of a plan and their index; ranks work side by side, finished shards are left alone. Collective.

    In every round each rank writes one shard and then all agree, so that a bad image or a full disk stops all at once.

    Args:
        plan: io.ingest.IngestPlan, the same on every rank.
        note: called by all ranks after each round with (images done, images in all).
        known: hashes of shards that are there. With it index.json gets those of all; a run notes them by itself.
    """
    total = len(plan.particles)
    board.expect(0, 1)
    line = ProgressLine("ingest", total, active=comm.rank == 0)
    for first in range(0, len(plan.shards), comm.size):
        if comm.stop_requested():
            raise Interrupted(STOPPED)
        agree(comm, _write_shard(plan, folder, first + comm.rank, comm.size, line))
        if note:
            note(int(plan.shards[min(first + comm.size, len(plan.shards)) - 1][1]), total)
    hashes = None
    if known is not None:
        names = [name for name in map(shard_name, range(len(plan.shards))) if name not in known]
        made = hash_shared(folder, names, comm, "hashing shards") if names else {}
        hashes = {**known, **{name: facts["sha256"] for name, facts in made.items()}}
    on_root(comm, io_ingest.finish_index, plan, folder, hashes)
    line.close(f"{total:,} images of {plan.box_px} px in {len(plan.shards)} shard(s)")


def _write_shard(plan: Any, folder: Path, number: int, ranks: int, line: ProgressLine) -> CryoisoError | None:
    def seen(done: int, total: int) -> None:
        begin = int(plan.shards[number][0])
        _heed_and_tell(line, min(begin + ranks * (done - begin), total))  # the other ranks are about as far

    try:
        if number < len(plan.shards):
            io_ingest.write_shard(plan, folder, number, seen)
    except CryoisoError as error:
        return error
    return None


def _heed_and_tell(line: ProgressLine, done: int) -> None:
    """Between two blocks of images; a shard that is not finished leaves nothing behind."""
    signals.heed()
    line.update(done)


def _facts_of_shards(work: Work) -> dict[str, Any]:
    index, particles = read_index(work.shards), work.particles()
    logger.info("the images are in shards already: %s", work.shards)
    return {
        "particles": len(particles),
        "half_counts": [int(np.sum(particles.half == number)) for number in (1, 2)],
        "optics_groups": len(np.unique(particles.optics)),
        "box_px": index["box_px"],
        "pixel_size_A": particles.first_group.pixel_size_A,
        "inverted": bool(index["inverted"]),
        "sign": index.get("sign", ""),
        "shards": len(index["shards"]),
        "storage": index["storage"],
        "folder": str(work.shards),
    }


def _ingest_facts(plan: Any) -> dict[str, Any]:
    group = plan.particles.first_group
    return {
        "particles": len(plan.particles),
        "half_counts": [int((plan.particles.half == number).sum()) for number in (1, 2)],
        "optics_groups": len(np.unique(plan.particles.optics)),
        "box_px": plan.box_px,
        "pixel_size_A": group.pixel_size_A,
        "inverted": bool(plan.decision.inverted),
        "sign": plan.decision.reason,
        "shards": len(plan.shards),
        "storage": plan.settings.storage,
    }


def reference(work: Work) -> None:
    """The reference on the particles' grid: as it is, and low-passed as the refinement starts from it."""
    on_root(work.comm, _write_reference, work)


def _write_reference(work: Work) -> None:
    made, folder, lowpass_A = work.reference(), work.folder.stage("reference"), work.job.reference.lowpass_A
    write_map(folder / "reference.mrc", made.map.data, made.map.pixel_size_A)
    write_map(folder / "initial.mrc", made.initial.data, made.initial.pixel_size_A)
    facts = {
        "source": made.source,
        "lowpass_A": lowpass_A,
        "diameter_A": round(made.diameter_A, 3),
        "box_px": made.map.box_px,
        "pixel_size_A": made.map.pixel_size_A,
    }
    if made.fit is not None:
        facts["fit"] = made.fit.facts()
    write_json(folder / "reference.json", facts)
    logger.info("reference: %s, low-passed at %g Å, diameter %.0f Å", made.source, lowpass_A, made.diameter_A)


def refine(work: Work) -> None:
    """Poses and half-maps by the engine, or, where the job says so, from the particle file."""
    comm, job = work.comm, work.job
    if work.folder.has("train-1") and job.auxiliary.poses == "given":
        return _take_given_poses(work)
    engines.engine(job.refine.engine).refine(refine_request(work), comm)


def refine_request(work: Work) -> RefineRequest:
    """What the stage ``refine`` asks an engine for. Collective."""
    comm, job = work.comm, work.job
    source = work.source(once=job.refine.engine == "relion")
    _, pixel_size_A = on_root(comm, work.grid)
    start = on_root(comm, read_map, work.folder.stage("reference") / "reference.mrc", pixel_size_A)
    return RefineRequest(
        source=source,
        reference=start,
        symmetry=job.sample.symmetry,
        folder=work.folder.stage("refine"),
        settings=job.refine,
        seed=job.run.seed,
        diameter_A=on_root(comm, work.diameter_A),
        mask=on_root(comm, work.mask),
        resume=work.resume,
        lowpass_A=job.reference.lowpass_A,
        local_deg=job.refine.local_deg,
        correction=engines.correction(job) if job.run.workflow == "realign" else None,
        program=job.relion,
        on_checkpoint=lambda record: work.note_checkpoint("refine", iteration=record.get("iteration")),
    )


def _take_given_poses(work: Work) -> None:
    """What the refinement would have left, from the poses of the particle file."""
    comm, folder = work.comm, work.folder.stage("refine")
    posed = on_root(comm, lambda: bare(work.particles()))
    board.expect(0, 1, lines=2)
    facts = write_reconstruction(
        work.source(once=True), posed, folder, comm,
        symmetry=work.job.sample.symmetry, padding=work.job.reconstruct.padding,
        pixel_size_A=on_root(comm, work.grid)[1],
    )  # fmt: skip
    on_root(comm, lambda: write_particles(folder / "particles.star", work.particles()))
    on_root(comm, write_json, folder / "refine.json", {**facts, "engine": "given", "particles": len(posed)})


def reconstruct(work: Work) -> None:
    """Half-maps, map and mask from the refined poses and, where they are known, maps from the true poses."""
    comm, folder = work.comm, work.folder.stage("reconstruct")
    how: dict[str, Any] = {
        "symmetry": work.job.sample.symmetry, "padding": work.job.reconstruct.padding,
        "pixel_size_A": on_root(comm, work.grid)[1],
    }  # fmt: skip
    source = work.source(once=True)
    refined = on_root(comm, _refined, work)
    kept = refined.results.get("cryoisoBalanced")
    some = np.flatnonzero(np.ones(len(refined)) if kept is None else kept)
    truth = on_root(comm, _true, work)
    sets = 1 + work.folder.has("train-1") + (truth is not None)
    board.expect(0, sets, lines=2)
    support = on_root(comm, _support, work)
    facts = write_reconstruction(
        SubsetSource(source, some) if len(some) < len(refined) else source, refined.take(some), folder, comm,
        support=support, **how,
    )  # fmt: skip
    facts["mask"] = on_root(comm, support.write_mask, folder, how["pixel_size_A"])
    if work.folder.has("train-1"):
        before = poses_after(work, 0)
        on_root(comm, (folder / "initial_poses").mkdir, exist_ok=True)
        board.expect(1, sets, lines=2)
        write_reconstruction(source, before, folder / "initial_poses", comm, support=support, **how)
    if truth is not None:
        on_root(comm, (folder / "truth_poses").mkdir, exist_ok=True)
        board.expect(sets - 1, sets, lines=2)
        write_reconstruction(source, truth, folder / "truth_poses", comm, support=support, **how)
    on_root(comm, write_json, folder / "reconstruct.json", facts)


def final_poses(work: Work) -> Path:
    """The particle file with the run's last poses (rank 0)."""
    if not work.folder.has("train-1"):
        return work.folder.stage("refine") / "particles.star"
    if work.folder.has("local"):
        return work.folder.stage("local") / "particles.star"
    return pose_file(work, last_round(work))


def _refined(work: Work) -> Particles:
    """The particles with their last poses; rows in the order of the source."""
    path = final_poses(work)
    refined = read_particle_file(path, work.job.particles.project, ("pose",))
    if not np.array_equal(refined.uid, work.particles().uid):
        raise InputError("the refined particles are not those of this run", file=path, hint="Start a new run.")
    posed = bare(work.particles()).with_poses(*refined.require_poses(path))
    if refined.table is None or "cryoisoBalanced" not in refined.table:
        return posed
    return posed.with_results(cryoisoBalanced=refined.table["cryoisoBalanced"].astype(np.int64).to_numpy())


def _true(work: Work) -> Particles | None:
    truth = work.truth()
    return None if truth is None else bare(truth)


def _support(work: Work) -> Support:
    given = work.mask()
    return Support(None if given is None else given.data, work.diameter_A(), work.job.run.seed)


def diagnose(work: Work) -> None:
    """All quality numbers, measured on rank 0."""
    on_root_heeding(work.comm, _diagnose, work)


def _diagnose(work: Work) -> None:
    from cryoiso.pipeline.stages.diagnose import diagnose as measure

    maps, job = work.folder.stage("reconstruct"), work.job
    half1, half2, mask = (read_map(maps / name) for name in ("half1.mrc", "half2.mrc", "mask.mrc"))
    with_true_poses = maps / "truth_poses" / "map.mrc"

    def numbers_of(one: np.ndarray, two: np.ndarray, star: Path, true_poses: Path | None) -> dict[str, Any]:
        return measure(
            one, two, mask.data, half1.pixel_size_A,
            read_particle_file(star, work.job.particles.project, ("pose",)),
            work.job.sample.symmetry,
            truth_particles=work.truth(),
            truth_map=work.truth_map(),
            truth_pose_map=read_map(true_poses).data if true_poses and true_poses.exists() else None,
            seed=work.job.run.seed,
        )  # fmt: skip

    numbers = numbers_of(half1.data, half2.data, final_poses(work), with_true_poses)
    if work.folder.has("train-1"):
        first = work.folder.stage("reconstruct") / "initial_poses"
        earlier = [read_map(first / f"half{h}.mrc").data for h in (1, 2)]
        before = work.folder.stage("refine") / "particles.star"
        logger.info("the same for the maps before the auxiliary particles, to compare with")
        numbers["before"] = numbers_of(earlier[0], earlier[1], before, None)
    if work.folder.has("correct") and job.realign.correct and job.realign.mode == "paired":
        numbers["notes"].append(SHARED_NETWORK)
    write_json(work.folder.stage("diagnose") / "diagnose.json", numbers)


def report(work: Work) -> None:
    """The result folder, the report where a maker of reports was given, and the result's checksums."""
    on_root(work.comm, _publish, work)


def _publish(work: Work) -> None:
    run = work.folder
    numbers = json.loads((run.stage("diagnose") / "diagnose.json").read_text(encoding="utf-8"))
    corrected = run.stage("correct") if run.has("correct") else None
    fill_result(run.result, final_poses(work), run.stage("reconstruct"), corrected, numbers)
    if work.report is not None:
        work.report(run.path)
    write_sums(run.result)
