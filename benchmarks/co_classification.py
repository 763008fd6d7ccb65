"""Classification of particles with uneven views, alone and together with auxiliary particles of even views.

Two states of the phantom (`classes.py`), 98 % top views, at the true poses. The auxiliary particles are as many
projections of the first state, low-passed at 15 Å, with noise of the particles' spectrum and even views: what
`cryoiso auxiliary generate` makes without a network from a perfect homologue of one of the states.

    python benchmarks/co_classification.py [--seeds 1,2,3] [--snr -10,-13]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness
from benchmarks.classes import DIAMETER_A, PARTICLES, PIXEL_A, TOP_DEG, Case, accuracy, mixture

LOWPASS_A = 15.0


def auxiliaries(maps: tuple[Any, Any], snr_db: float, seed: int) -> Any:
    """Images of the first state in memory, with even views."""
    from cryoiso.io.sources import ArraySource
    from cryoiso.physics.filters import lowpass
    from cryoiso.physics.simulation import SimulatedSource, simulate

    made = simulate(maps[0], PARTICLES, snr_db=snr_db, noise="coloured", seed=seed + 1000)
    coarse = replace(maps[0], data=np.asarray(lowpass(maps[0].data, PIXEL_A, LOWPASS_A), np.float32))
    particles = replace(made.particles, uid=made.particles.uid + np.uint64(1 << 40))
    # simulate sets the grey scale for its own signal-to-noise ratio; that of the raw particles is kept
    images = SimulatedSource(coarse, made.particles, seed + 1000, made.spectrum).read(np.arange(PARTICLES))
    return ArraySource(images, particles)


def classify(source: Any, folder: Path, more: Any = None) -> tuple[np.ndarray, float, int]:
    """Class of each particle, CPU seconds, iterations."""
    from cryoiso.core.config import ClassifySection, RefineSection
    from cryoiso.core.protocols import RefineRequest
    from cryoiso.core.types import DensityMap
    from cryoiso.engines import classify as engine
    from cryoiso.parallel.context import Context
    from cryoiso.pipeline.stages.engines import class_request

    grid = DensityMap(np.zeros((source.box_px,) * 3, np.float32), PIXEL_A)
    settings = RefineSection(solvent_mask=False)
    base = RefineRequest(source, grid, "C1", folder, settings, seed=1, diameter_A=DIAMETER_A)
    folder.mkdir(parents=True)
    began = time.process_time()
    model = engine.classify(class_request(base, ClassifySection(), (), more), Context())
    return model.assigned(False)[: len(source.particles)], time.process_time() - began, len(model.history)


def run_case(snr_db: float, seed: int, folder: Path) -> list[dict[str, Any]]:
    source, state, maps = mixture(Case(snr_db, preferred=True, seed=seed))
    rare = np.abs(source.particles.rotation[:, 2, 2]) <= np.cos(np.radians(TOP_DEG))
    records = []
    for name, more in (("raw alone", None), ("raw and auxiliary", auxiliaries(maps, snr_db, seed))):
        assigned, seconds, iterations = classify(source, folder / name.replace(" ", "_"), more)
        swap = int((assigned == 1 + state).mean() < 0.5)
        right = assigned == 1 + (state ^ swap)
        records.append({
            "snr_db": snr_db, "seed": seed, "particles": name, "accuracy": accuracy(state, assigned),
            "rare": int(rare.sum()), "rare_right": int(right[rare].sum()),
            "minor_found": round(float(right[state == 1].mean()), 4), "iterations": iterations,
            "cpu_s": round(seconds, 1),
        })  # fmt: skip
        print(records[-1], flush=True)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--snr", default="-10,-13")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "co_classification.json")
    a = parser.parse_args()
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for snr in a.snr.split(","):
            for seed in a.seeds.split(","):
                records += run_case(float(snr), int(seed), Path(scratch) / f"{snr}_{seed}")
    harness.write_json(a.out, {"machine": harness.machine(), "particles": PARTICLES, "records": records})


if __name__ == "__main__":
    main()
