"""Classification at fixed poses: two states of a phantom, a third of noise, and a clean set with few rare views.

    python classes.py [--only NAME ...] [--published FILE]

States: the phantom trimer (70 %) and the same without one of its three heads (30 %), 48 px of 4.5 Å. The rare-view sets
are those of `particle_sets.py`. Each case runs in this process, with one thread; `oracle` is the same classification
with the true maps as references, one iteration: what the images can tell at most.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness, particle_sets

BOX, PIXEL_A, DIAMETER_A, PARTICLES = 48, 4.5, 150.0, 1500
TOP_DEG = 36.0
RARE_SET = "one_pole_-13"


@dataclass(frozen=True)
class Case:
    """One simulated set."""

    snr_db: float
    minor: float = 0.3
    """Share of the second state."""
    noise: float = 0.0
    """Share of images without a particle; they keep the poses of the particles that they stand for."""
    preferred: bool = False
    """98 % top views."""
    own_share: bool = True
    """Whether an image's own share in the references is taken out."""
    pose_error_deg: float = 0.0
    seed: int = 1


CASES = {
    "two states, -10 dB": Case(-10),
    "two states, -13 dB": Case(-13),
    "two states, -15 dB": Case(-15),
    "two states, -10 dB, own share left in": Case(-10, own_share=False),
    "two states, -13 dB, own share left in": Case(-13, own_share=False),
    "two states, -10 dB, poses 3 degrees off": Case(-10, pose_error_deg=3.0),
    "two states, -10 dB, 98 % top views": Case(-10, preferred=True),
    "two states and a third noise, -10 dB": Case(-10, noise=1 / 3),
    "two states and a third noise, -13 dB": Case(-13, noise=1 / 3),
    "two states and a third noise, -10 dB, 98 % top views": Case(-10, noise=1 / 3, preferred=True),
}


def states() -> tuple[Any, Any]:
    """The trimer, and the trimer without one head, as maps."""
    from cryoiso.physics.phantom import pseudo_atoms_to_map, trimer

    atoms = trimer(1)
    keep = np.ones(len(atoms.coords_A), bool)
    third = len(keep) // 3
    keep[:third] = atoms.coords_A[:third, 2] < 20
    return tuple(
        pseudo_atoms_to_map(*(column[rows] for column in atoms), BOX, PIXEL_A, 2.2 * PIXEL_A)
        for rows in (np.ones(len(keep), bool), keep)
    )  # type: ignore[return-value]


def mixture(case: Case) -> tuple[Any, np.ndarray, tuple[Any, Any]]:
    """Images in memory, the state of each (0, 1; 2 is noise), and the two maps on their grey scale."""
    from cryoiso.io.sources import ArraySource
    from cryoiso.physics.simulation import SimulatedSource, simulate
    from cryoiso.physics.views import Views

    whole, part = states()
    views = Views("preferred", fraction=0.98) if case.preferred else Views()
    first = simulate(
        whole, PARTICLES, snr_db=case.snr_db, views=views, shift_sd_A=4.0, noise="coloured", seed=case.seed
    )
    scale = float(np.vdot(first.volume.data, whole.data) / np.vdot(whole.data, whole.data))
    maps = first.volume, replace(part, data=part.data * np.float32(scale))
    empty = replace(whole, data=np.zeros_like(whole.data))
    kinds = [SimulatedSource(one, first.particles, case.seed, first.spectrum) for one in (*maps, empty)]
    rng = np.random.default_rng(case.seed)
    state = (rng.random(PARTICLES) < case.minor).astype(int)
    state[rng.random(PARTICLES) < case.noise] = 2
    images = np.choose(state[:, None, None], [one.read(np.arange(PARTICLES)) for one in kinds])
    particles = first.particles
    if case.pose_error_deg:
        particles = particles.with_poses(_turned(particles.rotation, case.pose_error_deg, rng), particles.shift_A)
    return ArraySource(images, particles), state, maps


def _turned(rotation: np.ndarray, angle_deg: float, rng: np.random.Generator) -> np.ndarray:
    from cryoiso.physics.so3 import rotvec_to_matrix

    axis = rng.normal(size=(len(rotation), 3))
    return rotvec_to_matrix(axis * (np.radians(angle_deg) / np.linalg.norm(axis, axis=1))[:, None]) @ rotation


def classify(source: Any, folder: Path, symmetry: str = "C1", maps: tuple = (), **settings: Any) -> Any:
    """The model of a finished classification."""
    from cryoiso.core.config import ClassifySection, RefineSection
    from cryoiso.core.protocols import RefineRequest
    from cryoiso.core.types import DensityMap
    from cryoiso.engines import classify as engine
    from cryoiso.parallel.context import Context
    from cryoiso.refine.classes.model import ClassRequest

    pixel, box = source.particles.first_group.pixel_size_A, source.box_px
    base = RefineRequest(
        source, DensityMap(np.zeros((box,) * 3, np.float32), pixel), symmetry, folder,
        RefineSection(solvent_mask=False), seed=1, diameter_A=DIAMETER_A,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    return engine.classify(ClassRequest(base, ClassifySection(**settings), maps), Context())


def accuracy(state: np.ndarray, assigned: np.ndarray) -> float:
    """Share of the particles in the right class, whichever numbers the classes have; particles called junk are wrong,
    noise is not counted."""
    real = state < 2
    right = [(assigned[real] == 1 + (state[real] ^ swap)).mean() for swap in (0, 1)]
    return round(float(max(right)), 4)


def run_case(case: Case, folder: Path) -> dict[str, Any]:
    """One case: accuracy, that of the oracle, and what is said of noise."""
    from cryoiso.refine.classes.iterate import Classification

    source, state, maps = mixture(case)
    leverage = Classification._leverage
    if not case.own_share:
        Classification._leverage = lambda self, model, half: None  # type: ignore[method-assign]
    began = time.process_time()
    try:
        model = classify(source, folder / "found", junk=case.noise > 0)
    finally:
        Classification._leverage = leverage  # type: ignore[method-assign]
    seconds = time.process_time() - began
    oracle = classify(source, folder / "oracle", maps=maps, lowpass_A=2.2 * PIXEL_A, max_iterations=1)
    assigned, junk = model.assigned(case.noise > 0), case.noise > 0
    top = np.abs(source.particles.rotation[:, 2, 2]) > np.cos(np.radians(TOP_DEG))
    last = model.history[-1]
    found = {
        "accuracy": accuracy(state, assigned), "oracle": accuracy(state, oracle.assigned(False)),
        "accuracy_rare": accuracy(state[~top], assigned[~top]) if case.preferred else None,
        "occupancy": last["occupancy"], "resolution_A": last["resolution_A"], "iterations": last["iteration"],
        "cpu_s": round(seconds, 1),
    }  # fmt: skip
    if junk:
        found["junk"] = {"all": junk_numbers(state, assigned)}
        found["junk"] |= {"top": junk_numbers(state[top], assigned[top])}
        found["junk"] |= {"side": junk_numbers(state[~top], assigned[~top])}
        found["junk"] |= {"worst_cones": worst_cones(source, state, assigned)}
    return found


def junk_numbers(state: np.ndarray, assigned: np.ndarray) -> dict[str, Any]:
    """Noise found and particles lost."""
    noise, called = state == 2, assigned == 3
    both = int((noise & called).sum())
    return {
        "noise": int(noise.sum()), "found": both,
        "particles": int((~noise).sum()), "lost": int((called & ~noise).sum()),
        "recall": round(both / max(int(noise.sum()), 1), 4),
        "precision": round(both / max(int(called.sum()), 1), 4),
    }  # fmt: skip


def worst_cones(source: Any, state: np.ndarray, assigned: np.ndarray) -> dict[str, float]:
    """Least recall of noise and most particles lost in any viewing cone with five or more of either."""
    from cryoiso.metrics.view_cones import ViewCones
    from cryoiso.refine.junk import CONE_DEG

    cone = ViewCones.with_step(CONE_DEG).index(source.particles.rotation[:, 2])
    each = [junk_numbers(state[cone == c], assigned[cone == c]) for c in np.unique(cone)]
    return {
        "recall": min((one["recall"] for one in each if one["noise"] >= 5), default=1.0),
        "lost_share": max((one["lost"] / one["particles"] for one in each if one["particles"] >= 5), default=0.0),
    }  # fmt: skip


def rare_views(folder: Path, noise: float) -> dict[str, Any]:
    """Haemagglutinin with 98 % top views and one class beside junk: rare views lost at the true poses, and in a
    refinement from the homologue with ``refine.junk``."""
    from cryoiso.io import read_particle_file
    from cryoiso.io.sources import ArraySource, StackSource
    from cryoiso.physics.noise import colour_noise, noise_spectrum

    one, at = particle_sets.SETS[RARE_SET], folder / "set"
    if not particle_sets.prepared(one, one.seeds[0], at):
        particle_sets.prepare(one, one.seeds[0], harness.SHARED / "data" / "models", at)
    truth = read_particle_file(at / "truth.star")
    images = StackSource(truth).read(np.arange(len(truth)))
    rng = np.random.default_rng(2)
    is_noise = rng.random(len(truth)) < noise
    import torch

    white = rng.standard_normal((int(is_noise.sum()), one.box, one.box)).astype(np.float32)
    if len(white):
        images[is_noise] = colour_noise(torch.from_numpy(white), noise_spectrum(one.box, one.noise)).numpy()
    source = ArraySource(images, truth)
    top = one.preferred.frequent(truth.rotation[:, 2], _operations(one.symmetry))  # type: ignore[union-attr]
    found: dict[str, Any] = {}
    model = classify(source, folder / "fixed", one.symmetry, classes=1, junk=True)
    found["true poses"] = _lost(is_noise, 1 - model.particle > 0.5, top)
    for junk in (False, True):
        found[f"refine, junk = {str(junk).lower()}"] = _refined(source, at, folder, junk, is_noise, top, truth)
    return found


def _refined(source, at: Path, folder: Path, junk: bool, is_noise, top, truth) -> dict[str, Any]:
    from cryoiso.core.config import RefineSection
    from cryoiso.core.protocols import RefineRequest
    from cryoiso.engines.native import NativeEngine
    from cryoiso.io.mrc import read_map
    from cryoiso.metrics.fsc_curve import fsc, resolution_at
    from cryoiso.metrics.pose_error import pose_errors
    from cryoiso.parallel.context import Context

    folder = folder / f"refine-{junk}"
    folder.mkdir(parents=True, exist_ok=True)
    blind = replace(source.particles, rotation=None, shift_A=None)
    images = type(source)(source.read(np.arange(len(truth))), blind)
    began = time.process_time()
    result = NativeEngine().refine(
        RefineRequest(images, read_map(at / "homologue.mrc"), "C3", folder, RefineSection(junk=junk), seed=1), Context()
    )
    seconds = time.process_time() - began
    errors = pose_errors(result.particles.rotation, truth.rotation, "C3", align="axis").errors_deg
    half = [read_map(result.half_maps[h]).data for h in (1, 2)]
    true = read_map(at / "signal_map.mrc")
    wrong = {
        name: round(float((errors[rows & ~is_noise] > 20).mean()), 4) for name, rows in (("top", top), ("side", ~top))
    }
    curve = fsc(half[0] + half[1], true.data)
    facts: dict[str, Any] = {
        "over_20_deg": wrong, "cpu_s": round(seconds, 1), "iterations": len(result.iterations),
        "map_to_truth_A": round(resolution_at(curve, 0.5, true.box_px, true.pixel_size_A), 2),
    }  # fmt: skip
    if junk:
        facts |= _lost(is_noise, result.particles.results["cryoisoJunkProbability"] > 0.5, top)
    return facts


def _operations(symmetry: str) -> np.ndarray:
    from cryoiso.physics.symmetry import point_group

    return point_group(symmetry)


def _lost(is_noise: np.ndarray, called: np.ndarray, top: np.ndarray) -> dict[str, Any]:
    state, assigned = np.where(is_noise, 2, 0), np.where(called, 3, 1)
    return {name: junk_numbers(state[rows], assigned[rows]) for name, rows in (("top", top), ("side", ~top))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="names of cases")
    parser.add_argument("--work", type=Path, help="folder to work in (default: a temporary one)")
    parser.add_argument("--published", type=Path, default=harness.RESULTS / "classes.json")
    given = parser.parse_args()
    rare = {f"{RARE_SET}, {'clean' if not share else 'a fifth noise'}": share for share in (0.0, 0.2)}
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.work or Path(scratch)
        for name in [*CASES, *rare]:
            if given.only and name not in given.only:
                continue
            at = folder / name.replace(" ", "_").replace("%", "percent")
            results[name] = run_case(CASES[name], at) if name in CASES else rare_views(at, rare[name])
            print(name, results[name], flush=True)
    harness.write_json(given.published, {"machine": harness.machine(), "particles": PARTICLES, "cases": results})


if __name__ == "__main__":
    main()
