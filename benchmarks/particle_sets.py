"""Simulated particle sets of the benchmarks: what they are of, how they are seen, and how they are prepared.

A prepared folder holds particles.star with its stack (what a refinement gets), truth.star and signal_map.mrc (poses and
object on the images' grey scale) and homologue.mrc (the reference).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness
from benchmarks.score import Preferred

HA, OTHER_HA = "ha/6wxb.pdb.gz", "ha/1ti8.pdb.gz"
"""H3 haemagglutinin, and another subtype of it (H7, 53 % identity) as the reference."""


@dataclass(frozen=True)
class ParticleSet:
    """A set of simulated particles and its reference."""

    views: Mapping[str, object]
    """Options of `cryoiso simulate` for the distribution of views."""
    snr_db: float = -15
    target: str = HA
    """Model in shared/data/models."""
    homologue: str | None = OTHER_HA
    """Model of the reference; None: the target's map, twisted."""
    twist_deg_per_A: float = 0.0
    """of that map about z, which keeps Cn and Dn."""
    homologue_lowpass_A: float = 10.0
    symmetry: str = "C3"
    box: int = 48
    pixel_A: float = 4.5
    particles: int = 1500
    noise: str = "coloured"
    seeds: tuple[int, ...] = (3, 4, 5, 6, 7)
    preferred: Preferred | None = None
    """Which views are rare; None: none."""
    invert: str = "auto"
    """Whether a refinement changes the sign of the images."""
    nuisances: Mapping[str, object] = field(default_factory=dict)
    """Further options of `cryoiso simulate` (nuisance_sets.py); files are in shared/data."""

    @property
    def grid(self) -> tuple[object, ...]:
        return ("--box", self.box, "--pixel-size", self.pixel_A)


TOP = Preferred(np.array([[0.0, 0.0, 1.0]]))
SIDE = Preferred(np.array([[1.0, 0.0, 0.0]]), both_ends=False)
MIDDLE_SNR_DB = -20
PREFERRED = {"mode": "preferred", "fraction": 0.98}
SETS: dict[str, ParticleSet] = {
    "one_pole_-13": ParticleSet(PREFERRED, -13, preferred=TOP),
    "one_pole_-15": ParticleSet(PREFERRED, preferred=TOP),
    "two_poles_-15": ParticleSet({**PREFERRED, "poles": 2}, preferred=TOP),
    "side_views_-15": ParticleSet({**PREFERRED, "pole-tilt": 90}, preferred=SIDE),
    "uniform_-15": ParticleSet({"mode": "uniform"}),
    "C1": ParticleSet(
        {"mode": "preferred", "fraction": 0.97}, -16, "1xnr_30S.cif.gz", None, 0.2, symmetry="C1", box=64,
        seeds=(3, 4, 5), preferred=TOP,
    ),
    "D2": ParticleSet(
        {"mode": "preferred", "fraction": 0.97}, -16, "8bk7.cif.gz", None, 0.3, symmetry="D2", box=64, pixel_A=4.0,
        particles=2000, seeds=(3, 4, 5), preferred=TOP,
    ),
    "middle": ParticleSet(
        PREFERRED, MIDDLE_SNR_DB, box=128, pixel_A=2.62, particles=2000, seeds=(3, 4, 5), preferred=TOP,
    ),
    "paper": ParticleSet(
        {"mode": "preferred", "fraction": 0.638}, -15.63, box=256, pixel_A=1.31, particles=5000, seeds=(3,),
        preferred=TOP,
    ),
}  # fmt: skip
"""C1: ribosomal 16S RNA; D2: beta-galactosidase; the others: haemagglutinin."""


def prepared(one: ParticleSet, seed: int, folder: Path) -> bool:
    """Whether a folder holds just this set."""
    if not all(
        (folder / name).exists() for name in ("particles.star", "truth.star", "signal_map.mrc", "homologue.mrc")
    ):
        return False
    settings = json.loads((folder / "simulation.json").read_text())["settings"]
    asked = {
        "n": one.particles, "box": one.box, "pixel_size": one.pixel_A, "symmetry": one.symmetry, "noise": one.noise,
        "snr_db": one.snr_db, "seed": seed, **{key.replace("-", "_"): value for key, value in one.views.items()},
    }  # fmt: skip
    asked |= {key.replace("-", "_"): value for key, value in json.loads(json.dumps(dict(one.nuisances))).items()}
    if "noise_from" in asked:
        settings["noise_from"] = asked["noise_from"] if _ends_with(settings, asked) else None
    return Path(settings["model"]).name == Path(one.target).name and all(settings.get(k) == v for k, v in asked.items())


def _ends_with(settings: Mapping[str, object], asked: Mapping[str, object]) -> bool:
    return str(settings.get("noise_from")).endswith(str(asked["noise_from"]))


def option_words(options: Mapping[str, object], data: Path) -> list[object]:
    """Words of a command line: True is a flag, a tuple several values of one option, a list the option repeated."""
    words: list[object] = []
    for key, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            values = () if one is True else one if isinstance(one, tuple) else (one,)
            words += [f"--{key}", *(data / str(v) if key == "noise-from" else v for v in values)]
    return words


def prepare(one: ParticleSet, seed: int, models: Path, folder: Path) -> None:
    """Target and particles, and the homologue in the target's frame."""
    folder.mkdir(parents=True, exist_ok=True)
    options = option_words({**one.views, **one.nuisances}, models.parent)
    harness.cryoiso(
        "simulate", models / one.target, folder, *one.grid, "--resolution", 2.2 * one.pixel_A, "--n", one.particles,
        "--symmetry", one.symmetry, "--noise", one.noise, "--snr-db", one.snr_db, "--seed", seed, "--overwrite",
        *options, log=folder / "prepare.log",
    )  # fmt: skip
    (folder / "truth_map.mrc").replace(folder / "signal_map.mrc")
    (folder / "truth_map.mrc").symlink_to("signal_map.mrc")
    source, fit = folder / "twisted.mrc", ()
    if one.homologue is None:
        _twist(folder / "signal_map.mrc", source, one.twist_deg_per_A)
    else:
        source, fit = models / one.homologue, ("--fit", folder / "signal_map.mrc")
    harness.cryoiso(
        "reference", source, folder / "homologue.mrc", *one.grid, "--symmetry", one.symmetry, "--lowpass",
        one.homologue_lowpass_A, *fit, log=folder / "fit.log",
    )  # fmt: skip


def _twist(path: Path, out: Path, deg_per_A: float) -> None:
    """The map rotated about z by an angle that grows along z: another conformation of the same molecule."""
    from scipy.ndimage import map_coordinates

    from cryoiso.io.mrc import read_map, write_map

    given = read_map(path)
    centre = given.box_px // 2
    z, y, x = np.indices(given.data.shape) - float(centre)
    angle = np.radians(deg_per_A) * z * given.pixel_size_A
    turned = (z, np.cos(angle) * y + np.sin(angle) * x, np.cos(angle) * x - np.sin(angle) * y)
    made = map_coordinates(given.data, [c + centre for c in turned], order=3)
    write_map(out, made.astype(np.float32), given.pixel_size_A)
