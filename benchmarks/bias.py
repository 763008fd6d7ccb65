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

from benchmarks import harness
from benchmarks.cure import HOMOLOGUE, TARGET
from benchmarks.score import soft_mask

BOX, PIXEL_A, SYMMETRY, PARTICLES = 48, 4.5, "C3", 1500
VIEWS = ("--mode", "preferred", "--fraction", 0.95)
CONTROLS = ("noise", "omitted", "added")
STEPS = 300
LOWPASS_A = 15.0
NOISE_SETS = 12


def prepare(models: Path, folder: Path) -> None:
    """Particles of the target at -12 dB, and the fitted homologue."""
    grid, log = ("--box", BOX, "--pixel-size", PIXEL_A), folder / "prepare.log"
    harness.cryoiso(
        "simulate", models / TARGET, folder, *grid, "--resolution", 2.2 * PIXEL_A, "--n", PARTICLES, "--symmetry",
        SYMMETRY, "--noise", "coloured", "--snr-db", -12, "--seed", 5, "--overwrite", *VIEWS, log=log,
    )  # fmt: skip
    harness.cryoiso(
        "reference", models / HOMOLOGUE, folder / "homologue.mrc", *grid, "--symmetry", SYMMETRY, "--lowpass", 10,
        "--fit", folder / "truth_map.mrc", log=log,
    )  # fmt: skip


def make_noise(folder: Path, out: Path, seed: int) -> None:
    """The same particle file with images of pure noise of the same spectrum."""
    import torch

    from cryoiso.core.rng import generator
    from cryoiso.io import read_particle_file
    from cryoiso.io.mrc import write_stack
    from cryoiso.physics.noise import colour_noise, noise_spectrum

    out.mkdir(exist_ok=True)
    shutil.copy(folder / "particles.star", out / "particles.star")
    particles = read_particle_file(folder / "particles.star")
    spectrum = noise_spectrum(BOX, "coloured")
    with write_stack(out / "particles.mrcs", BOX, PIXEL_A) as stack:
        for uid in particles.uid.tolist():
            white = generator(seed, "pure noise", uid).standard_normal((1, BOX, BOX), np.float32)
            stack.append(colour_noise(torch.from_numpy(white), spectrum).numpy())


def workflow(particles: Path, reference: Path, out: Path) -> tuple[np.ndarray, Any]:
    """Mean of the half-maps of the workflow, and its cost."""
    from cryoiso.io.mrc import read_map

    shutil.rmtree(out, ignore_errors=True)
    job = out.with_suffix(".toml")
    job.write_text(
        f'[particles]\nfile = "{particles}"\ninvert = "no"\n[reference]\nfile = "{reference}"\n[sample]\n'
        f'symmetry = "{SYMMETRY}"\n[auxiliary]\npreset = "small"\nsteps = {STEPS}\n'
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
    from cryoiso.metrics.fsc import fsc, resolution_at

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


def omitted(folder: Path) -> dict[str, Any]:
    """The lowest third of the trimer is missing from the reference."""
    from cryoiso.io.mrc import read_map, write_map

    truth, full = read_map(folder / "truth_map.mrc").data, read_map(folder / "homologue.mrc").data
    mask = soft_mask(truth, PIXEL_A)
    z = np.arange(BOX)[:, None, None] + np.zeros_like(truth)
    low, high = np.flatnonzero((mask > 0.5).any((1, 2)))[[0, -1]]
    edge = low + (high - low) / 3
    keep = 1 / (1 + np.exp(-(z - edge)))
    write_map(folder / "omitted.mrc", (full * keep).astype(np.float32), PIXEL_A)
    made, cost = workflow(folder / "particles.star", folder / "omitted.mrc", folder / "omitted")
    where = (mask > 0.9) & (z < edge - 2) & (smooth(truth) > 0.2 * smooth(truth).max())
    return {
        "part_in_reference": part(full * keep, full, where, mask),
        "part_in_result": part(made, truth, where, mask),
        "correlation_in_part": float(np.corrcoef(smooth(made)[where], smooth(truth)[where])[0, 1]),
        **cost.as_dict(),
    }


def added(folder: Path) -> dict[str, Any]:
    """A ball beside the trimer (three by symmetry) that is in the reference only."""
    from cryoiso.io.mrc import read_map, write_map

    truth, full = read_map(folder / "truth_map.mrc").data, read_map(folder / "homologue.mrc").data
    mask = soft_mask(truth, PIXEL_A)
    z, y, x = (np.indices(truth.shape) - BOX // 2) * PIXEL_A
    balls = np.zeros_like(full)
    reach = np.sqrt(((y**2 + x**2) * (mask > 0.5))[np.abs(z) < 20].max()) + 14
    for turn in np.radians([0, 120, 240]):
        r2 = z**2 + (y - reach * np.sin(turn)) ** 2 + (x - reach * np.cos(turn)) ** 2
        balls += np.exp(-0.5 * r2 / 10.0**2)
    height = np.percentile(full[mask > 0.9], 90)
    with_part = full + height * balls
    write_map(folder / "added.mrc", with_part.astype(np.float32), PIXEL_A)
    made, cost = workflow(folder / "particles.star", folder / "added.mrc", folder / "added")
    where = (balls > 0.6) & (mask < 0.1)
    return {
        "part_in_reference": part(with_part, with_part, where, mask),
        "part_in_truth": part(truth, with_part, where, mask),
        "part_in_result": part(made, with_part, where, mask),
        **cost.as_dict(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=harness.SHARED, help="holds data/models/ha (default ../shared)")
    parser.add_argument("--controls", default=",".join(CONTROLS))
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "bias.json")
    parser.add_argument("--work", type=Path, help="keep the runs here")
    a = parser.parse_args()
    models = (a.shared / "data" / "models" / "ha").resolve()
    if not models.is_dir():
        harness.skip(f"no models in {models}; give --shared")
        return
    result: dict[str, Any] = json.loads(a.out.read_text()) if a.out.exists() else {}
    with harness.work_folder(a.work) as work:
        prepare(models, work)
        for name in a.controls.split(","):
            result[name] = {"noise": noise, "omitted": omitted, "added": added}[name](work)
            print(name, json.dumps(result[name], indent=1), flush=True)
            result["machine"] = harness.machine()
            harness.write_json(a.out, result)


if __name__ == "__main__":
    main()
