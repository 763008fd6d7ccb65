"""Settings of a CTF refinement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cryoiso.core.errors import UsageError

MicrographFit = Literal["none", "defocus", "astigmatism"]
TiltFit = Literal["none", "tilt", "trefoil"]


@dataclass(frozen=True)
class CtfRefinementSettings:
    """What is refined, and how far the search goes.

    Raises:
        UsageError: nothing to refine, or a number out of range.
    """

    range_A: float = 2000.0
    """Largest change of defocus, of a micrograph and of a particle about its micrograph."""
    prior_sd_A: float | None = None
    """Standard deviation of the particles' changes; None: estimated."""
    particles: bool = True
    """Refine the defocus of each particle."""
    micrographs: MicrographFit = "none"
    """What all particles of a micrograph share."""
    beam_tilt: TiltFit = "none"
    """What all particles of an optics group share."""
    control_particles: int = 500
    """Particles that are also compared with a reference of random phases; 0: none."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.particles and self.micrographs == "none" and self.beam_tilt == "none":
            raise UsageError(
                "nothing to refine: particles, micrographs and beam tilt are all switched off", code="option-missing"
            )
        if not 0 < self.range_A <= 50_000:
            raise UsageError(
                f"--range: above 0 and at most 50,000 Å is expected (found {self.range_A:g})",
                code="option-out-of-range",
            )
        if self.prior_sd_A is not None and not 0 < self.prior_sd_A <= self.range_A:
            raise UsageError(
                f"--prior-sd: above 0 and at most --range, {self.range_A:g} Å, is expected (found {self.prior_sd_A:g})",
                code="option-out-of-range",
            )
