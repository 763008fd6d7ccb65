"""Poses and CTFs of a set in a numpy archive (``.npz``), the layout in which cryoDRGN and recovar keep them."""

from __future__ import annotations

import zipfile

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.types import OpticsGroup, Particles

CTF_COLUMNS = 9
"""Box, Å per pixel, defocus U, V (Å) and angle (degrees), kV, Cs (mm), amplitude contrast, phase shift (degrees)."""


def read_pose_archive(path: object, require: tuple[str, ...] = ("pose",)) -> Particles:
    """Particles without images of an archive with ``rotation`` (n, 3, 3) and, for "ctf", ``ctf`` (n, 9).

    The third row of a rotation is the view, as in this package. Shifts are left out.

    Raises:
        InputError: unreadable, an array that is not there or of another shape, rotations that are none.
    """
    arrays = _arrays(path)
    n = len(arrays["rotation"]) if "rotation" in arrays else len(arrays.get("ctf", ()))
    wanted = {"pose": ("rotation", (n, 3, 3)), "ctf": ("ctf", (n, CTF_COLUMNS))}
    for what in require:
        name, shape = wanted[what]
        found_shape = arrays[name].shape if name in arrays else "no such array"
        if found_shape != shape or not n:
            raise InputError(
                f"wrong array '{name}'",
                file=path,
                expected=f"shape {shape}, at least 1 row",
                found=found_shape,
                code="arrays-do-not-fit",
            )
    rotation = arrays.get("rotation")
    if rotation is not None and np.abs(rotation @ rotation.transpose(0, 2, 1) - np.eye(3)).max() > 1e-3:
        raise InputError(
            "not all of 'rotation' are rotations", file=path, expected="orthonormal matrices", code="value-out-of-range"
        )
    ctf = arrays.get("ctf", np.full((n, CTF_COLUMNS), np.nan))
    groups, optics = _groups(ctf)
    return Particles(
        uid=np.arange(n, dtype=np.uint64), optics=optics, groups=groups, stack=np.full(n, ""),
        index=np.full(n, -1, np.int64), defocus_u_A=ctf[:, 2], defocus_v_A=ctf[:, 3], defocus_angle_deg=ctf[:, 4],
        phase_shift_deg=ctf[:, 8], ctf_bfactor_A2=np.zeros(n), ctf_scale=np.ones(n), rotation=rotation,
        shift_A=None if rotation is None else np.zeros((n, 2)),
    )  # fmt: skip


def _arrays(path: object) -> dict[str, np.ndarray]:
    try:
        with np.load(str(path), allow_pickle=False) as archive:
            arrays = {name: np.asarray(archive[name], np.float64) for name in ("rotation", "ctf") if name in archive}
    except FileNotFoundError:
        raise InputError("no such file", file=path, code="file-not-found") from None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(
            f"not a readable archive: {error}", file=path, expected="a .npz file of numbers", code="file-unreadable"
        ) from None
    if not all(np.isfinite(a).all() for a in arrays.values()):
        raise InputError("the archive holds values that are no numbers", file=path, code="value-not-a-number")
    return arrays


def _groups(ctf: np.ndarray) -> tuple[tuple[OpticsGroup, ...], np.ndarray]:
    """One optics group for each set of pixel size, box, voltage, Cs and amplitude contrast."""
    values, of = np.unique(ctf[:, [0, 1, 5, 6, 7]], axis=0, return_inverse=True)
    groups = [
        OpticsGroup(i, f"opticsGroup{i}", pixel, 0 if np.isnan(box) else int(box), voltage, cs, contrast)
        for i, (box, pixel, voltage, cs, contrast) in enumerate(values.tolist(), 1)
    ]
    return tuple(groups), of.reshape(-1).astype(np.int32)
