"""An image's own share in its reference: what it does to scales, and that it is left out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from likelihood_helper import true_posterior
from test_refine_engine import BOX, PIXEL_A, in_memory

from cryoiso.io.sources import ArraySource
from cryoiso.physics.backproject import SliceAccumulator
from cryoiso.physics.phantom import phantom_map
from cryoiso.physics.projection import FourierVolume
from cryoiso.physics.simulation import SimulatedSource, simulate
from cryoiso.physics.symmetry import point_group
from cryoiso.physics.views import Views
from cryoiso.refine.batches import BatchReader
from cryoiso.refine.intensity import ImageTerms
from cryoiso.refine.leverage import Leverage, cropped, own_response, total_weight
from cryoiso.refine.likelihood import whiten
from cryoiso.refine.maximise import NoiseSums, accumulate
from cryoiso.refine.own_shares import OwnShares, without_own
from cryoiso.refine.references import spherical

RADIUS, PADDING = 12, 2
SPECTRA = np.ones((1, BOX // 2 + 1))
RARE_DEG = 36.0
ONE = np.eye(3)[None]


def test_the_reference_without_the_image_is_the_one_it_was_made_of():
    """M = (1 - h) M' + h x: the sums are those of M', each times 1 - h."""
    rng = np.random.default_rng(1)
    rest, image = (torch.complex(*torch.as_tensor(rng.normal(size=(2, 5, 7)))) for _ in range(2))
    own = torch.as_tensor(rng.uniform(0, 0.8, (5, 7)))
    whole = (1 - own) * rest + own * image
    cross, norm = without_own((whole.conj() * image).real, whole.abs().square(), image.abs().square(), own)
    torch.testing.assert_close(cross, (1 - own) * (rest.conj() * image).real)
    torch.testing.assert_close(norm, (1 - own) * rest.abs().square())


class Half:
    """Images at their true poses, a reference made of them, and their shares in it."""

    def __init__(self, source, tau2: float | None = None) -> None:
        n = len(source.particles)
        self.source, self.rows = source, np.arange(n)
        self.batch = BatchReader(source, source.particles, PIXEL_A)._prepare(self.rows, RADIUS)
        self.white, self.posterior = whiten(self.batch, SPECTRA), true_posterior(source, self.rows)
        accumulator = SliceAccumulator.empty(BOX, RADIUS, PADDING)
        nothing = FourierVolume.from_volume(torch.zeros((BOX,) * 3), PADDING, RADIUS)
        accumulate(self.batch, self.white, self.posterior, nothing, accumulator, NoiseSums.empty(1, BOX // 2 + 1))
        sums = accumulator.finish()
        mask = spherical(BOX, PIXEL_A, 150.0)
        wiener = self._signal(source, sums) if tau2 is None else torch.full((RADIUS + 1,), 1 / tau2)
        reference = sums.reconstruct(wiener) * torch.as_tensor(mask)
        self.volume = FourierVolume.from_volume(reference, PADDING, RADIUS)
        kappa = own_response(BOX, RADIUS, PADDING, mask, 1)
        total = cropped(total_weight(sums, wiener, 0, kappa, np.ones(1)), PADDING, RADIUS)
        leverage = Leverage.of(total, np.ones(n), BOX, PADDING, "cpu")
        shift_px = self.posterior.best_shift_px.numpy()
        self.shares = OwnShares(leverage, source.particles.rotation, shift_px, np.zeros(n), ONE, 75.0 / PIXEL_A)

    @staticmethod
    def _signal(source, sums) -> torch.Tensor:
        """1 / tau^2 of the truth."""
        weight = torch.ones_like(sums.weight)
        true = replace(sums, numerator=sums.sampled(torch.as_tensor(source.truth.data)), weight=weight)
        shell = true.shells()
        power = [float(true.numerator[shell == s].abs().square().mean()) for s in range(RADIUS + 1)]
        return torch.tensor([1 / p for p in power], dtype=torch.float32)

    def terms(self, own: OwnShares | None) -> np.ndarray:
        images = ImageTerms("particle", SPECTRA, own)
        sums = SliceAccumulator.empty(BOX, RADIUS, PADDING), NoiseSums.empty(1, BOX // 2 + 1)
        accumulate(self.batch, self.white, self.posterior, self.volume, *sums, images=images)
        return images._found[0][1]


def test_noise_alone_has_no_scale():
    """Images of noise correlate with the map made of them; with the map without each of them they do not."""
    made = in_memory(simulate(phantom_map(BOX, PIXEL_A, 14.0), 60, snr_db=-5.0, seed=3))
    images = np.random.default_rng(2).normal(size=(60, BOX, BOX)).astype(np.float32)
    half = Half(ArraySource(images, made.particles), tau2=0.1)
    (cross, norm, *_), (left, rest, *_) = half.terms(None).T, half.terms(half.shares).T
    assert cross.sum() / norm.sum() > 1.5
    assert abs(left.sum()) / rest.sum() < 0.15
    assert abs(left.mean()) < 3 * left.std() / np.sqrt(60)


def mean_scale(terms: np.ndarray, rows: np.ndarray) -> float:
    return float(terms[rows, 0].sum() / terms[rows, 1].sum())


def test_scales_of_rare_views_are_unbiased():
    """Equal images at their true poses, 95 % top views. The mean scale of the rare ones is that of the others within
    two standard errors, and by four fifths what maps made without each of them give; with their own share in the
    reference it is several standard errors too large."""
    made = simulate(phantom_map(BOX, PIXEL_A, 14.0), 300, snr_db=-8.0, views=Views("preferred", 0.95, 20.0), seed=4)
    images = made.read(np.arange(300))
    half = Half(with_truth(images, made, np.arange(300)))
    rare = np.abs(made.particles.rotation[:, 2, 2]) < np.cos(np.radians(RARE_DEG))
    assert rare.sum() > 10
    plain, found = half.terms(None), half.terms(half.shares)
    error = 1 / np.sqrt(2 * found[rare, 1].sum())
    assert mean_scale(plain, rare) > mean_scale(plain, ~rare) + 2.5 * error
    assert abs(mean_scale(found, rare) - mean_scale(found, ~rare)) < 2 * error
    exact = plain.copy()
    for row in np.flatnonzero(rare):
        half.volume = Half(with_truth(images, made, np.setdiff1d(np.arange(300), row))).volume
        exact[row] = half.terms(None)[row]
    bias, left = (abs(mean_scale(one, rare) - mean_scale(exact, rare)) for one in (plain, found))
    assert left < 0.25 * bias


def with_truth(images: np.ndarray, made: SimulatedSource, rows: np.ndarray) -> ArraySource:
    source = ArraySource(images[rows], made.particles.take(rows))
    source.truth = made.volume
    return source


def test_an_image_that_moved_has_no_share():
    """At the pose that it was inserted at the whole share, at a symmetry mate's as well, and none far from it."""
    made = in_memory(simulate(phantom_map(BOX, PIXEL_A, 14.0), 40, snr_db=-5.0, seed=3))
    half = Half(ArraySource(made.read(np.arange(40)), made.particles), tau2=0.1)
    disc, shares = half.white.disc, replace(half.shares, operations=point_group("C3"))
    plain = shares.leverage(half.white, half.rows, half.posterior.rotation)
    found = shares(half.rows, half.white, half.posterior, disc)
    torch.testing.assert_close(found, plain)
    operation = torch.as_tensor(point_group("C3")[1], dtype=torch.float32)
    mates = replace(half.posterior, rotation=half.posterior.rotation @ operation)
    again = shares(half.rows, half.white, mates, disc) / shares.leverage(half.white, half.rows, mates.rotation)
    torch.testing.assert_close(again, torch.ones_like(again), rtol=1e-3, atol=1e-3)
    moved = replace(half.posterior, rotation=half.posterior.rotation.flip(0))
    outer = disc.shell == RADIUS
    assert (shares(half.rows, half.white, moved, disc)[:, outer] < 0.05 * plain[:, outer]).float().mean() > 0.8
    blurred = replace(shares, spread_deg=np.full(40, 10.0))
    share = (blurred(half.rows, half.white, half.posterior, disc) / plain).numpy()
    assert share[:, disc.shell == 1].min() > 0.97 and share[:, outer].max() < 0.9
