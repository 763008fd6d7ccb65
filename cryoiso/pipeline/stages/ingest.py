"""The stage ``ingest``: particle images into shards, side by side on all ranks."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cryoiso.core import products
from cryoiso.core.errors import STOPPED, CryoisoError, Interrupted
from cryoiso.core.log import ProgressLine, quantity
from cryoiso.core.progress import board
from cryoiso.core.protocols import Progress
from cryoiso.io import ingest as io_ingest
from cryoiso.io.atomic import write_json
from cryoiso.io.shards import read_index, shard_name
from cryoiso.parallel import signals
from cryoiso.parallel.abort import agree, on_root
from cryoiso.parallel.context import Context
from cryoiso.pipeline.context import RunContext
from cryoiso.pipeline.inputs.particle_tables import bare
from cryoiso.pipeline.job_inputs import Inputs
from cryoiso.pipeline.records.hashing import hash_shared
from cryoiso.pipeline.stages.input_hashes import hashed_meanwhile

logger = logging.getLogger("cryoiso")


def ingest(run: RunContext, inputs: Inputs, *, resume: bool) -> None:
    """Images into shards, unless the job's particles are shards already; either way the run's images are hashed."""
    comm, folder = run.comm, run.folder.stage("ingest")
    with hashed_meanwhile(run) as note_hashes:
        if on_root(comm, lambda: inputs.shards != folder):
            facts = on_root(comm, lambda: _facts_of_shards(inputs))
        else:
            plan = on_root(comm, lambda: bare_plan(inputs.plan()))

            def note(done: int, of: int) -> None:
                run.note_checkpoint("ingest", images=done, of=of)
                note_hashes()

            write_shards(plan, folder, comm, note)
            facts = _ingest_facts(plan)
    on_root(comm, write_json, folder / products.facts("ingest"), facts)


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
        digests = hash_shared(folder, names, comm, "hashing shards") if names else {}
        hashes = {**known, **{name: facts["sha256"] for name, facts in digests.items()}}
    on_root(comm, io_ingest.finish_index, plan, folder, hashes)
    line.close(f"{total:,} images of {plan.box_px} px in {quantity(len(plan.shards), 'shard')}")


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


def _facts_of_shards(inputs: Inputs) -> dict[str, Any]:
    index, particles = read_index(inputs.shards), inputs.particles()
    logger.info("the images are in shards already: %s", inputs.shards)
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
        "folder": str(inputs.shards),
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
