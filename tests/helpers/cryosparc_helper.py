"""Requests for a refinement in the stand-in for cryoSPARC."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cryosparc.tools")
import cryosparc_stand_in as stand_in

from cryoiso.core.config import CryosparcSection, RefineSection
from cryoiso.core.protocols import RefineRequest
from cryoiso.io import read_map, read_particles
from cryoiso.io.conventions import to_cryosparc_frame
from cryoiso.io.mrc import write_map
from cryoiso.io.sources import StackSource


def truth_of(data: Path) -> Callable[..., Any]:
    truth = read_particles(data / "truth.star", "", ("pose",))

    def refine(rows: np.ndarray, root: Path, job: Any, source: dict[str, Any]) -> Any:
        given = stand_in.particles_of(rows, root)
        place = {uid: i for i, uid in enumerate(truth.uid.tolist())}
        at = [place.get(uid, place.get(uid - 1)) for uid in given.uid.tolist()]  # an auxiliary one beside each
        rotation = to_cryosparc_frame(truth.rotation[at], job.params["refine_symmetry"])
        posed = given.with_poses(rotation, truth.shift_A[at]).take(np.arange(len(given))[::-1])
        volume, maps = read_map(root / source["volume"]["map/path"][0]), {}
        for half in (1, 2):
            noise = np.random.default_rng(half).normal(0, volume.data.std(), volume.data.shape)
            maps[half] = root / f"noisy{half}.mrc"
            write_map(maps[half], volume.data + noise.astype(np.float32), volume.pixel_size_A)
        return posed, maps

    return refine


def request(data: Path, out: Path, more: dict[str, Any] | None = None, **fields: Any) -> RefineRequest:
    out.mkdir(exist_ok=True)
    section = CryosparcSection(project="P1", workspace="W1", poll_s=0.001, **(more or {}))
    settings = RefineSection(engine="cryosparc", max_iterations=2, healpix_order=1, padding=1)
    options = {"symmetry": "C3", "settings": settings, "diameter_A": 140.0, "lowpass_A": 20.0, **fields}
    source = StackSource(read_particles(data / "particles.star"))
    return RefineRequest(source, read_map(data / "truth_map.mrc"), folder=out, program=section, **options)


def ledger_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "cryosparc/round-01/cryosparc.json").read_text())


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
