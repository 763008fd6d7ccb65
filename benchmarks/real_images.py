"""Real images: does the likelihood of a model's projections tell particles from ice?

101 images of beta-galactosidase and 101 patches of ice without particles, of the same micrographs (EMD-2984, 384 px of
0.637 Å; no poses, no CTF of their own). The score of an image is the log evidence of the projections of the atomic
model (8BK7, D2) over that of nothing: summed over views (HEALPix), shifts and, since the defocus of each image is not
known, over defoci drawn from the 3,185 micrographs of the set. Grey scale (and its sign) and noise spectrum come from
every second image and are used for the others, and the other way round. Reported is the area under the ROC curve with
its 95 % interval (bootstrap over images), for the full model and for models that lack a part of it.

    python benchmarks/real_images.py [--figure docs/images/real_images.png]
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness

FOLDER = "particles/betagal_real_384"
MODEL = "models/8bk7.cif.gz"
FULL_PX, FULL_PIXEL_A, BOX = 384, 0.637, 64
DIAMETER_A, RESOLUTION_A = 190.0, 15.0
KV, CS_MM, AMPLITUDE_CONTRAST = 300.0, 2.7, 0.1
"""Of a Titan Krios, as published for the set; the files say nothing."""
DEFOCI, ORDER, SHIFT_RANGE_A = 4, 2, 16.0
AMPLITUDES = np.concatenate([-np.geomspace(2, 0.125, 9), np.geomspace(0.125, 2, 5)])
"""Finer for the sign that raw micrographs have: protein is dark in them."""
RESAMPLINGS = 4000


@dataclass(frozen=True)
class Variant:
    """What the likelihood knows of the images."""

    ctf: bool = True
    noise: bool = True
    """The spectrum of the ice; otherwise white."""
    mask: bool = False
    """Images are zero outside a soft circle of the particle's diameter."""
    scale: bool = False
    """Each image has a scale of its own: the mean over a log-normal distribution, sd 0.3, about the common one."""


VARIANTS = {
    "CTF, noise spectrum": Variant(),
    "without CTF": Variant(ctf=False),
    "without noise spectrum (white)": Variant(noise=False),
    "without either": Variant(ctf=False, noise=False),
    "with image mask": Variant(mask=True),
    "with a scale per image": Variant(scale=True),
}


def read_images(data: Path) -> tuple[np.ndarray, np.ndarray]:
    """(2 n, D, D) normalised images, particles first, and (2 n,) whether each shows one."""
    import torch

    from cryoiso.io.stack import StackReader

    parts = []
    with StackReader() as reader:
        for name in ("particles.mrcs", "background.mrcs"):
            parts.append(reader.read(str(data / FOLDER / name), np.arange(101)))
    images = np.concatenate(parts).astype(np.float32)
    axis = (np.arange(FULL_PX) - FULL_PX // 2) * FULL_PIXEL_A
    outside = np.hypot(*np.meshgrid(axis, axis)) > DIAMETER_A / 2
    level, spread = images[:, outside].mean(1), images[:, outside].std(1)
    images = (images - level[:, None, None]) / spread[:, None, None]
    whole = torch.fft.fftshift(torch.fft.fft2(torch.fft.ifftshift(torch.as_tensor(images), dim=(1, 2))), dim=(1, 2))
    low = slice(FULL_PX // 2 - BOX // 2, FULL_PX // 2 + BOX // 2)
    small = torch.fft.fftshift(torch.fft.ifft2(torch.fft.ifftshift(whole[:, low, low], dim=(1, 2))), dim=(1, 2)).real
    small = small * (BOX / FULL_PX)  # white noise keeps its variance
    return small.numpy().astype(np.float32), np.arange(len(images)) < 101


def defoci(data: Path) -> np.ndarray:
    """(DEFOCI,) in Å: quantiles of the micrographs' mean defocus."""
    table = np.loadtxt(data / FOLDER / "defocus_3185.txt", usecols=(2, 3))
    mean = table.mean(1)
    return np.quantile(mean, (np.arange(DEFOCI) + 0.5) / DEFOCI)


def evidences(images: np.ndarray, shows: np.ndarray, variant: Variant, data: Path) -> np.ndarray:
    """(2 n, folds, amplitudes) log evidence of each image against nothing, with the noise of each fold."""
    import torch

    from cryoiso.physics.fourier import fourier_disc, images_to_fourier
    from cryoiso.physics.projection import FourierVolume
    from cryoiso.refine.likelihood import ReferenceSlices, Whitened, cross_and_norm
    from cryoiso.refine.schedule import global_grid

    pixel = FULL_PIXEL_A * FULL_PX / BOX
    if variant.mask:
        images = images * soft_circle(pixel)
    radius = int(BOX * pixel / RESOLUTION_A)
    disc = fourier_disc(BOX, radius)
    x = disc.gather(images_to_fourier(torch.as_tensor(images))).to(torch.complex64)
    volume = FourierVolume.from_volume(torch.as_tensor(reference(data, pixel)), 2, radius)
    rotations = global_grid(ORDER, "D2")
    slices = ReferenceSlices.of(volume, rotations, disc, None)
    ctfs = contrast_transfer(data, disc, pixel) if variant.ctf else torch.ones(1, disc.size)
    shifts = shift_grid(pixel)
    power = float((ctfs.square() @ slices.power).mean()) / disc.size
    out = np.zeros((len(images), 2, len(AMPLITUDES)))
    for fold in (0, 1):
        sigma2 = noise_variance(x, disc.shell, ~shows & (np.arange(len(shows)) % 2 == fold), variant.noise)
        unit = np.sqrt(float(sigma2.mean()) / power / 4)  # amplitude 1: a quarter of the noise's power
        amplitudes = torch.as_tensor(AMPLITUDES * unit, dtype=torch.float32)
        # ice is scored with the noise of the other fold alone; particles also say how strong the reference is
        wanted = torch.as_tensor(np.flatnonzero(shows | (np.arange(len(shows)) % 2 != fold)))
        for rows in wanted.split(8):
            total = torch.full((len(rows), len(AMPLITUDES)), -torch.inf)
            for c in ctfs:
                white = Whitened(2 * x[rows] * c / sigma2, (2 * c.square() / sigma2).expand(len(rows), -1), disc, None)
                cross, norm = cross_and_norm(white, slices, shifts)
                each = [(a * cross - 0.5 * a.square() * norm[:, None]).flatten(1).logsumexp(1) for a in amplitudes]
                total = torch.logaddexp(total, torch.stack(each, 1))
            out[rows.numpy(), fold] = total.double().numpy() - np.log(len(ctfs) * len(shifts) * len(rotations))
    return out


def soft_circle(pixel_A: float) -> np.ndarray:
    """(BOX, BOX) 1 inside the particle's diameter, cosine edge of 20 Å."""
    axis = (np.arange(BOX) - BOX // 2) * pixel_A
    beyond = np.clip((np.hypot(*np.meshgrid(axis, axis)) - DIAMETER_A / 2) / 20.0, 0, 1)
    return (0.5 + 0.5 * np.cos(np.pi * beyond)).astype(np.float32)


def reference(data: Path, pixel_A: float) -> np.ndarray:
    from cryoiso.pipeline.inputs.reference import prepare_reference

    made = prepare_reference(data / MODEL, BOX, pixel_A, RESOLUTION_A, symmetry="D2")
    return np.asarray(made.map.data, np.float32)


def contrast_transfer(data: Path, disc: Any, pixel_A: float) -> Any:
    """(DEFOCI, K) CTF of every defocus, without astigmatism."""
    import torch

    wavelength = 12.2643 / np.sqrt(KV * 1e3 + 0.97845e-6 * (KV * 1e3) ** 2)
    ky, kx = disc.frequencies(pixel_A)
    s2 = (ky.square() + kx.square()).numpy()
    phase = np.pi * wavelength * defoci(data)[:, None] * s2 - 0.5 * np.pi * CS_MM * 1e7 * wavelength**3 * s2**2
    c = np.sqrt(1 - AMPLITUDE_CONTRAST**2) * np.sin(phase) + AMPLITUDE_CONTRAST * np.cos(phase)
    return torch.as_tensor(c, dtype=torch.float32)


def shift_grid(pixel_A: float) -> Any:
    import torch

    reach = int(SHIFT_RANGE_A / pixel_A)
    axis = torch.arange(-reach, reach + 1, dtype=torch.float32)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    grid = torch.stack([x.flatten(), y.flatten()], 1)
    return grid[grid.norm(dim=1) * pixel_A <= SHIFT_RANGE_A]


def noise_variance(x: Any, shell: np.ndarray, rows: np.ndarray, coloured: bool) -> Any:
    """(K,) mean power of the patches ``rows`` in each shell, or in all."""
    import torch

    power = x[torch.as_tensor(rows)].abs().square().mean(0).double().numpy()
    if not coloured:
        return torch.full((len(shell),), float(power.mean()), dtype=torch.float32)
    mean = np.bincount(shell, power) / np.maximum(np.bincount(shell), 1)
    return torch.as_tensor(mean[shell], dtype=torch.float32)


def scores(found: np.ndarray, shows: np.ndarray, variant: Variant) -> tuple[np.ndarray, list[float]]:
    """(2 n,) log evidence with the amplitude that makes the particles of the other fold most likely, and these
    amplitudes."""
    fold = np.arange(len(shows)) % 2
    score, chosen = np.zeros(len(shows)), []
    for other in (0, 1):
        best = int(found[shows & (fold == other), other].sum(0).argmax())
        chosen.append(float(AMPLITUDES[best]))
        mine = found[fold != other, other]
        if not variant.scale:
            score[fold != other] = mine[:, best]
            continue
        same = np.sign(AMPLITUDES) == np.sign(AMPLITUDES[best])
        weight = -np.square(np.log(np.abs(AMPLITUDES[same] / AMPLITUDES[best]))) / (2 * 0.3**2)
        weight -= np.log(np.exp(weight).sum())
        score[fold != other] = np.logaddexp.reduce(mine[:, same] + weight, 1)
    return score, chosen


def area(score: np.ndarray, shows: np.ndarray) -> float:
    """Area under the ROC curve: chance that a particle's score is above that of a patch of ice."""
    one, two = score[shows][:, None], score[~shows][None]
    return float((one > two).mean() + 0.5 * (one == two).mean())


def interval(score: np.ndarray, shows: np.ndarray) -> list[float]:
    """95 % of the areas of sets drawn with replacement from particles and from patches."""
    rng = np.random.default_rng(1)
    yes, no = score[shows], score[~shows]
    drawn = [
        area(np.concatenate([rng.choice(yes, len(yes)), rng.choice(no, len(no))]), shows) for _ in range(RESAMPLINGS)
    ]
    return [round(float(v), 4) for v in np.quantile(drawn, (0.025, 0.975))]


def roc(score: np.ndarray, shows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares of patches and of particles above every level."""
    levels = np.sort(score)[::-1]
    return tuple(np.concatenate([[0], (score[rows][None] >= levels[:, None]).mean(1)]) for rows in (~shows, shows))


def facts_of(score: np.ndarray, shows: np.ndarray) -> dict[str, Any]:
    false, true = roc(score, shows)
    return {
        "area": round(area(score, shows), 4), "interval_95": interval(score, shows),
        "particles_above_all_ice": round(float(true[false == 0].max()), 4),
        "particles_at_5_percent_ice": round(float(true[false <= 0.05].max()), 4),
        "median_log_evidence": [round(float(np.median(score[rows])), 2) for rows in (shows, ~shows)],
    }  # fmt: skip


def draw(path: Path, curves: dict[str, np.ndarray], shows: np.ndarray) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8))
    for name, score in curves.items():
        axes[0].step(*roc(score, shows), where="post", label=f"{name}: {area(score, shows):.3f}", linewidth=1.4)
    axes[0].set(xlabel="share of ice patches above the level", ylabel="share of particles above it", xlim=(-0.01, 1))
    axes[0].legend(fontsize=7, loc="lower right", title="area under the curve", title_fontsize=7)
    first = next(iter(curves.values()))
    bins = np.linspace(np.quantile(first, 0.0), np.quantile(first, 0.99), 40)
    for rows, label in ((shows, "particles"), (~shows, "ice")):
        axes[1].hist(first[rows], bins, alpha=0.6, label=label)
    axes[1].set(xlabel="log evidence of a particle over nothing (nats)", ylabel="images")
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=harness.SHARED, help="holds data/ (default ../shared)")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "real_images.json")
    parser.add_argument("--figure", type=Path, help="write the ROC curves (PNG)")
    a = parser.parse_args()
    data = (a.shared / "data").resolve()
    if not (data / FOLDER).is_dir():
        harness.skip(f"no {FOLDER} in {data}; give --shared")
        return
    images, shows = read_images(data)
    curves, found = {}, {}
    known: dict[tuple[bool, bool, bool], np.ndarray] = {}
    for name, variant in VARIANTS.items():
        key = variant.ctf, variant.noise, variant.mask
        if key not in known:
            known[key] = evidences(images, shows, variant, data)
        curves[name], amplitudes = scores(known[key], shows, variant)
        found[name] = {**facts_of(curves[name], shows), "amplitudes": amplitudes}
        print(name, found[name], flush=True)
    facts = {"particles": int(shows.sum()), "ice": int((~shows).sum()), "resolution_A": RESOLUTION_A, "order": ORDER,
             "defoci_A": [round(float(d)) for d in defoci(data)]}  # fmt: skip
    harness.write_json(a.out, {"machine": harness.machine(), **facts, "variants": found})
    if a.figure:
        draw(a.figure, curves, shows)


if __name__ == "__main__":
    main()
