"""``cryoiso ingest``: particle stacks into HDF5 shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cryoiso.cli.common import echo
from cryoiso.cli.groups import IMAGES, SHARDS
from cryoiso.cli.options import JobOptions, help_of, with_keys
from cryoiso.core import products


@with_keys(IMAGES, SHARDS)
def ingest(
    particles: Annotated[Path, typer.Argument(help=help_of("particles", "file"))],
    out: Annotated[Path, typer.Argument(help="Folder for the shards; finished shards in it are kept.")],
    job_options: JobOptions,
) -> None:
    """Write particle images into HDF5 shards.

    The images are checked, normalised and stored with white protein. They are read once, in blocks; memory use does not
    depend on their number. Ranks share the work.
    """
    from cryoiso.parallel.abort import on_root
    from cryoiso.parallel.context import get_context
    from cryoiso.pipeline.commands.ingest import ingest_files

    comm = get_context()
    job = on_root(comm, job_options.job, particles={"file": str(particles)}, reference={"file": ""})
    ingest_files(job.particles, out, comm)
    if comm.rank == 0:
        echo(out / products.INDEX)
