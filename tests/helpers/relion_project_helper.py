"""A small project of RELION: particles of a refinement with uneven views, and a program ``cryoiso`` on the PATH."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from forks_helper import python

PARTICLES = "Refine3D/job010/run_data.star"
COLUMNS = (
    "ImageName", "OpticsGroup", "AngleRot", "AngleTilt", "AnglePsi", "OriginXAngst", "OriginYAngst", "RandomSubset",
    "DefocusU", "DefocusV", "DefocusAngle", "MaxValueProbDistribution",
)  # fmt: skip
OPTICS = """# version 30001

data_optics

loop_
_rlnOpticsGroup #1
_rlnOpticsGroupName #2
_rlnVoltage #3
_rlnSphericalAberration #4
_rlnAmplitudeContrast #5
_rlnImagePixelSize #6
_rlnImageSize #7
_rlnImageDimensionality #8
1 g1 300 2.7 0.1 2.0 32 2

# version 30001

data_particles

loop_
"""


def make_project(folder: Path) -> None:
    """Writes 200 particles with most views near z, and empty maps beside them, as a job of RELION leaves them."""
    star = folder / PARTICLES
    star.parent.mkdir(parents=True)
    rng = np.random.default_rng(1)
    rows = [
        f"{i + 1:06d}@Extract/job005/a.mrcs 1 {rng.uniform(-180, 180):.3f} {abs(rng.normal(0, 20)):.3f} 0 0 0 "
        f"{1 + i % 2} 15000 15000 0 {rng.uniform():.4f}"
        for i in range(200)
    ]
    labels = [f"_rln{name} #{number}" for number, name in enumerate(COLUMNS, 1)]
    star.write_text(OPTICS + "\n".join((*labels, *rows)) + "\n")
    for name in ("half1_class001_unfil", "half2_class001_unfil", "class001"):
        star.with_name(f"run_{name}.mrc").touch()


def make_program(folder: Path) -> Path:
    """A folder with a program ``cryoiso`` that starts quickly, for the front of PATH."""
    program = folder / "bin" / "cryoiso"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {python()} -m cryoiso.cli.main "$@"\n')
    program.chmod(0o755)
    return program.parent
