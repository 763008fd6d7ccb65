"""How alike homologues are, by resolution: what may be asked of a first reference.

Haemagglutinins, each fitted into the density of 6WXB (C3, 96 px of 2.2 Å), as `cryoiso reference --fit` does. The
correlation is that of the control `reference` (`cryoiso audit`) with a noiseless map: shells from the first reference's
low-pass filter to half of it, in Å, in a sphere around the particle.

    python benchmarks/homologues.py [--models 1ti8,2ibx] [--work FOLDER]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness

TRUTH, SYMMETRY, BOX, PIXEL_A = "6wxb", "C3", 96, 2.2
MODELS = ("9cxu", "5hmg", "4fnk", "6xpo", "2ypg", "1ti8", "2ibx")
LOWPASS_A = (40.0, 30.0, 25.0, 20.0, 15.0, 12.0, 10.0)
TO_LIMIT_A = (20.0, 15.0)


def density(model: str, shared: Path, work: Path) -> np.ndarray:
    """The map of a model, fitted into that of the truth; what is there stays."""
    from cryoiso.io.mrc import read_map

    out = work / f"{model}.mrc"
    if not out.exists():
        fit = () if model == TRUTH else ("--fit", work / f"{TRUTH}.mrc")
        harness.cryoiso(
            "reference", shared / f"data/models/ha/{model}.pdb.gz", out, "--box", BOX, "--pixel-size", PIXEL_A,
            "--lowpass", 0, "--symmetry", SYMMETRY, *fit, log=out.with_suffix(".log"),
        )  # fmt: skip
    return np.asarray(read_map(out).data)


def correlation(truth: np.ndarray, other: np.ndarray, lowpass_A: float, finest_A: float, diameter_A: float) -> float:
    """Of two maps between two resolutions, as the control measures it."""
    from cryoiso.methods.audit.confirmed import BandGrid, agreement
    from cryoiso.methods.audit.likeness import Band
    from cryoiso.metrics.fsc_curve import fsc

    band = Band.beyond(lowpass_A, finest_A, BOX, PIXEL_A)
    grid = BandGrid.of(band, BOX, PIXEL_A)
    curve = fsc(grid.take(truth, PIXEL_A), grid.take(other, PIXEL_A), grid.sphere(diameter_A))
    return agreement(curve, np.ones_like(curve), band)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--shared", type=Path, default=harness.SHARED, help="holds data/models (default ../shared)")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "homologues.json")
    parser.add_argument("--work", type=Path, help="keep the maps here")
    a = parser.parse_args()
    bands = [*((lowpass, lowpass / 2) for lowpass in LOWPASS_A), TO_LIMIT_A]
    with harness.work_folder(a.work) as work:
        truth = density(TRUTH, a.shared, work)
        found = {
            model: [correlation(truth, density(model, a.shared, work), *band, 158.0) for band in bands]
            for model in a.models.split(",")
        }
    harness.write_json(a.out, {"machine": harness.machine(), "bands_A": bands, "correlation": found})
    head = ["model", *(f"{first:g}-{last:g} Å" for first, last in bands)]
    print(harness.markdown(head, [[model, *(f"{value:.2f}" for value in values)] for model, values in found.items()]))


if __name__ == "__main__":
    main()
