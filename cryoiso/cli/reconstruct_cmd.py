"""``cryoiso reconstruct``: half-maps from given poses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cryoiso.cli.common import echo
from cryoiso.cli.options import default, job_of, option
from cryoiso.core import products
from cryoiso.core.config import ParticlesSection as P
from cryoiso.core.config import ReconstructSection as C
from cryoiso.core.config import RunSection as U
from cryoiso.core.config import SampleSection as S


def reconstruct(
    particles: Annotated[Path, typer.Argument(help="Particles with poses: a STAR or .cs file.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write the maps into.")],
    symmetry: Annotated[str, option(S, "symmetry")] = default(S, "symmetry"),
    padding: Annotated[int, option(C, "padding")] = default(C, "padding"),
    project: Annotated[str, option(P, "project")] = "",
    passthrough: Annotated[list[str] | None, option(P, "passthrough")] = None,
    invert: Annotated[str, option(P, "invert")] = default(P, "invert"),
    normalise: Annotated[bool, option(P, "normalise")] = default(P, "normalise"),
    seed: Annotated[int, typer.Option(min=0, help="Makes half-sets where the file has none.")] = 1,
    device: Annotated[str, option(U, "device")] = default(U, "device"),
) -> None:
    """Reconstruct half-maps from given poses.

    Writes half1.mrc, half2.mrc, their mean map.mrc, and map_weighted.mrc: both half-sets together, every Fourier
    coefficient weighted by how well it was measured. The images are read from their stacks, not ingested. Ranks share
    the particles.
    """
    from cryoiso.parallel.abort import on_root
    from cryoiso.parallel.context import get_context
    from cryoiso.pipeline.commands.reconstruct import reconstruct_files

    comm = get_context()
    job = on_root(
        comm, job_of,
        particles={
            "file": str(particles), "project": project, "passthrough": passthrough, "invert": invert,
            "normalise": normalise,
        },
        reference={"file": ""},
        sample={"symmetry": symmetry},
        reconstruct={"padding": padding},
        run={"seed": seed, "device": device},
    )  # fmt: skip
    reconstruct_files(job, out, comm)
    if comm.rank == 0:
        echo("\n".join(str(out / name) for name in (*products.HALF_MAPS, products.MAP, products.WEIGHTED_MAP)))
