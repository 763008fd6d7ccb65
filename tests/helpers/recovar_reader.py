"""Reads a hand-over with recovar's own loaders, in an environment that has recovar, and prints what it got as JSON.

Not imported by tests, but run: recovar pins libraries in versions of its own, so it has an environment of its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def main(folder: Path) -> None:
    from recovar.data_io import cryoem_dataset, halfsets

    star = str(folder / "particles.star")
    pickles = {"poses_file": str(folder / "poses.pkl"), "ctf_file": str(folder / "ctf.pkl")}
    found: dict[str, Any] = {}
    for name, files in (("pickles", pickles), ("star", {})):
        data = cryoem_dataset.load_dataset(star, lazy=False, **files)
        found[name] = {
            "n": int(data.n_images), "box": int(data.grid_size), "voxel_A": float(data.voxel_size),
            "rotation": np.asarray(data.rotation_matrices).tolist(),
            "shift_px": np.asarray(data.translations).tolist(),
            "ctf": np.asarray(data.CTF_params).tolist(),
        }  # fmt: skip
    halves = halfsets._read_relion_halfsets_from_star(star)[0]
    found["halves"] = None if halves is None else [half.tolist() for half in halves]
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
