"""``cryoiso reconstruct``: half-maps from given poses."""

from __future__ import annotations

from cryoiso.cli.common import echo
from cryoiso.cli.groups import COMPUTING, IMAGES, SYMMETRY, OutputFolder, Overwrite, Posed
from cryoiso.cli.options import JobOptions, keys, with_keys
from cryoiso.core import products


@with_keys(SYMMETRY, keys("reconstruct", "Reconstruction", "padding"), IMAGES, COMPUTING)
def reconstruct(particles: Posed, out: OutputFolder, job_options: JobOptions, overwrite: Overwrite = False) -> None:
    """Reconstruct half-maps from given poses.

    Writes half1.mrc, half2.mrc, their mean map.mrc, and map_weighted.mrc: both half-sets together, every Fourier
    coefficient weighted by its sampling. Particles without half-sets are assigned to them by --seed. The images are
    read from their stacks, without shards. Ranks share the particles.
    """
    from cryoiso.parallel.abort import on_root
    from cryoiso.parallel.context import get_context
    from cryoiso.pipeline.commands.output import refuse_result
    from cryoiso.pipeline.commands.reconstruct import reconstruct_files

    comm = get_context()
    on_root(comm, refuse_result, out, (*products.HALF_MAPS, products.MAP), overwrite)
    job = on_root(comm, job_options.job, particles={"file": str(particles)}, reference={"file": ""})
    reconstruct_files(job, out, comm)
    if comm.rank == 0:
        echo("\n".join(str(out / name) for name in (*products.HALF_MAPS, products.MAP, products.WEIGHTED_MAP)))
