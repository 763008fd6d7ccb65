"""``cryoiso ingest``: particle stacks into HDF5 shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cryoiso.cli.common import echo
from cryoiso.cli.options import default, job_of, option
from cryoiso.core import products
from cryoiso.core.config import ParticlesSection as P


def ingest(
    particles: Annotated[Path, typer.Argument(help="Particles: a RELION STAR file or a cryoSPARC .cs file.")],
    out: Annotated[Path, typer.Argument(help="Folder for the shards; shards that are finished there are kept.")],
    project: Annotated[str, option(P, "project")] = "",
    passthrough: Annotated[list[str] | None, option(P, "passthrough")] = None,
    invert: Annotated[str, option(P, "invert")] = default(P, "invert"),
    normalise: Annotated[bool, option(P, "normalise")] = default(P, "normalise"),
    storage: Annotated[str, option(P, "storage")] = default(P, "storage"),
    shard_mib: Annotated[int, option(P, "shard_mib")] = default(P, "shard_mib"),
) -> None:
    """Write particle images into HDF5 shards.

    They are checked, normalised and given white protein. The images are read once, in blocks; memory does not grow with
    their number. Ranks share the work.
    """
    from cryoiso.parallel.abort import on_root
    from cryoiso.parallel.context import get_context
    from cryoiso.pipeline.commands.ingest import ingest_files

    comm = get_context()
    facts = {
        "file": str(particles), "project": project, "passthrough": passthrough, "invert": invert,
        "normalise": normalise, "storage": storage,
        "shard_mib": shard_mib,
    }  # fmt: skip
    job = on_root(comm, job_of, particles=facts, reference={"file": ""})
    ingest_files(job.particles, out, comm)
    if comm.rank == 0:
        echo(out / products.INDEX)
