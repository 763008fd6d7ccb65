"""Small cryoSPARC tables, and their files."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def table(n: int = 4, **fields: np.ndarray) -> np.ndarray:
    spec = {
        "uid": np.arange(n, dtype="u8") + 10,
        "blob/path": np.array([b">J1/a.mrc", b">J1/b.mrc"] * (n // 2)),
        "blob/idx": np.arange(n, dtype="u4"),
        "blob/psize_A": np.array([1.5, 3.0] * (n // 2), "f4"),
        "blob/shape": np.full((n, 2), 64, "u4"),
        "ctf/exp_group_id": np.array([5, 2] * (n // 2), "u4"),
        "ctf/accel_kv": np.full(n, 300, "f4"),
        "ctf/cs_mm": np.array([2.7, 2.0] * (n // 2), "f4"),
        "ctf/amp_contrast": np.full(n, 0.1, "f4"),
        "ctf/df1_A": np.linspace(1e4, 2e4, n).astype("f4"),
        "ctf/df2_A": np.linspace(1e4, 2e4, n).astype("f4"),
        "ctf/df_angle_rad": np.zeros(n, "f4"),
        **fields,
    }
    spec = {k: v for k, v in spec.items() if v is not None}
    out = np.zeros(n, [(k, v.dtype, v.shape[1:]) for k, v in spec.items()])
    for k, v in spec.items():
        out[k] = v
    return out


def save(path: Path, array: np.ndarray) -> Path:
    with open(path, "wb") as stream:
        np.save(stream, array)
    return path
