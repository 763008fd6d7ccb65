"""Einstein from noise: what a refinement makes of images without particles, by kind of noise and by how much of the
reference it is given (reference low-passed at 5 to 20 Å).

particles   the simulated particles themselves, for comparison
white       white Gaussian noise
coloured    Gaussian noise with the spectrum of the simulated noise
vae         images of a generator, trained on the particles with their true poses, of which the reference is then taken
            away: its condition is the projection of an empty map, at the temperature 1. (How the publication isolated
            the noise of its generator is not stated.)

Each stack of noise is refined against the relative with the program's refusal of noise switched off (job_process.py).
Of the mean of the half-maps:

phantom_A       resolution to which it agrees with the reference inside its mask (FSC 0.5)
correlation     with the reference inside its mask, all shells to the end of the half-maps' agreement
density         least-squares factor from the reference to the map, inside the mask, at 15 Å
half_maps_A     resolution that the half-maps claim (FSC 0.143, no mask)
reference       the control of that name (`cryoiso audit`): correlation of the signal with the reference beyond the
                low-pass filter, and its verdict; "fail" or "inconclusive" is right for noise

The default size takes about 15 CPU minutes a seed; 40 images of 24 px some 10 s in all.

    python benchmarks/einstein.py [--kinds white,coloured,vae] [--lowpass 5,7,10,15,20] [--seeds 1,2,3]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness
from benchmarks.bias import make_noise

KINDS = ("particles", "white", "coloured", "vae")
LOWPASS_A = (5.0, 7.0, 10.0, 15.0, 20.0)
SYMMETRY = "C3"
DENSITY_A = 15.0


@dataclass(frozen=True)
class Size:
    """Of the simulated particles, and how long the generators are trained."""

    particles: int = 1000
    box: int = 72
    pixel_A: float = 2.4
    snr_db: float = -10
    steps: int = 120


@dataclass(frozen=True)
class Stack:
    """Images with a particle file, and whether they show particles."""

    star: Path
    is_noise: bool = True


def prepare(size: Size, seed: int, folder: Path) -> None:
    """Particles with their true poses, and the relative as the reference; what is there stays."""
    if (folder / "reference.mrc").exists():
        return
    grid = ("--box", size.box, "--pixel-size", size.pixel_A)
    folder.mkdir(parents=True, exist_ok=True)
    harness.cryoiso(
        "simulate", "phantom", folder, *grid, "--n", size.particles, "--noise", "coloured", "--snr-db", size.snr_db,
        "--seed", seed, "--overwrite", log=folder / "simulate.log",
    )  # fmt: skip
    harness.cryoiso(
        "reference", "phantom-homologue", folder / "reference.mrc", *grid, "--symmetry", SYMMETRY, "--lowpass", 0,
        log=folder / "reference.log",
    )  # fmt: skip


def stack_of(kind: str, size: Size, seed: int, folder: Path) -> Stack:
    """The images of a kind; what is there stays."""
    if kind == "particles":
        return Stack(folder / "particles.star", is_noise=False)
    out = folder / kind
    made = out / ("auxiliary.star" if kind == "vae" else "particles.star")
    if not made.exists():
        if kind == "vae":
            generated(size, seed, folder, out)
        else:
            make_noise(folder, out, seed, kind, size.box, size.pixel_A)
    return Stack(made)


def generated(size: Size, seed: int, folder: Path, out: Path) -> None:
    """As many images as particles, by generators of which the reference was taken away."""
    trained, blind = folder / "generators", folder / "generators-blind"
    harness.cryoiso(
        "auxiliary", "train", folder / "truth.star", "--ref", folder / "reference.mrc", "--out", trained, "--symmetry",
        SYMMETRY, "--preset", "small", "--steps", size.steps, "--invert", "no", "--seed", seed,
        log=folder / "train.log",
    )  # fmt: skip
    blind.mkdir(exist_ok=True)
    for file in sorted(trained.glob("generator*.npz")):
        take_reference_away(file, blind / file.name)
    harness.cryoiso(
        "auxiliary", "generate", blind, folder / "truth.star", "--count", size.particles, "--out", out, "--symmetry",
        SYMMETRY, "--temperature", 1, "--invert", "no", "--seed", seed, "--export", log=folder / "generate.log",
    )  # fmt: skip


def take_reference_away(file: Path, out: Path) -> None:
    """A generator as it is, but for its reference, which is empty."""
    from cryoiso.core.types import DensityMap
    from cryoiso.methods.auxiliary.generator import Generator

    found = Generator.load(file)
    empty = DensityMap(np.zeros_like(found.reference.data), found.reference.pixel_size_A)
    replace(found, reference=empty).save(out)


def refine(stack: Stack, lowpass_A: float, seed: int, reference: Path, out: Path) -> None:
    """A plain refinement against the reference, low-passed; noise is not refused."""
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    job = out.with_suffix(".toml")
    job.write_text(
        f'[particles]\nfile = "{stack.star}"\ninvert = "no"\n[reference]\nfile = "{reference}"\n'
        f'lowpass_A = {lowpass_A}\n[sample]\nsymmetry = "{SYMMETRY}"\n[run]\ndevice = "cpu"\nseed = {seed}\n'
    )
    words = [sys.executable, "-m", "benchmarks.job_process", "refine", job, out]
    harness.measure([*words, *(["--unguarded"] if stack.is_noise else [])], out.with_suffix(".log"), harness.REPO)


def scores(out: Path, reference: Path, lowpass_A: float) -> dict[str, Any]:
    """What the half-maps of a refinement have of the reference."""
    from cryoiso.core import products
    from cryoiso.io.mrc import read_map
    from cryoiso.methods.audit import confirmed, likeness
    from cryoiso.methods.audit.likeness import Band
    from cryoiso.methods.audit.omega import scale_between
    from cryoiso.metrics.fsc_curve import fsc, resolution_at
    from cryoiso.physics.filters import lowpass
    from cryoiso.physics.masks import mask_diameter_A, soft_mask_from_map
    from cryoiso.physics.symmetry import point_group
    from cryoiso.pipeline.audit.controls.reference import verdict_of

    known = read_map(reference)
    box, pixel_A, model = known.box_px, known.pixel_size_A, np.asarray(known.data, np.float64)
    first, second = (np.asarray(read_map(out / name, pixel_A).data, np.float64) for name in products.HALF_MAPS)
    made, mask = (first + second) / 2, np.asarray(soft_mask_from_map(model, pixel_A))
    inside, operations = mask > 0.5, point_group(SYMMETRY)
    claimed_A = resolution_at(fsc(first, second), 0.143, box, pixel_A)
    everything = Band.up_to(claimed_A, box, pixel_A)
    coarse = [np.asarray(lowpass(volume, pixel_A, DENSITY_A), np.float64) for volume in (made, model)]
    found: dict[str, Any] = {
        "phantom_A": resolution_at(fsc(made, model, mask), 0.5, box, pixel_A),
        "correlation": likeness.correlation(made, model, inside, everything, 0, operations).value,
        "density": scale_between(coarse[0], coarse[1], inside),
        "half_maps_A": claimed_A,
        "reference": None,
        "reference_verdict": "inconclusive",
    }
    band = confirmed.band_of(lowpass_A, claimed_A, box, pixel_A)
    if band.usable:
        control = confirmed.confirm(
            made, (first, second), model, confirmed.mirror_image(model), inside, band, pixel_A,
            mask_diameter_A(mask, pixel_A), operations,
        )  # fmt: skip
        low, high = control.interval
        found |= {"reference": [control.value, low, high], "reference_verdict": verdict_of(control)}
    return found


def measure(kind: str, lowpass_A: float, seed: int, size: Size, work: Path) -> dict[str, Any]:
    """A row of the result."""
    folder = work / f"seed-{seed}"
    prepare(size, seed, folder)
    out = folder / "refined" / f"{kind}-{lowpass_A:g}"
    refine(stack_of(kind, size, seed, folder), lowpass_A, seed, folder / "reference.mrc", out)
    numbers = scores(out, folder / "reference.mrc", lowpass_A)
    return {"kind": kind, "lowpass_A": lowpass_A, "seed": seed, "size": asdict(size), **numbers}


def key(row: dict[str, Any]) -> tuple[str, float, int]:
    """What tells a row from others."""
    return row["kind"], row["lowpass_A"], row["seed"]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One row for each refinement."""
    lines = [
        (r["kind"], f"{r['lowpass_A']:g} Å", r["seed"], f"{r['phantom_A']:.1f} Å", f"{r['correlation']:.2f}",
         f"{r['density']:.2g}", f"{r['half_maps_A']:.1f} Å",
         "-" if r["reference"] is None else f"{r['reference'][0]:.2f}", r["reference_verdict"])
        for r in sorted(rows, key=lambda r: (KINDS.index(r["kind"]), r["lowpass_A"], r["seed"]))
    ]  # fmt: skip
    head = ("images", "reference to", "seed", "phantom to", "correlation", "density", "half-maps claim",
            "confirmed by", "verdict")  # fmt: skip
    return harness.markdown(head, lines)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"of {', '.join(KINDS)}")
    parser.add_argument("--lowpass", default=",".join(f"{a:g}" for a in LOWPASS_A), help="Å, with commas")
    parser.add_argument("--seeds", default="1", help="with commas")
    for name, value in asdict(Size()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "einstein.json")
    parser.add_argument("--work", type=Path, help="keep images and maps here")
    a = parser.parse_args(words)
    size = Size(*(getattr(a, name.replace("-", "_")) for name in asdict(Size())))
    result: dict[str, Any] = json.loads(a.out.read_text()) if a.out.exists() else {"rows": []}
    with harness.work_folder(a.work) as work:
        for seed in map(int, a.seeds.split(",")):
            for kind in a.kinds.split(","):
                for lowpass_A in map(float, a.lowpass.split(",")):
                    row = measure(kind, lowpass_A, seed, size, work)
                    kept = [r for r in result["rows"] if key(r) != key(row)]
                    result = {"rows": [*kept, row], "machine": harness.machine()}
                    harness.write_json(a.out, result)
    print(table(result["rows"]))


if __name__ == "__main__":
    main()
