"""Does the reference speak in the result? Controls of the workflow `auxiliary`, on simulated haemagglutinin.

noise      particles of pure noise (coloured as the others) with the homologue for reference: how much the result
           resembles the reference, beside `refine` of the same noise without auxiliary particles (the matched control)
omitted    the reference lacks the membrane-proximal third of the trimer: does the result have it, as the data do?
added      the reference has a ball that the data have not: is it gone from the result?

Density in a part is given as a fraction of the truth's (omitted) or of the reference's (added), both on one grey scale
fitted outside the part: 1 is all of it, 0 nothing.

    python benchmarks/bias.py [--controls noise,omitted,added]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness, particle_sets
from benchmarks.score import soft_mask

BOX, PIXEL_A, SYMMETRY = 48, 4.5, "C3"
SET = particle_sets.ParticleSet({"mode": "preferred", "fraction": 0.95}, -12, preferred=particle_sets.TOP)
CONTROLS = ("noise", "omitted", "added")
LOWPASS_A = 15.0
NOISE_SETS = 12


def make_noise(
    folder: Path, out: Path, seed: int, kind: str = "coloured", box: int = BOX, pixel_A: float = PIXEL_A
) -> None:
    """The same particle file with images of pure noise, white or of the same spectrum."""
    import torch

    from cryoiso.core.rng import generator
    from cryoiso.io import read_particle_file
    from cryoiso.io.mrc import write_stack
    from cryoiso.physics.noise import colour_noise, noise_spectrum

    out.mkdir(exist_ok=True)
    shutil.copy(folder / "particles.star", out / "particles.star")
    particles = read_particle_file(folder / "particles.star")
    spectrum = noise_spectrum(box, kind)
    with write_stack(out / "particles.mrcs", box, pixel_A) as stack:
        for uid in particles.uid.tolist():
            white = generator(seed, "pure noise", uid).standard_normal((1, box, box), np.float32)
            stack.append(colour_noise(torch.from_numpy(white), spectrum).numpy())


def workflow(particles: Path, reference: Path, out: Path) -> tuple[np.ndarray, Any]:
    """Mean of the half-maps of the workflow, and its cost."""
    from cryoiso.io.mrc import read_map

    shutil.rmtree(out, ignore_errors=True)
    job = out.with_suffix(".toml")
    job.write_text(
        f'[particles]\nfile = "{particles}"\ninvert = "no"\n[reference]\nfile = "{reference}"\n[sample]\n'
        f'symmetry = "{SYMMETRY}"\n[auxiliary]\npreset = "small"\n'
        '[run]\nworkflow = "auxiliary"\ndevice = "cpu"\n'
    )
    cost = harness.cryoiso("run", job, "--out", out, log=out.with_suffix(".log"))
    return read_map(out / "result" / "map.mrc").data, cost


def plain(particles: Path, reference: Path, out: Path) -> np.ndarray:
    """Mean of the half-maps of `refine`, of raw particles with its last poses."""
    from cryoiso.io.mrc import read_map

    log = out.with_suffix(".log")
    harness.cryoiso(
        "refine", particles, "--ref", reference, "--out", out, "--symmetry", SYMMETRY, "--invert", "no", log=log
    )
    harness.cryoiso(
        "reconstruct", out / "particles.star", "--out", out / "raw", "--symmetry", SYMMETRY, "--invert", "no", log=log
    )
    return read_map(out / "raw" / "map.mrc").data


def smooth(volume: np.ndarray) -> np.ndarray:
    from cryoiso.physics.filters import lowpass

    return np.asarray(lowpass(np.asarray(volume, np.float32), PIXEL_A, LOWPASS_A), np.float64)


def likeness(result: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Correlation with the reference inside its mask, and the resolution to which they agree (FSC 0.5)."""
    from cryoiso.metrics.fsc_curve import fsc, resolution_at

    mask = soft_mask(reference, PIXEL_A)
    inside = mask > 0.5
    curve = fsc(result, reference, mask)
    return {
        "correlation": float(np.corrcoef(smooth(result)[inside], smooth(reference)[inside])[0, 1]),
        "agreement_05_A": resolution_at(curve, 0.5, BOX, PIXEL_A),
    }


def noise(folder: Path) -> dict[str, Any]:
    """Pure noise against the homologue, with and without auxiliary particles.

    Both refuse images that do not correlate with the reference; by luck some sets of noise do a little. Sets are made
    until one is accepted, and the refusals counted.
    """
    from cryoiso.io.mrc import read_map

    out, star, homologue = folder / "noise", folder / "noise" / "particles.star", folder / "homologue.mrc"
    reference = read_map(homologue).data
    found: dict[str, Any] = {"refused_sets": 0}
    for seed in range(11, 11 + NOISE_SETS):
        make_noise(folder, out, seed)
        try:
            found["control"] = likeness(plain(star, homologue, out / "control"), reference)
            found["workflow"] = likeness(workflow(star, homologue, out / "workflow")[0], reference)
            return found
        except harness.Failed as error:
            found["refused_sets"] += 1
            found["refusal"] = str(error).strip().splitlines()[-1]
    return found


def part(volume: np.ndarray, other: np.ndarray, where: np.ndarray, mask: np.ndarray) -> float:
    """Density of ``volume`` in a part as a fraction of ``other``'s, on the grey scale that fits outside the part."""
    a, b = smooth(volume), smooth(other)
    outside = (mask > 0.5) & ~where
    scale = (a[outside] * b[outside]).sum() / (b[outside] ** 2).sum()
    return float((a[where] * b[where]).sum() / (scale * (b[where] ** 2).sum()))


def without_third(truth: np.ndarray, full: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The reference without its lowest third, and where the truth has density there."""
    mask = soft_mask(truth, PIXEL_A)
    z = np.arange(BOX)[:, None, None] + np.zeros_like(truth)
    low, high = np.flatnonzero((mask > 0.5).any((1, 2)))[[0, -1]]
    edge = low + (high - low) / 3
    keep = 1 / (1 + np.exp(-(z - edge)))
    where = (mask > 0.9) & (z < edge - 2) & (smooth(truth) > 0.2 * smooth(truth).max())
    return (full * keep).astype(np.float32), where


def with_balls(truth: np.ndarray, full: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The reference with a ball beside the trimer (three by symmetry), and where they are."""
    mask = soft_mask(truth, PIXEL_A)
    z, y, x = (np.indices(truth.shape) - BOX // 2) * PIXEL_A
    balls = np.zeros_like(full)
    reach = np.sqrt(((y**2 + x**2) * (mask > 0.5))[np.abs(z) < 20].max()) + 14
    for turn in np.radians([0, 120, 240]):
        r2 = z**2 + (y - reach * np.sin(turn)) ** 2 + (x - reach * np.cos(turn)) ** 2
        balls += np.exp(-0.5 * r2 / 10.0**2)
    height = np.percentile(full[mask > 0.9], 90)
    return (full + height * balls).astype(np.float32), (balls > 0.6) & (mask < 0.1)


def omitted_part(truth: np.ndarray, full: np.ndarray, made: np.ndarray) -> dict[str, float]:
    """Density of the third that the reference lacks, as a fraction of the truth's."""
    reference, where = without_third(truth, full)
    mask = soft_mask(truth, PIXEL_A)
    return {
        "part_in_reference": part(reference, full, where, mask),
        "part_in_result": part(made, truth, where, mask),
        "correlation_in_part": float(np.corrcoef(smooth(made)[where], smooth(truth)[where])[0, 1]),
    }


def added_part(truth: np.ndarray, full: np.ndarray, made: np.ndarray) -> dict[str, float]:
    """Density of the balls that the reference has too many, as a fraction of the reference's."""
    reference, where = with_balls(truth, full)
    mask = soft_mask(truth, PIXEL_A)
    return {
        "part_in_reference": part(reference, reference, where, mask),
        "part_in_truth": part(truth, reference, where, mask),
        "part_in_result": part(made, reference, where, mask),
    }


def changed_reference(folder: Path, name: str) -> dict[str, Any]:
    """The workflow with a reference that lacks a part ("omitted"), or has one too many ("added")."""
    from cryoiso.io.mrc import read_map, write_map

    truth, full = read_map(folder / "truth_map.mrc").data, read_map(folder / "homologue.mrc").data
    change, measure = {"omitted": (without_third, omitted_part), "added": (with_balls, added_part)}[name]
    write_map(folder / f"{name}.mrc", change(truth, full)[0], PIXEL_A)
    made, cost = workflow(folder / "particles.star", folder / f"{name}.mrc", folder / name)
    return {**measure(truth, full, made), **cost.as_dict()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=harness.SHARED, help="holds data/models/ha (default ../shared)")
    parser.add_argument("--controls", default=",".join(CONTROLS))
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "bias.json")
    parser.add_argument("--work", type=Path, help="keep the runs here")
    a = parser.parse_args()
    models = (a.shared / "data" / "models").resolve()
    if not (models / "ha").is_dir():
        harness.skip(f"no models in {models}; give --shared")
        return
    result: dict[str, Any] = json.loads(a.out.read_text()) if a.out.exists() else {}
    with harness.work_folder(a.work) as work:
        particle_sets.prepare(SET, 5, models, work)
        for name in a.controls.split(","):
            result[name] = noise(work) if name == "noise" else changed_reference(work, name)
            print(name, json.dumps(result[name], indent=1), flush=True)
            result["machine"] = harness.machine()
            harness.write_json(a.out, result)


if __name__ == "__main__":
    main()
