"""The micelle of TRPV1: how well it is recovered, and what a reference with it is worth to the next refinement.

TRPV1 (7L2I) in a synthetic nanodisc, C4, 48 px of 4 Å. First the recovery from true and from slightly wrong poses at
several signal-to-noise ratios. Then, from a relative of the protein (the model's density twisted by 12 degrees from end
to end and 3 % wider, at 10 Å): a refinement from it, the micelle from the poses of that refinement, a refinement from
the composite, and, as the limit of what any reference can do, one from the true map.

    python benchmarks/micelle.py
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks import harness

BOX, PIXEL_A, SYMMETRY, DIAMETER_A = 48, 4.0, "C4", 160.0
MODEL = harness.SHARED / "data" / "models" / "7l2i.cif.gz"
TWIST_DEG, WIDER, RELATIVE_A = 12.0, 1.03, 10.0
SEED = 5


@dataclass(frozen=True)
class Case:
    """A particle set for the second part."""

    name: str
    particles: int
    snr_db: float
    mode: str


CASES = (
    Case("uniform views", 600, -16.0, "uniform"),
    Case("90 % top and bottom views", 600, -13.0, "preferred"),
)


def truth() -> tuple[Any, Any, Any]:
    """Protein, protein in its nanodisc, nanodisc alone."""
    from cryoiso.io.models import model_to_map
    from cryoiso.physics.detergent_belt import Belt, in_detergent

    belt = Belt(centre_z_A=-26.0, radius_A=68.0, half_thickness_A=24.0, shell_density=0.8, core_density=0.3)
    protein = model_to_map(MODEL, BOX, PIXEL_A, 8.0, align_symmetry_axis=SYMMETRY)
    return protein, *in_detergent(protein, belt)


def relative(protein: Any) -> Any:
    """A homologue in the same frame: twisted about the symmetry axis, wider, and at low resolution."""
    from scipy.ndimage import map_coordinates

    from cryoiso.physics.filters import lowpass

    z, y, x = (axis.astype(float) - BOX // 2 for axis in np.indices((BOX,) * 3))
    angle = np.radians(TWIST_DEG) * z * PIXEL_A / 100.0
    c, s = np.cos(angle) / WIDER, np.sin(angle) / WIDER
    data = map_coordinates(protein.data, np.stack([z, s * x + c * y, c * x - s * y]) + BOX // 2, order=3)
    return replace(protein, data=np.asarray(lowpass(data.astype(np.float32), PIXEL_A, RELATIVE_A), np.float32))


def images_of(whole: Any, n: int, snr_db: float, mode: str = "uniform") -> Any:
    """The set in memory, with the scale of its images in ``scale``."""
    from cryoiso.io.sources import ArraySource
    from cryoiso.physics.simulation import simulate
    from cryoiso.physics.views import Views

    views = Views(mode, poles=2) if mode == "preferred" else Views(mode)
    made = simulate(whole, n, snr_db=snr_db, shift_sd_A=4.0, seed=SEED, views=views)
    source = ArraySource(made.read(np.arange(n)), made.particles)
    return source, made.volume


def with_poses(source: Any, rotation: np.ndarray, shift_A: np.ndarray) -> Any:
    from cryoiso.io.sources import ArraySource

    return ArraySource(source.read(np.arange(len(source.particles))), source.particles.with_poses(rotation, shift_A))


def solve(source: Any, homologue: Any) -> tuple[Any, Any]:
    """Recovery and mask."""
    from cryoiso.methods.micelle.protein import protein_mask
    from cryoiso.methods.micelle.recover import MicelleSettings, recover_micelle_halves
    from cryoiso.parallel.context import Context

    mask = protein_mask(homologue)
    settings = MicelleSettings(SYMMETRY)
    return recover_micelle_halves(source, source.particles, homologue, mask, Context(), settings), mask


def correlations(found: Any, mask: Any, *truths: np.ndarray) -> list[float]:
    """Of the mean micelle with each truth, at 20 Å outside the mask."""
    from cryoiso.physics.filters import lowpass
    from cryoiso.physics.masks import sphere_mask

    where = (mask.data < 0.5) & (np.asarray(sphere_mask(BOX, BOX / 2 - 3)) > 0.5)

    def at_20(volume: np.ndarray) -> np.ndarray:
        return np.asarray(lowpass(volume.astype(np.float32), PIXEL_A, 20.0))[where]

    mean = at_20(0.5 * (found.halves[1].micelle + found.halves[2].micelle))
    return [round(float(np.corrcoef(mean, at_20(t))[0, 1]), 4) for t in truths]


def recovery(n: int = 600) -> list[dict[str, Any]]:
    """Part one."""
    from cryoiso.physics.so3 import rotvec_to_matrix

    protein, whole, detergent = truth()
    rows = []
    for snr_db in (-8.0, -12.0, -16.0):
        source, scaled = images_of(whole, n, snr_db)
        p, rng = source.particles, np.random.default_rng(1)
        for error_deg, error_A in ((0.0, 0.0), (5.0, 2.0)):
            turn = rotvec_to_matrix(rng.normal(0, np.radians(error_deg) / np.sqrt(3), (n, 3)))
            seen = with_poses(source, turn @ p.rotation, p.shift_A + rng.normal(0, error_A, (n, 2)))
            started = time.process_time()
            found, mask = solve(seen, protein)
            seconds = time.process_time() - started
            outside = (1 - mask.data) * whole.data
            of_detergent, of_all = correlations(found, mask, detergent.data, outside)
            last = found.halves[1].history[-1]
            rows.append({
                "particles": n, "snr_dB": snr_db, "pose_error_deg": error_deg, "shift_error_A": error_A,
                "correlation_with_detergent": of_detergent, "correlation_with_all_outside": of_all,
                "grey_scale": found.halves[1].grey_scale / float(scaled.data.std() / whole.data.std()),
                "iterations": last["iteration"], "residual": last["residual"], "cpu_s": round(seconds, 2),
            })  # fmt: skip
    return rows


def refine(source: Any, reference: Any, iterations: int) -> Any:
    from cryoiso.core.config import RefineSection
    from cryoiso.core.protocols import RefineRequest
    from cryoiso.engines.native import NativeEngine
    from cryoiso.io.sources import ArraySource
    from cryoiso.parallel.context import Context

    p = replace(source.particles, rotation=None, shift_A=None)
    blind = ArraySource(source.read(np.arange(len(p))), p)
    with tempfile.TemporaryDirectory(prefix="cryoiso-benchmark-") as folder:
        request = RefineRequest(
            blind, reference, SYMMETRY, Path(folder), RefineSection(max_iterations=iterations), seed=1,
            diameter_A=DIAMETER_A,
        )  # fmt: skip
        return NativeEngine().refine(request, Context()).particles


def next_refinement(case: Case, iterations: int = 8) -> dict[str, Any]:
    """Part two: pose errors from three references."""
    from cryoiso.metrics.pose_error import pose_errors
    from cryoiso.pipeline.stages.micelle import composite_reference

    protein, whole, detergent = truth()
    homologue = relative(protein)
    source, scaled = images_of(whole, case.particles, case.snr_db, case.mode)
    true = source.particles.rotation

    def errors(particles: Any) -> dict[str, float]:
        found = pose_errors(particles.rotation, true, SYMMETRY, align="axis")
        return {"median_deg": found.median_deg, **{f"over_{d}": found.fraction_over(d) for d in (10, 20)}}

    started = time.process_time()
    first = refine(source, homologue, iterations)
    found, mask = solve(with_poses(source, first.rotation, first.shift_A), homologue)
    data = np.mean([composite_reference(found.halves[h], homologue, mask) for h in (1, 2)], axis=0)
    composite = replace(homologue, data=data.astype(np.float32))
    after = refine(source, composite, iterations)
    limit = refine(source, scaled, iterations)
    return {
        "case": case.name, "particles": case.particles, "snr_dB": case.snr_db,
        "correlation_with_detergent": correlations(found, mask, detergent.data)[0],
        "homologue": errors(first), "composite": errors(after), "true map": errors(limit),
        "first iteration": {
            "homologue": errors(refine(source, homologue, 1)), "composite": errors(refine(source, composite, 1)),
        },
        "cpu_s": round(time.process_time() - started, 1),
    }  # fmt: skip


def report(result: dict[str, Any]) -> str:
    """Markdown tables."""
    head = ["SNR, dB", "pose error, °", "shift error, Å", "correlation, detergent", "correlation, all outside",
            "grey scale", "iterations", "CPU s"]  # fmt: skip
    rows = [[f"{r['snr_dB']:g}", f"{r['pose_error_deg']:g}", f"{r['shift_error_A']:g}",
             f"{r['correlation_with_detergent']:.3f}", f"{r['correlation_with_all_outside']:.3f}",
             f"{r['grey_scale']:.3f}", r["iterations"], f"{r['cpu_s']:.1f}"] for r in result["recovery"]]  # fmt: skip
    tables = [harness.markdown(head, rows)]
    head = ["set", "reference", "median error, °", "over 10°", "over 20°", "correlation, detergent"]
    rows = []
    for r in result["next_refinement"]:
        for when, found in (("", r), (", first iteration", r["first iteration"])):
            for name in ("homologue", "composite", "true map"):
                if name in found:
                    e = found[name]
                    rows.append([f"{r['case']}, {r['snr_dB']:g} dB", name + when, f"{e['median_deg']:.1f}",
                                 f"{e['over_10']:.3f}", f"{e['over_20']:.3f}",
                                 f"{r['correlation_with_detergent']:.3f}"])  # fmt: skip
    return "\n\n".join([*tables, harness.markdown(head, rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=harness.RESULTS / "micelle.json")
    a = parser.parse_args()
    if not MODEL.is_file():
        harness.skip(f"no model at {MODEL}")
        return
    result = {"machine": harness.machine(), "recovery": recovery()}
    result["next_refinement"] = [next_refinement(case) for case in CASES]
    harness.write_json(a.json, result)
    print(report(result))


if __name__ == "__main__":
    main()
