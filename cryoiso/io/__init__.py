"""The only opener of scientific files: STAR, cryoSPARC .cs, MRC, models, HDF5 shards; and the unit conversions."""

from typing import TYPE_CHECKING

from cryoiso.core.lazy import lazy_exports

if TYPE_CHECKING:
    from cryoiso.io.cs import read_cs
    from cryoiso.io.models import model_to_map
    from cryoiso.io.mrc import StackWriter, read_map, write_map, write_stack
    from cryoiso.io.particle_file import read_job_particles, read_particle_file
    from cryoiso.io.sources import ArraySource, StackSource
    from cryoiso.io.star.read import read_particles
    from cryoiso.io.star.write import write_particles

__all__ = [
    "ArraySource",
    "StackSource",
    "StackWriter",
    "model_to_map",
    "read_cs",
    "read_job_particles",
    "read_map",
    "read_particle_file",
    "read_particles",
    "write_map",
    "write_particles",
    "write_stack",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "cs": ["read_cs"],
            "models": ["model_to_map"],
            "mrc": ["StackWriter", "read_map", "write_map", "write_stack"],
            "particle_file": ["read_job_particles", "read_particle_file"],
            "sources": ["ArraySource", "StackSource"],
            "star.read": ["read_particles"],
            "star.write": ["write_particles"],
        },
    )
