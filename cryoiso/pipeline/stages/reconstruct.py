"""The stage ``reconstruct``: half-maps, map and mask from the last poses."""

from __future__ import annotations

from typing import Any

import numpy as np

from cryoiso.core import products
from cryoiso.core.errors import InputError
from cryoiso.core.progress import board
from cryoiso.core.types import Particles
from cryoiso.io import read_particle_file
from cryoiso.io.atomic import write_json
from cryoiso.io.sources import SubsetSource
from cryoiso.parallel.abort import on_root
from cryoiso.pipeline.context import RunContext
from cryoiso.pipeline.inputs.particle_tables import bare
from cryoiso.pipeline.job_inputs import Inputs
from cryoiso.pipeline.stages.half_maps import Support, write_reconstruction
from cryoiso.pipeline.stages.rounds import final_poses, poses_after
from cryoiso.refine.junk import with_junk_of_file


def reconstruct(run: RunContext, inputs: Inputs, *, resume: bool) -> None:
    """Half-maps, map and mask from the refined poses and, where they are known, maps from the true poses."""
    comm, folder = run.comm, run.folder.stage("reconstruct")
    how: dict[str, Any] = {
        "symmetry": run.job.sample.symmetry, "padding": run.job.reconstruct.padding,
        "pixel_size_A": on_root(comm, inputs.grid)[1],
    }  # fmt: skip
    source = inputs.source(once=True)
    refined = on_root(comm, _refined, run, inputs)
    kept = refined.results.get("cryoisoBalanced")
    some = np.flatnonzero(np.ones(len(refined)) if kept is None else kept)
    truth = on_root(comm, _true, inputs)
    sets = 1 + run.folder.has("train-1") + (truth is not None)
    board.expect(0, sets, lines=2)
    support = on_root(comm, _support, inputs)
    facts = write_reconstruction(
        SubsetSource(source, some) if len(some) < len(refined) else source, refined.take(some), folder, comm,
        support=support, **how,
    )  # fmt: skip
    facts["mask"] = on_root(comm, support.write_mask, folder, how["pixel_size_A"])
    if run.folder.has("train-1"):
        before = poses_after(run, inputs, 0)
        on_root(comm, (folder / products.INITIAL_POSES).mkdir, exist_ok=True)
        board.expect(1, sets, lines=2)
        write_reconstruction(source, before, folder / products.INITIAL_POSES, comm, support=support, **how)
    if truth is not None:
        on_root(comm, (folder / products.TRUE_POSES).mkdir, exist_ok=True)
        board.expect(sets - 1, sets, lines=2)
        write_reconstruction(source, truth, folder / products.TRUE_POSES, comm, support=support, **how)
    on_root(comm, write_json, folder / products.facts("reconstruct"), facts)


def _refined(run: RunContext, inputs: Inputs) -> Particles:
    """The particles with their last poses; rows in the order of the source."""
    path = final_poses(run)
    refined = read_particle_file(path, run.job.particles.project, ("pose",))
    if not np.array_equal(refined.uid, inputs.particles().uid):
        raise InputError(
            "the refined particles are not those of this run",
            file=path,
            hint="Start a new run.",
            code="run-particles-differ",
        )
    posed = bare(inputs.particles()).with_poses(*refined.require_poses(path))
    posed = posed.with_intensity(refined.signal_scale, refined.noise_level)
    posed = posed.with_results(**with_junk_of_file(refined, path).results)
    if refined.table is None or "cryoisoBalanced" not in refined.table:
        return posed
    return posed.with_results(cryoisoBalanced=refined.table["cryoisoBalanced"].astype(np.int64).to_numpy())


def _true(inputs: Inputs) -> Particles | None:
    truth = inputs.truth()
    return None if truth is None else bare(truth)


def _support(inputs: Inputs) -> Support:
    mask = inputs.mask()
    return Support(None if mask is None else mask.data, inputs.diameter_A(), inputs.job.run.seed)
