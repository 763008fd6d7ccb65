"""The command ``ingest`` on plain files."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

from cryoiso.core.config import ParticlesSection
from cryoiso.core.errors import InputError
from cryoiso.io import ingest as io_ingest
from cryoiso.io import read_job_particles
from cryoiso.io.atomic import make_folder
from cryoiso.io.shards import read_index
from cryoiso.parallel.abort import on_root
from cryoiso.parallel.context import Context
from cryoiso.pipeline.records.hashing import hash_shared
from cryoiso.pipeline.stages import ingest

logger = logging.getLogger("cryoiso")


def ingest_files(section: ParticlesSection, out: Path, comm: Context) -> None:
    """Particles of a STAR or .cs file into shards, their hashes in index.json. Collective; errors as ``io.ingest``.

    Shards that are there already stay, unless they are no longer what an earlier call wrote.
    """

    def prepare() -> Any:
        particles = read_job_particles(section)
        plan = io_ingest.plan(particles, section, section.file)
        make_folder(out)
        return ingest.bare_plan(plan)

    comm.install_signal_handlers()
    plan = on_root(comm, prepare)
    ingest.write_shards(plan, out, comm, known=_kept_shards(plan, out, comm))


def _kept_shards(plan: Any, out: Path, comm: Context) -> dict[str, str]:
    """Hashes of the shards of an earlier call that need not be written again; what has changed since is removed.
    Collective."""

    def noted() -> dict[str, str]:
        with suppress(InputError):
            index = read_index(out)
            if index["plan"] == plan.digest:
                kept = [s for n, s in enumerate(index["shards"]) if io_ingest.shard_is_done(plan, out, n)]
                return {shard["file"]: shard["sha256"] for shard in kept if "sha256" in shard}
        return {}

    def remove(names: list[str]) -> None:
        for name in names:
            logger.warning("%s is not what index.json says; it is written again", out / name)
            (out / name).unlink()

    expected = on_root(comm, noted)
    digests = hash_shared(out, list(expected), comm, "checking shards") if expected else {}
    changed = [name for name, facts in digests.items() if facts["sha256"] != expected[name]]
    on_root(comm, remove, changed)
    return {name: facts["sha256"] for name, facts in digests.items() if name not in changed}
