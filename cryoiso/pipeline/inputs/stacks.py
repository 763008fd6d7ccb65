"""Particle images read from their stacks in place."""

from __future__ import annotations

from cryoiso.core.config import ParticlesSection
from cryoiso.core.errors import CryoisoError
from cryoiso.core.types import Particles
from cryoiso.io.sources import StackSource
from cryoiso.parallel.abort import agree
from cryoiso.parallel.context import Context


def open_stacks(particles: Particles, section: ParticlesSection, comm: Context) -> StackSource:
    """The images of particles, on every rank; an error on one rank ends all. Collective.

    Raises:
        InputError: as ``io.sources.StackSource``.
    """
    source, error = None, None
    try:
        source = StackSource(particles, section, section.file)
    except CryoisoError as caught:
        error = caught
    agree(comm, error)
    assert source is not None
    return source
