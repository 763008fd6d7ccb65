"""The command ``convert --to cryodrgn``: particles of a file or of a run for programs of heterogeneity."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cryoiso.core import products
from cryoiso.core.errors import UsageError
from cryoiso.core.types import Particles
from cryoiso.io import read_particle_file
from cryoiso.io.atomic import make_folder
from cryoiso.io.cryodrgn import CTF, IMAGES, POSES, write_cryodrgn
from cryoiso.io.cs_write import signs
from cryoiso.physics.symmetry import point_group

logger = logging.getLogger("cryoiso")
AUXILIARY = "cryoisoAuxiliary"


def hand_over(
    source: Path, out: Path, symmetry: str, project: str, passthrough: Sequence[str], *, overwrite: bool
) -> dict[str, Any]:
    """Writes poses.pkl, ctf.pkl and particles.star into a folder.

    Args:
        source: a STAR or .cs file, or the folder of a finished run.
        out: the folder, made if it is not there.
        symmetry: point group of a .cs file's poses.

    Returns:
        particles, left_out (auxiliary ones), box_px, pixel_size_A, sign (1: protein is bright in the images, -1: dark,
        0: the file does not say).

    Raises:
        UsageError: files that are there already.
        InputError: unreadable particles, no poses or CTF, images of several sizes.
    """
    file = source / "result" / products.PARTICLES if source.is_dir() else source
    for name in (POSES, CTF, IMAGES):
        target = out / name
        if target.resolve() == file.resolve() or (target.exists() and not overwrite):
            raise UsageError(f"{target} already exists; give --overwrite to replace it", code="file-exists")
    point_group(symmetry)
    particles = read_particle_file(file, project, ("image", "ctf", "pose"), passthrough, symmetry)
    raw = _is_raw(particles)
    particles = particles if raw.all() else particles.take(raw)
    for what in _ignored(particles):
        logger.warning("%s: %s, which cryoDRGN does not model", file, what)
    make_folder(out)
    write_cryodrgn(out, particles, file)
    said = "cryoisoSign" in particles.results or _column(particles, "cryoisoSign") is not None
    return {
        "particles": len(particles), "left_out": int((~raw).sum()), "box_px": particles.first_group.box_px,
        "pixel_size_A": particles.first_group.pixel_size_A, "sign": int(signs(particles)[0]) if said else 0,
    }  # fmt: skip


def _column(particles: Particles, name: str) -> list[str] | None:
    table = particles.table
    return None if table is None or name not in table.columns else [str(value) for value in table[name].tolist()]


def _is_raw(particles: Particles) -> np.ndarray:
    """(n,) bool: what was recorded; auxiliary particles have served their purpose."""
    column = _column(particles, AUXILIARY)
    return np.ones(len(particles), bool) if column is None else np.array([value != "1" for value in column])


def _ignored(particles: Particles) -> list[str]:
    """What is known of the images and has no place in ctf.pkl."""
    groups = [particles.groups[k] for k in np.unique(particles.optics).tolist()]
    ignored = []
    if any(any(g.beam_tilt_mrad) or any(g.odd_zernike) or any(g.even_zernike) for g in groups):
        ignored.append("beam tilt or higher aberrations")
    if any(g.magnification != (1.0, 0.0, 0.0, 1.0) for g in groups):
        ignored.append("anisotropic magnification")
    if any(g.ctf_applied for g in groups):
        ignored.append("images that were flipped or multiplied by their CTF")
    return ignored
