"""Small sets with wrong CTFs for tests of the CTF refinement."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from nuisance_helper import both

from cryoiso.core.types import DensityMap, Particles
from cryoiso.io.mrc import write_map
from cryoiso.io.sources import ArraySource
from cryoiso.io.star.write import write_particles
from cryoiso.methods.ctf_refinement.astigmatism import astigmatism_of
from cryoiso.methods.ctf_refinement.reference import CtfReference, from_map
from cryoiso.methods.ctf_refinement.refine import CtfRefinement, refine_ctf
from cryoiso.methods.ctf_refinement.settings import CtfRefinementSettings
from cryoiso.parallel.context import Context
from cryoiso.physics.nuisances.settings import Nuisances
from cryoiso.physics.simulation import CtfRanges

CTF = CtfRanges((8000.0, 16000.0))
RESOLUTION_A = 4.0


class WrongSet:
    """n images at known poses, with what the file states and the truth."""

    def __init__(self, volume: DensityMap, n: int, nuisances: Nuisances, seed: int = 3) -> None:
        made = both(volume, n, nuisances, ctf=CTF, seed=seed, shift_sd_A=2.0).source
        halves = (1 + np.arange(n) % 2).astype(np.int8)
        self.volume = volume
        self.true: Particles = replace(made.particles, half=halves)
        self.given: Particles = replace(made.truth.given, half=halves)
        self.micrograph = made.truth.micrographs.of
        self.columns = made.truth.shared_columns()
        self.images = made.read(np.arange(n))
        self.source = ArraySource(self.images, self.given)

    def reference(self) -> CtfReference:
        return from_map(self.volume, RESOLUTION_A, None)

    def refined(
        self, given: Particles | None = None, reference: CtfReference | None = None, **settings
    ) -> CtfRefinement:
        chosen = CtfRefinementSettings(**{"control_particles": 0, **settings})
        return refine_ctf(
            self.source, given or self.given, reference or self.reference(), chosen, Context(), self.micrograph
        )

    def error_A(self, particles: Particles) -> np.ndarray:
        """(n,) error of the mean defocus."""
        return astigmatism_of(particles)[:, 0] - astigmatism_of(self.true)[:, 0]

    def write(self, folder: Path, given: Particles | None = None) -> Path:
        """particles.star with poses, its stack and map.mrc; returns the star file."""
        import mrcfile

        folder.mkdir(parents=True, exist_ok=True)
        with mrcfile.new(folder / "images.mrcs", overwrite=True) as file:
            file.set_data(self.images)
            file.voxel_size = self.volume.pixel_size_A
        write_map(folder / "map.mrc", self.volume.data, self.volume.pixel_size_A)
        n = len(self.images)
        stated = given or self.given
        names = [f"{i + 1:06d}@{folder / 'images.mrcs'}" for i in range(n)]
        write_particles(folder / "given.star", stated.with_results(**self.columns), names)
        return folder / "given.star"


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
