"""Particles for cryoDRGN, DRGN-AI and recovar: the pickles of their parsers, and a STAR file of the images.

``poses.pkl`` is a tuple of rotations (n, 3, 3), map to image coordinates as ours, and shifts (n, 2) over the box.
``ctf.pkl`` is (n, 9) float32: box in pixels, pixel size, defocus U, V (Å) and angle (degrees), voltage (kV), Cs (mm),
amplitude contrast, phase shift (degrees). Checked against cryoDRGN 4.3.1.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np

from cryoiso.core import products
from cryoiso.core.errors import InputError
from cryoiso.core.types import Particles
from cryoiso.io.atomic import atomic_write
from cryoiso.io.star.write import write_particles

POSES, CTF, IMAGES = "poses.pkl", "ctf.pkl", products.PARTICLES


def require_one_grid(particles: Particles, file: object) -> None:
    """
    Raises:
        InputError: box or pixel size unknown or different between optics groups: these programs take those of the first
            particle for all.
    """
    used = [particles.groups[k] for k in np.unique(particles.optics).tolist()]
    grids = sorted({(group.box_px, group.pixel_size_A) for group in used})
    if len(grids) > 1 or grids[0][0] <= 0 or not grids[0][1] > 0:
        raise InputError(
            "cryoDRGN needs images of one box and pixel size", file=file, expected="one of each",
            found=", ".join(f"{box} px of {pixel:g} Å" for box, pixel in grids),
            hint="Extract the particles again on one grid; the box is that of _rlnImageSize, else of the stacks.",
            code="box-mismatch",
        )  # fmt: skip


def write_cryodrgn(folder: Path, particles: Particles, file: object) -> None:
    """Writes poses.pkl, ctf.pkl and particles.star, with absolute names of the stacks, into an existing folder.

    Raises:
        InputError: no poses, or images of several sizes.
    """
    require_one_grid(particles, file)
    rotation, shift_A = particles.require_poses(file)
    value = particles.group_values
    box_px, pixel_A = value("box_px"), value("pixel_size_A")
    ctf = np.stack(
        [
            box_px, pixel_A, particles.defocus_u_A, particles.defocus_v_A, particles.defocus_angle_deg,
            value("voltage_kV"), value("spherical_aberration_mm"), value("amplitude_contrast"),
            particles.phase_shift_deg,
        ],
        1,
    )  # fmt: skip
    _pickle(folder / POSES, (rotation, shift_A / (pixel_A * box_px)[:, None]))
    _pickle(folder / CTF, ctf.astype(np.float32))
    stacks = [os.path.abspath(name) for name in particles.stack.tolist()]
    names = [f"{i + 1:06d}@{stack}" for i, stack in zip(particles.index.tolist(), stacks, strict=True)]
    write_particles(folder / IMAGES, particles, names)


def _pickle(path: Path, content: object) -> None:
    with atomic_write(path) as stream:
        pickle.dump(content, stream, protocol=4)
