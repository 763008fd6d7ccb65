"""The only opener of scientific files: STAR, cryoSPARC .cs, MRC, models, HDF5 shards; and the unit conversions."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cryoiso.core.config import ParticlesSection
    from cryoiso.core.types import Particles


def read_job_particles(section: ParticlesSection, require: tuple[str, ...] = ("image", "ctf")) -> Particles:
    """The particles that a job's section ``[particles]`` names; see ``read_particle_file``."""
    return read_particle_file(section.file, section.project, require, section.passthrough)


def read_particle_file(
    path: object, project: str = "", require: tuple[str, ...] = ("image", "ctf"), passthrough: Sequence[object] = ()
) -> Particles:
    """Particles of a RELION STAR file or a cryoSPARC .cs file, told apart by the file's suffix.

    Args:
        path: ``*.star`` or ``*.cs``.
        project: folder that relative image paths start from (empty: found as RELION does).
        require: what must be there: any of "image", "ctf", "pose".
        passthrough: further .cs files with fields that a .cs file lacks.

    Raises:
        InputError: unknown suffix, passthrough files for a STAR file, subtomograms where images with a CTF are
            required, or whatever the reader finds wrong.
    """
    from pathlib import Path

    from cryoiso.core.errors import InputError

    suffix = Path(str(path)).suffix.lower()
    if suffix == ".cs":
        from cryoiso.io.cs import read_cs

        return read_cs(path, project, require, passthrough)
    if suffix == ".star":
        if passthrough:
            raise InputError("passthrough files belong to a .cs file, not to a STAR file", file=path)
        from cryoiso.io.dimensionality import require_images
        from cryoiso.io.star import read_particles

        if "ctf" in require:
            require_images(path, project)
        return read_particles(path, project, require)
    raise InputError("unknown kind of particle file", file=path, expected="a name that ends in .star or .cs")
