"""One door for particle files of any program."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cryoiso.core.config import ParticlesSection
    from cryoiso.core.types import Particles


def read_job_particles(
    section: ParticlesSection, require: tuple[str, ...] = ("image", "ctf"), symmetry: str = "C1"
) -> Particles:
    """The particles that a job's section ``[particles]`` names; see ``read_particle_file``."""
    return read_particle_file(section.file, section.project, require, section.passthrough, symmetry)


def read_particle_file(
    path: object,
    project: str = "",
    require: tuple[str, ...] = ("image", "ctf"),
    passthrough: Sequence[object] = (),
    symmetry: str = "C1",
) -> Particles:
    """Particles of a RELION STAR file or a cryoSPARC .cs file, told apart by the file's suffix.

    Args:
        path: ``*.star`` or ``*.cs``.
        project: folder that relative image paths start from (empty: found as RELION does).
        require: what must be there: any of "image", "ctf", "pose".
        passthrough: further .cs files with fields that a .cs file lacks.
        symmetry: point group of the sample: poses of a .cs file are taken from cryoSPARC's frame of it into ours.

    Raises:
        InputError: unknown suffix, passthrough files for a STAR file, subtomograms where images with a CTF are
            required, or whatever the reader finds wrong.
    """
    from pathlib import Path

    from cryoiso.core.errors import InputError

    suffix = Path(str(path)).suffix.lower()
    if suffix == ".cs":
        from cryoiso.io.cs import read_cs

        return _in_our_frame(read_cs(path, project, require, passthrough), symmetry, path)
    if suffix == ".star":
        if passthrough:
            raise InputError(
                "passthrough files belong to a .cs file, not to a STAR file", file=path, code="passthrough-mismatch"
            )
        from cryoiso.io.dimensionality import require_images
        from cryoiso.io.star.read import read_particles

        if "ctf" in require:
            require_images(path, project)
        return read_particles(path, project, require)
    raise InputError(
        "unknown kind of particle file",
        file=path,
        expected="a name that ends in .star or .cs",
        code="particle-file-unknown-kind",
    )


def _in_our_frame(particles: Particles, symmetry: str, path: object) -> Particles:
    """Particles of a .cs file with their poses in our frame of a point group."""
    from dataclasses import replace

    from cryoiso.io.conventions import from_cryosparc_frame
    from cryoiso.physics.symmetry import cryosparc_turn

    if particles.rotation is None or cryosparc_turn(symmetry) is None:
        return particles
    import logging

    logging.getLogger("cryoiso").info(
        "%s: poses are taken from cryoSPARC's frame of %s (two-fold axis on y) into RELION's (on x)", path, symmetry
    )
    return replace(particles, rotation=from_cryosparc_frame(particles.rotation, symmetry))
