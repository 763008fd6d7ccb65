"""How often the control `leak` of `cryoiso audit` finds a leak where there is none, and how small a leak it finds.

Many refinements of noise whose half-sets share nothing, as the control makes them but small: CTFs and noise spectrum of
simulated particles, 90 % of whose views are from one end, an initial density of noise for each half-set. Each is judged
as the control judges. Then a share of the power of one half-map is given to the other one, to see what is found.

    python benchmarks/leak_rate.py [--repeats 200]
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness

SHARES = (0.05, 0.1, 0.2)
"""Amplitude of one half-map that is added to the other, as a share of it."""


@dataclass(frozen=True)
class Size:
    """Of one refinement."""

    particles: int = 100
    box: int = 24
    pixel_A: float = 8.0
    snr_db: float = -10
    iterations: int = 4
    symmetry: str = "C3"


def refined(size: Size, seed: int, folder: Path) -> list[np.ndarray]:
    """Both half-maps of noise that share nothing."""
    from cryoiso.core.config import RefineSection
    from cryoiso.core.protocols import RefineRequest
    from cryoiso.core.types import HALVES, DensityMap
    from cryoiso.engines.native import NativeEngine
    from cryoiso.io.mrc import read_map
    from cryoiso.io.sources import ArraySource
    from cryoiso.methods.audit import regions
    from cryoiso.methods.audit.null_images import gaussian
    from cryoiso.parallel.context import Context
    from cryoiso.physics.filters import power_spectrum
    from cryoiso.physics.phantom import phantom_map
    from cryoiso.physics.simulation import simulate
    from cryoiso.physics.views import Views
    from cryoiso.pipeline.inputs.standard_frame import symmetrised

    rows = np.arange(size.particles)
    volume = phantom_map(size.box, size.pixel_A, 2.5 * size.pixel_A)
    views = Views("preferred", fraction=0.9)
    made = simulate(volume, size.particles, snr_db=size.snr_db, views=views, seed=seed, noise="coloured")
    particles = replace(made.particles, half=(rows % 2 + 1).astype(np.int8), rotation=None, shift_A=None)
    spectra = power_spectrum(made.read(rows)).mean(0)[None]
    source = ArraySource(gaussian(particles, rows, spectra, size.box, seed, "leak"), particles)
    starts = {}
    for half in HALVES:
        noise = DensityMap(regions.noise_reference(made.volume.data, seed, half), size.pixel_A)
        even = symmetrised(noise, size.symmetry).data
        starts[half] = DensityMap(regions.with_spectrum_of(even, made.volume.data), size.pixel_A)
    settings = RefineSection(max_iterations=size.iterations, join_halves_A=0.0, solvent_mask=False)
    request = RefineRequest(
        source, made.volume, size.symmetry, folder, settings, seed, half_references=starts, grey_scale=1.0
    )
    result = NativeEngine().refine(request, Context())
    return [read_map(result.half_maps[half]).data for half in HALVES]


def judged(halves: list[np.ndarray], size: Size) -> dict[str, float]:
    """Largest FSC in its standard errors, the sum over all shells, and whether the control would fail."""
    from cryoiso.methods.audit.agreement import independence
    from cryoiso.physics.symmetry import point_group
    from cryoiso.pipeline.audit.controls.leak import TOTAL

    found = independence(halves[0], halves[1], len(point_group(size.symmetry)), size.box // 2 - 1)
    largest = float(found.z.max())
    alarm = largest > found.limit or found.total > TOTAL
    return {"largest": largest, "limit": found.limit, "total": found.total, "alarm": float(alarm),
            "sd": float(found.z.std())}  # fmt: skip


def interval(k: int, n: int) -> tuple[float, float]:
    """95 % interval of a probability, k of n (Clopper and Pearson)."""
    from scipy.stats import beta

    low = 0.0 if k == 0 else float(beta.ppf(0.025, k, n - k + 1))
    return low, 1.0 if k == n else float(beta.ppf(0.975, k + 1, n - k))


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Alarms among all repeats, by size of the leak."""
    n, found = len(rows), {}
    for share in ("0", *(f"{s:g}" for s in SHARES)):
        alarms = int(sum(r[share]["alarm"] for r in rows))
        found[share] = {"alarms": alarms, "of": n, "interval": interval(alarms, n)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=30.0, help="of CPU; a later call goes on with what is there")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "leak_rate.json")
    a = parser.parse_args()
    logging.getLogger("cryoiso").setLevel(logging.ERROR)  # noise ends at the edge of the search for shifts
    size, began = Size(), time.process_time()
    before: dict[str, Any] = json.loads(a.out.read_text()) if a.out.exists() else {"rows": [], "cpu_s": 0.0}
    rows: list[dict[str, Any]] = before["rows"]
    for seed in range(len(rows) + 1, a.repeats + 1):
        if time.process_time() - began > 60 * a.minutes:
            break
        with tempfile.TemporaryDirectory() as folder:
            first, second = refined(size, seed, Path(folder))
        row: dict[str, Any] = {"seed": seed}
        for share in (0.0, *SHARES):
            row[f"{share:g}"] = judged([first, second + share * first * (second.std() / first.std())], size)
        rows.append(row)
    result = {
        "size": asdict(size), "alarms": summary(rows), "rows": rows,
        "cpu_s": before["cpu_s"] + time.process_time() - began, "machine": harness.machine(),
    }  # fmt: skip
    harness.write_json(a.out, result)
    for share, one in result["alarms"].items():
        low, high = (100 * x for x in one["interval"])
        print(f"leak {share}: {one['alarms']} alarms of {one['of']} ({low:.1f} to {high:.1f} %)")
    print(f"standard deviation of FSC over its error: {np.mean([r['0']['sd'] for r in rows]):.2f}")


if __name__ == "__main__":
    main()
