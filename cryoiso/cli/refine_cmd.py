"""``cryoiso refine``: poses and two independent half-maps from particles and a reference."""

from __future__ import annotations

from cryoiso.cli.common import echo
from cryoiso.cli.groups import (
    REFINEMENT,
    CommandKeys,
    CryosparcKeys,
    OutputFolder,
    Overwrite,
    ParticlesOrShards,
    Reference,
    RefineKeys,
    RelionKeys,
    Resume,
)
from cryoiso.cli.options import JobOptions, keys_of, with_keys
from cryoiso.core import products


@with_keys(*REFINEMENT)
def refine(
    particles: ParticlesOrShards,
    ref: Reference,
    out: OutputFolder,
    job_options: JobOptions,
    refine_keys: RefineKeys = None,
    relion: RelionKeys = None,
    command: CommandKeys = None,
    cryosparc: CryosparcKeys = None,
    go_on: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Refine poses with gold-standard half-sets.

    Writes particles.star, half1.mrc, half2.mrc and refine.json into --out. Ranks share the particles.
    """
    from cryoiso.parallel.abort import on_root
    from cryoiso.parallel.context import get_context
    from cryoiso.pipeline.commands.output import refuse_result
    from cryoiso.pipeline.commands.refine import refine_files

    comm = get_context()
    on_root(comm, refuse_result, out, (products.facts("refine"),), overwrite or go_on)
    job = on_root(
        comm, job_options.job, particles={"file": str(particles)}, reference={"file": str(ref)},
        refine=keys_of(refine_keys, "--refine"), relion=keys_of(relion, "--relion"),
        command=keys_of(command, "--command"), cryosparc=keys_of(cryosparc, "--cryosparc"),
    )  # fmt: skip
    refine_files(job, out, comm, resume=go_on)
    if comm.rank == 0:
        echo("\n".join(str(out / name) for name in (products.PARTICLES, *products.HALF_MAPS)))
