"""Writes ``Particles`` as cryoSPARC particle files: the fields of the slots blob, ctf and alignments3D.

What a .cs file has no place for is refused here (``require_expressible``); what it has and ``Particles`` has not gets
the value that cryoSPARC gives to imported particles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cryoiso.core.errors import InputError, MissingError
from cryoiso.core.types import OpticsGroup, Particles
from cryoiso.io import conventions
from cryoiso.io.atomic import atomic_path, atomic_write
from cryoiso.io.cs_groups import NAME
from cryoiso.io.imagenames import parse_image_names

FITS = {
    "error": 0.0, "error_min": 0.0, "resid_pow": 0.0, "slice_pow": 0.0, "image_pow": 0.0, "cross_cor": 0.0,
    "alpha": 1.0, "alpha_min": 0.0, "weight": 0.0, "pose_ess": 0.0, "shift_ess": 0.0, "class_posterior": 1.0,
    "class_ess": 1.0,
}  # fmt: skip
"""Fields of alignments3D that say how a particle fitted a reference, and their values where nothing is known."""
UNKNOWN_HERE = "--unconverted carry converts the rest; this stays in the file's side table, for the way back."


def require_pixel_sizes(particles: Particles, file: object) -> None:
    """
    Raises:
        InputError: an optics group has no pixel size, without which cryoSPARC takes no particles.
    """
    if np.isnan(particles.group_values("pixel_size_A")).any():
        raise InputError(
            "no pixel size", file=file, code="pixel-size-missing",
            expected="_rlnImagePixelSize in the table of optics groups, or _rlnMagnification and _rlnDetectorPixelSize",
        )  # fmt: skip


def require_expressible(particles: Particles, file: object) -> None:
    """
    Raises:
        InputError: aberrations or flags of images that a .cs file has no known place for.
    """
    for group in particles.groups:
        for name, coefficients in (("rlnOddZernike", group.odd_zernike), ("rlnEvenZernike", group.even_zernike)):
            if any(coefficients):
                raise InputError(
                    f"_{name} of optics group {group.number} cannot be converted", file=file,
                    expected="no aberrations but beam tilt and magnification", found=f"{coefficients}"[:80],
                    hint="The units and signs of cryoSPARC's ctf/shift_A, trefoil_A and tetra_A are not public. "
                    f"{UNKNOWN_HERE} Run cryoSPARC's Global CTF Refinement there.",
                    code="not-convertible",
                )  # fmt: skip
        if group.ctf_applied:
            raise InputError(
                f"the images of optics group {group.number} are {group.ctf_applied}, which a .cs file cannot say",
                file=file, expected="images as recorded", hint=UNKNOWN_HERE, code="not-convertible",
            )  # fmt: skip


def fields_of_particles(particles: Particles, file: object = None) -> np.ndarray:
    """(n,) structured array with the fields of a .cs file.

    Poses are taken as they are: those of Dn with odd n must be in cryoSPARC's frame (``conventions``).

    Args:
        particles: with image names; beyond them only what is there is written.
        file: where they come from, for messages.

    Raises:
        InputError: no image names or pixel size, or half-sets of some particles only.
    """
    require_pixel_sizes(particles, file)
    columns: dict[str, np.ndarray] = {"uid": particles.uid.astype("<u8")}
    columns |= _images(particles, file)
    if not np.isnan(particles.defocus_u_A + particles.defocus_v_A).any():
        columns |= _ctf(particles)
    if particles.rotation is not None:
        columns |= _alignments(particles, file)
    micrographs = _text_column(particles, "rlnMicrographName")
    if micrographs is not None:
        columns["location/micrograph_path"] = np.array([name.encode() for name in micrographs])
    return structured(columns)


def structured(columns: dict[str, np.ndarray]) -> np.ndarray:
    """One array of rows from columns (n, ...)."""
    out = np.zeros(len(next(iter(columns.values()))), [(k, v.dtype, v.shape[1:]) for k, v in columns.items()])
    for name, values in columns.items():
        out[name] = values
    return out


def write_fields(path: object, rows: np.ndarray, *, csdat: bool = False) -> None:
    """Writes a .cs file atomically: NumPy's format, or cryoSPARC's compressed CSDAT.

    Raises:
        MissingError: CSDAT without cryosparc-tools.
        DiskFullError: no space.
    """
    if not csdat:
        with atomic_write(path) as stream:
            np.lib.format.write_array(stream, rows, allow_pickle=False)
        return
    try:
        from cryosparc.dataset import CSDAT_FORMAT, Dataset
    except ImportError:
        raise MissingError(
            "the format CSDAT needs cryosparc-tools: pip install cryosparc-tools", code="program-missing"
        ) from None
    save: Callable[..., Any] = Dataset(rows).save
    with atomic_path(path) as part:
        save(str(part), format=CSDAT_FORMAT)


def exposure_group(group: OpticsGroup) -> int:
    """The number of the exposure group that an optics group came from, else its own."""
    number = group.name.removeprefix(NAME)
    return int(number) if number != group.name and number.isascii() and number.isdigit() else group.number


def image_names(particles: Particles, file: object) -> tuple[list[str], np.ndarray]:
    """Stacks as the source names them, and (n,) index of the image in each, from 0.

    Raises:
        InputError: the source names no images.
    """
    names = _text_column(particles, "rlnImageName")
    if names is None:
        raise InputError("a column is missing", file=file, expected="_rlnImageName", code="star-column-missing")
    return parse_image_names(names, file)


def signs(particles: Particles) -> np.ndarray:
    """(n,) int: -1 where protein is dark in the images, 1 where it is bright or nothing is known (RELION's images)."""
    sign = particles.results.get("cryoisoSign")
    if sign is None:
        text = _text_column(particles, "cryoisoSign")
        sign = None if text is None else np.array([-1 if value.strip().startswith("-") else 1 for value in text])
    return np.ones(len(particles), np.int64) if sign is None else np.asarray(sign, np.int64)


def classes(particles: Particles) -> np.ndarray | None:
    """(n,) number of each particle's class, from 0; None: no column of whole numbers from 1."""
    text = _text_column(particles, "rlnClassNumber")
    if text is None or not all(value.isascii() and value.isdigit() and int(value) > 0 for value in text):
        return None
    return np.array([int(value) - 1 for value in text], np.int64)


def _text_column(particles: Particles, name: str) -> list[str] | None:
    table = particles.table
    return None if table is None or name not in table.columns else [str(value) for value in table[name].tolist()]


def _images(particles: Particles, file: object) -> dict[str, np.ndarray]:
    names, index = image_names(particles, file)
    out: dict[str, np.ndarray] = {
        "blob/path": np.array([name.encode("utf-8", "surrogateescape") for name in names]),
        "blob/idx": index.astype("<u4"),
    }
    box = particles.group_values("box_px")
    if (box > 0).all():
        out["blob/shape"] = np.stack([box, box], 1).astype("<u4")
    out["blob/psize_A"] = particles.group_values("pixel_size_A").astype("<f4")
    out["blob/sign"] = signs(particles).astype("<f4")
    out["blob/import_sig"] = np.zeros(len(particles), "<u8")
    return out


def _ctf(particles: Particles) -> dict[str, np.ndarray]:
    n, value = len(particles), particles.group_values
    out: dict[str, np.ndarray] = {
        "ctf/type": np.full(n, b"imported"),
        "ctf/exp_group_id": np.array([exposure_group(g) for g in particles.groups], "<u4")[particles.optics],
    }
    spherical = value("spherical_aberration_mm")
    numbers: dict[str, np.ndarray] = {
        "accel_kv": value("voltage_kV"),
        "cs_mm": spherical,
        "amp_contrast": value("amplitude_contrast"),
        "df1_A": particles.defocus_u_A,
        "df2_A": particles.defocus_v_A,
        "df_angle_rad": np.radians(particles.defocus_angle_deg),
        "phase_shift_rad": np.radians(particles.phase_shift_deg),
        "scale": particles.ctf_scale,
        "scale_const": np.zeros(n),
        "shift_A": np.zeros((n, 2)),
        "tilt_A": conventions.beam_tilt_to_A(group_vectors(particles, "beam_tilt_mrad"), np.nan_to_num(spherical)),
        "trefoil_A": np.zeros((n, 2)),
        "tetra_A": np.zeros((n, 4)),
        "anisomag": conventions.anisomag_of_magnification(group_vectors(particles, "magnification")),
        "bfactor": particles.ctf_bfactor_A2,
    }
    return out | {f"ctf/{name}": v.astype("<f4") for name, v in numbers.items() if np.isfinite(v).all()}


def group_vectors(particles: Particles, name: str) -> np.ndarray:
    """(n, k): a value of k numbers of each particle's optics group."""
    vectors: np.ndarray = np.array([getattr(g, name) for g in particles.groups], np.float64)[particles.optics]
    return vectors


def _alignments(particles: Particles, file: object) -> dict[str, np.ndarray]:
    n = len(particles)
    rotation, shift_A = particles.require_poses(file)
    pixel = particles.group_values("pixel_size_A")
    number = classes(particles)
    out = {
        "split": _split(particles, file).astype("<u4"),
        "shift": (shift_A / pixel[:, None]).astype("<f4"),
        "pose": conventions.matrix_to_rotvec(rotation).astype("<f4"),
        "psize_A": pixel.astype("<f4"),
        **{name: np.full(n, value, "<f4") for name, value in FITS.items()},
        "class": (np.zeros(n) if number is None else number).astype("<u4"),
    }
    return {f"alignments3D/{name}": values for name, values in out.items()}


def _split(particles: Particles, file: object) -> np.ndarray:
    half = particles.half
    if half is None or not half.any():
        return np.zeros(len(particles), np.int64)
    bad = np.flatnonzero(half == 0)
    if len(bad):
        raise InputError(
            "no half-set", file=file, row=int(bad[0]) + 1, expected="1 or 2 in _rlnRandomSubset, as in other rows",
            found=0, hint="Remove these particles, or the column.", code="half-set-missing",
        )  # fmt: skip
    return half.astype(np.int64) - 1
