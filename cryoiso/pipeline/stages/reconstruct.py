"""The stage ``reconstruct``: half-maps, map and mask from the last poses."""

from __future__ import annotations

from typing import Any

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.progress import board
from cryoiso.core.types import Particles
from cryoiso.io import read_particle_file
from cryoiso.io.atomic import write_json
from cryoiso.io.sources import SubsetSource
from cryoiso.parallel.abort import on_root
from cryoiso.pipeline.inputs.particle_tables import bare
from cryoiso.pipeline.stages.half_maps import Support, write_reconstruction
from cryoiso.pipeline.stages.rounds import final_poses, poses_after
from cryoiso.pipeline.work import Work


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


def _refined(work: Work) -> Particles:
    """The particles with their last poses; rows in the order of the source."""
    path = final_poses(work)
    refined = read_particle_file(path, work.job.particles.project, ("pose",))
    if not np.array_equal(refined.uid, work.particles().uid):
        raise InputError(
            "the refined particles are not those of this run",
            file=path,
            hint="Start a new run.",
            code="run-particles-differ",
        )
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
