"""A made-up run folder with everything that a report can show of final maps: correction, local resolution, a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter

from cryoiso.core.config import DiagnoseSection
from cryoiso.core.types import DensityMap
from cryoiso.io.mrc import write_map
from cryoiso.methods.assess.measure import diagnose
from cryoiso.pipeline.stages.map_numbers import measure_further

BOX, PIXEL_A = 40, 2.5


def helix_pdb(residues: int = 40) -> str:
    """A helix of alanines about z in the middle of the box, as a PDB file."""
    lines, middle = [], BOX * PIXEL_A / 2
    for i in range(residues):
        for j, (name, radius, turn, rise) in enumerate(
            (("N", 1.55, 0, 0.0), ("CA", 2.3, 28, 0.9), ("C", 1.7, 55, 1.9), ("O", 2.0, 60, 3.1), ("CB", 3.3, 20, 0.3))
        ):
            angle = np.radians(100 * i + turn)
            x, y = middle + radius * np.cos(angle), middle + radius * np.sin(angle)
            z = middle + 1.5 * (i - residues / 2) + rise
            lines.append(
                f"ATOM  {5 * i + j + 1:5d} {name:^4s} ALA A{i + 1:4d}    {x:8.3f}{y:8.3f}{z:8.3f}  1.00 40.00"
                f"          {name[0]:>2s}"
            )
    return "\n".join([*lines, "END"]) + "\n"


def whole_run(folder: Path) -> Path:
    """The folder of the run."""
    from cryoiso.io.models import model_to_map

    made, corrected, out = (folder / name for name in ("04_reconstruct", "05_correct", "06_diagnose"))
    for part in (made, corrected, out):
        part.mkdir(parents=True)
    model = folder / "helix.pdb"
    model.write_text(helix_pdb())
    rng = np.random.default_rng(0)
    truth = model_to_map(model, BOX, PIXEL_A, 6.0).data
    truth /= truth.max()
    halves = [DensityMap((truth + 0.05 * rng.standard_normal(truth.shape)).astype(np.float32), PIXEL_A) for _ in "12"]
    mean = DensityMap((halves[0].data + halves[1].data) / 2, PIXEL_A)
    mask = np.clip(3 * gaussian_filter((truth > 0.05).astype(np.float32), 1.5), 0, 1)
    for name, data in (("half1", halves[0].data), ("half2", halves[1].data), ("map", mean.data), ("mask", mask),
                       ("map_weighted", gaussian_filter(mean.data, 0.6))):  # fmt: skip
        write_map(made / f"{name}.mrc", data, PIXEL_A)
    share = np.broadcast_to(np.clip(np.linspace(-0.5, 1.5, BOX), 0, 1)[:, None, None], truth.shape)
    for name, data in (("corrected_map", gaussian_filter(mean.data, 0.8)), ("measured", share), ("mask", mask)):
        write_map(corrected / f"{name}.mrc", np.ascontiguousarray(data), PIXEL_A)
    facts = {"mode": "independent", "pixel_size_A": PIXEL_A, "resolution_A": 6.0, "filter_mean": 0.8,
             "measured_share_mean": 0.7, "keep_measured": True, "maps": {}}  # fmt: skip
    (corrected / "correct.json").write_text(json.dumps(facts))
    numbers: Any = diagnose(halves[0].data, halves[1].data, mask, PIXEL_A, None, "C1", seed=1)
    section = DiagnoseSection(model=str(model), compare_model=str(model))
    measure_further(numbers, halves[0], halves[1], mask, mean, section, "C1", out)
    (out / "diagnose.json").write_text(json.dumps(numbers))
    (folder / "audit").mkdir()
    control = {"name": "omitted", "title": "region left out", "verdict": "pass", "number": 0.011, "unit": "",
               "interval": [-0.004, 0.026], "details": {"omega": {"all": [0.011, -0.004, 0.026]}}}  # fmt: skip
    (folder / "audit" / "audit.json").write_text(json.dumps({"controls": [control]}))
    (folder / "resolved.toml").write_text('[run]\ntitle = "a helix"\nworkflow = "realign"\n')
    return folder
