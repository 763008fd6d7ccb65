"""What each stage of a run does. All ranks call a stage together; rank 0 writes, except for the shards."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cryoiso.core.errors import CryoisoError, InputError, Interrupted
from cryoiso.core.log import ProgressLine
from cryoiso.core.protocols import Progress, RefineRequest
from cryoiso.core.types import Particles
from cryoiso.io import ingest as io_ingest
from cryoiso.io import read_particle_file
from cryoiso.io.atomic import atomic_path
from cryoiso.io.mrc import read_map, write_map
from cryoiso.parallel.abort import agree, on_root
from cryoiso.parallel.context import Context
from cryoiso.pipeline import wire
from cryoiso.pipeline.maps import make_mask, write_reconstruction, write_weighted_map
from cryoiso.pipeline.work import Work, bare, write_json

logger = logging.getLogger("cryoiso")
STOPPED = "stopped by a signal; what is finished is kept. 'cryoiso resume' goes on from there."


def ingest(work: Work) -> None:
    """Images into shards."""
    comm, folder = work.comm, work.folder.stage("ingest")
    plan = on_root(comm, lambda: bare_plan(work.plan()))
    write_shards(plan, folder, comm, lambda done, of: work.note_checkpoint("ingest", images=done, of=of))
    on_root(comm, write_json, folder / "ingest.json", _ingest_facts(plan))


def bare_plan(plan: Any) -> Any:
    """The plan as all ranks need it, without the source's text."""
    return replace(plan, particles=bare(plan.particles))


def write_shards(plan: Any, folder: Path, comm: Context, note: Progress | None = None) -> None:
    """Writes the shards of a plan and their index; ranks work side by side, finished shards are left alone. Collective.

    In every round each rank writes one shard and then all agree, so that a bad image or a full disk stops all at once.

    Args:
        plan: io.ingest.IngestPlan, the same on every rank.
        note: called after each round with (images done, images in all).
    """
    total = len(plan.particles)
    line = ProgressLine("ingest", total, active=comm.rank == 0)
    for first in range(0, len(plan.shards), comm.size):
        if comm.stop_requested():
            raise Interrupted(STOPPED)
        agree(comm, _write_shard(plan, folder, first + comm.rank, line))
        if note:
            note(int(plan.shards[min(first + comm.size, len(plan.shards)) - 1][1]), total)
    on_root(comm, io_ingest.finish_index, plan, folder)
    line.close(f"{total:,} images of {plan.box_px} px in {len(plan.shards)} shard(s)")


def _write_shard(plan: Any, folder: Path, number: int, line: ProgressLine) -> CryoisoError | None:
    try:
        if number < len(plan.shards):
            io_ingest.write_shard(plan, folder, number, lambda done, _: line.update(done))
    except CryoisoError as error:
        return error
    return None


def _ingest_facts(plan: Any) -> dict[str, Any]:
    group = plan.particles.groups[int(plan.particles.optics[0])]
    return {
        "particles": len(plan.particles),
        "half_counts": [int((plan.particles.half == number).sum()) for number in (1, 2)],
        "optics_groups": len(plan.particles.groups),
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
    write_json(folder / "reference.json", facts)
    logger.info("reference: %s, low-passed at %g Å, diameter %.0f Å", made.source, lowpass_A, made.diameter_A)


def refine(work: Work) -> None:
    """Poses and half-maps by the engine."""
    comm, job = work.comm, work.job
    source = work.source()
    _, pixel_size_A = on_root(comm, work.grid)
    start = on_root(comm, read_map, work.folder.stage("reference") / "reference.mrc", pixel_size_A)
    request = RefineRequest(
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
        on_checkpoint=lambda record: work.note_checkpoint("refine", iteration=record.get("iteration")),
    )
    wire.engine(job.refine.engine).refine(request, comm)


def reconstruct(work: Work) -> None:
    """Half-maps, map and mask from the refined poses and, where they are known, maps from the true poses."""
    comm, folder = work.comm, work.folder.stage("reconstruct")
    symmetry, padding = work.job.sample.symmetry, work.job.reconstruct.padding
    source = work.source()
    refined = on_root(comm, _refined, work)
    facts = write_reconstruction(source, refined, folder, comm, symmetry=symmetry, padding=padding)
    truth = on_root(comm, _true, work)
    if truth is not None:
        on_root(comm, (folder / "truth_poses").mkdir, exist_ok=True)
        write_reconstruction(source, truth, folder / "truth_poses", comm, symmetry=symmetry, padding=padding)
    on_root(comm, _write_mask, work, folder)
    for maps in (folder, folder / "truth_poses"):
        on_root(comm, _write_weighted, work, maps)
    on_root(comm, write_json, folder / "reconstruct.json", facts)


def _refined(work: Work) -> Particles:
    """The particles with the poses that the refinement wrote; its rows are in the order of the source."""
    path = work.folder.stage("refine") / "particles.star"
    refined = read_particle_file(path, work.job.particles.project, ("pose",))
    if not np.array_equal(refined.uid, work.particles().uid):
        raise InputError("the refined particles are not those of this run", file=path, hint="Start a new run.")
    return bare(work.particles()).with_poses(*refined.require_poses(path))


def _true(work: Work) -> Particles | None:
    truth = work.truth()
    return None if truth is None else bare(truth)


def _write_mask(work: Work, folder: Path) -> None:
    full, given = read_map(folder / "map.mrc"), work.mask()
    data = make_mask(full, work.diameter_A()) if given is None else given.data
    write_map(folder / "mask.mrc", data, full.pixel_size_A)


def _write_weighted(work: Work, maps: Path) -> None:
    if (maps / "map.mrc").exists():
        mask = read_map(work.folder.stage("reconstruct") / "mask.mrc")
        write_weighted_map(maps, mask.data, work.job.run.seed)


def diagnose(work: Work) -> None:
    """All quality numbers, measured on rank 0."""
    on_root(work.comm, _diagnose, work)


def _diagnose(work: Work) -> None:
    from cryoiso.pipeline.diagnose import diagnose as measure

    maps = work.folder.stage("reconstruct")
    half1, half2, mask = (read_map(maps / name) for name in ("half1.mrc", "half2.mrc", "mask.mrc"))
    star = work.folder.stage("refine") / "particles.star"
    with_true_poses = maps / "truth_poses" / "map.mrc"
    numbers = measure(
        half1.data, half2.data, mask.data, half1.pixel_size_A,
        read_particle_file(star, work.job.particles.project, ("pose",)),
        work.job.sample.symmetry,
        truth_particles=work.truth(),
        truth_map=work.truth_map(),
        truth_pose_map=read_map(with_true_poses).data if with_true_poses.exists() else None,
        seed=work.job.run.seed,
    )  # fmt: skip
    write_json(work.folder.stage("diagnose") / "diagnose.json", numbers)


def report(work: Work) -> None:
    """The result folder, and the report where a maker of reports was given."""
    on_root(work.comm, _publish, work)


def _publish(work: Work) -> None:
    result, maps = work.folder.result, work.folder.stage("reconstruct")
    result.mkdir(exist_ok=True)
    files = [work.folder.stage("refine") / "particles.star"]
    files += [maps / name for name in ("half1.mrc", "half2.mrc", "map.mrc", "map_weighted.mrc", "mask.mrc")]
    for file in files:
        with atomic_path(result / file.name, file.stat().st_size) as part:
            shutil.copyfile(file, part)
    if work.report is not None:
        work.report(work.folder.path)
