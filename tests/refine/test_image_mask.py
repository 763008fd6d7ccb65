"""Masks on the images that are scored: neighbours are cut off, noise spectra stay those of whole images, and maps are
made from the images as they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ctf_applied_helper import of_kind
from errors_helper import raises_code
from likelihood_helper import true_posterior
from test_refine_engine import BOX, PIXEL_A, contents, in_memory, request_for, require_same_bits

from cryoiso.core.config import parse_job
from cryoiso.core.errors import UsageError
from cryoiso.engines.native import NativeEngine
from cryoiso.io.sources import ArraySource
from cryoiso.parallel.context import Context
from cryoiso.physics.backproject import SliceAccumulator
from cryoiso.physics.phantom import phantom_map
from cryoiso.physics.projection import FourierVolume
from cryoiso.physics.simulation import simulate
from cryoiso.pipeline.stages.engines import require_engine
from cryoiso.refine import batches
from cryoiso.refine.batches import BatchReader
from cryoiso.refine.image_mask import EDGE_PX, ImageMask, displacement_A, gain_of, require_whole_images
from cryoiso.refine.intensity import ImageTerms
from cryoiso.refine.likelihood import whiten
from cryoiso.refine.maximise import NoiseSums, accumulate

N, RADIUS_PX, BAND_PX = 100, 7.0, 13
SPECTRA = np.ones((1, BOX // 2 + 1))


@pytest.fixture(scope="module")
def source() -> ArraySource:
    return in_memory(simulate(phantom_map(BOX, PIXEL_A, 14.0), N, snr_db=-3.0, shift_sd_A=6.0, seed=3))


def mask_of(source: ArraySource, fill: bool, radius_px: float = RADIUS_PX) -> ImageMask:
    """Circles at the true places."""
    p = source.particles
    n = len(p)
    return ImageMask(p, fill, -p.shift_A / PIXEL_A, np.full(n, radius_px), SPECTRA, seed=1)


def batch_of(source: ArraySource, images: np.ndarray | None = None, band_px: int = BAND_PX):
    seen = source if images is None else ArraySource(images.astype(np.float32), source.particles)
    return BatchReader(seen, source.particles, PIXEL_A)._prepare(np.arange(len(source.particles)), band_px)


# --- what is cut off


@pytest.mark.parametrize("fill", [False, True])
def test_what_lies_outside_the_circle_does_not_count(source, fill):
    """A bright blob of a pixel's width at 14 px from the particle, whose ringing in the band is all that is left."""
    mask = mask_of(source, fill, radius_px=6.0)
    images = source.read(np.arange(N))
    axis = np.arange(BOX) - BOX // 2
    place = -source.particles.shift_A / PIXEL_A
    angle = np.linspace(0, 2 * np.pi, N)
    x0, y0 = (place[:, i] + 14 * f(angle) for i, f in enumerate((np.cos, np.sin)))
    distance2 = (axis[None, None, :] - x0[:, None, None]) ** 2 + (axis[None, :, None] - y0[:, None, None]) ** 2
    inside = (np.abs(x0) < 13) & (np.abs(y0) < 13)
    neighbour = 20 * np.exp(-distance2 / 4) * inside[:, None, None]
    plain, crowded = batch_of(source), batch_of(source, images + neighbour)
    before = (crowded.coefficients - plain.coefficients).abs().square().sum(1)[inside]
    after = (mask.of(crowded).coefficients - mask.of(plain).coefficients).abs().square().sum(1)[inside]
    assert inside.sum() > 20 and float((after / before).max()) < 1e-3


def test_the_particle_is_left_as_it_is(source):
    """The score of the true poses: the signal lies within the circle, only noise outside it is lost."""
    quiet = simulate(phantom_map(BOX, PIXEL_A, 14.0), N, snr_db=-3.0, shift_sd_A=6.0, seed=3)
    clean = type(quiet)(quiet.volume, quiet.particles, noise=False).read(np.arange(N))
    batch = batch_of(source, clean)
    radius = 72.5 / PIXEL_A + displacement_A(source.particles, BOX * PIXEL_A / BAND_PX).max() / PIXEL_A
    masked = mask_of(source, False, float(np.ceil(radius))).of(batch)
    lost = (masked.coefficients - batch.coefficients).abs().square().sum() / batch.coefficients.abs().square().sum()
    assert float(lost) < 0.01
    assert mask_of(source, True, 40.0).of(batch) is batch, "a circle beyond the corners cuts nothing"


def test_the_circle_is_as_wide_as_defocus_displaces_the_signal(source):
    """lambda x defocus / detail: 0.0197 Å of 300 kV, 20,000 Å and 10 Å give 39.4 Å."""
    p = source.particles
    one = replace(p, defocus_u_A=np.full(N, 2e4), defocus_v_A=np.full(N, 1e4))
    assert p.groups[0].voltage_kV == 300
    np.testing.assert_allclose(displacement_A(one, 10.0), 39.4, atol=0.1)


# --- noise


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("band_px", [9, 15])
def test_noise_spectra_are_those_of_whole_images(source, fill, band_px):
    """White noise of variance 1: 1 in every shell, up to the last of the band."""
    many = replace(source.particles.take(np.arange(N).repeat(6)), uid=np.arange(6 * N, dtype=np.uint64))
    images = np.random.default_rng(0).standard_normal((6 * N, BOX, BOX))
    noise = ArraySource(images.astype(np.float32), many)
    noise_batch = batch_of(noise, band_px=band_px)
    masked = mask_of(noise, fill).of(noise_batch)
    sums = NoiseSums.empty(1, BOX // 2 + 1)
    sums.add(masked, masked.coefficients.abs().square())
    found = sums.spectra(SPECTRA)[0, 1 : band_px + 1]
    np.testing.assert_allclose(found, 1, atol=0.12)
    assert found.mean() == pytest.approx(1, abs=0.02)
    if not fill:  # and the power itself is the kept area's
        inside = masked.share[0, 4 : band_px - 3]
        kept = (np.square(RADIUS_PX) * np.pi, np.square(RADIUS_PX + EDGE_PX) * np.pi)
        assert kept[0] / BOX**2 < inside.min() and inside.max() < kept[1] / BOX**2


def test_kept_and_filled_parts_make_a_whole():
    both = gain_of(BOX, RADIUS_PX, 15, False) + gain_of(BOX, RADIUS_PX, 15, True)
    np.testing.assert_allclose(both[:9], 1, atol=0.02)


def test_the_noise_of_a_particle_is_its_own(source):
    """Whatever its row and batch; and it has nothing to do with that of another particle."""
    order = np.random.default_rng(1).permutation(N)
    batch, mask = batch_of(source), mask_of(source, True)
    turned = ArraySource(source.read(np.arange(N))[order], source.particles.take(order))
    other = mask_of(turned, True).of(batch_of(turned))
    np.testing.assert_array_equal(other.coefficients.numpy(), mask.of(batch).coefficients.numpy()[order])
    fills = mask.of(batch).coefficients - mask_of(source, False).of(batch).coefficients
    alike = (fills[0].conj() * fills[1]).real.sum() / (fills[0].abs().norm() * fills[1].abs().norm())
    assert abs(float(alike)) < 0.3


# --- what is back-projected


def test_maps_are_made_from_whole_images(source):
    batch = batch_of(source)
    volume = FourierVolume.from_volume(torch.as_tensor(source.truth.data))
    posterior, made = true_posterior(source, np.arange(N)), []
    for scored in (None, mask_of(source, False, 13.0).of(batch)):
        sums, noise = SliceAccumulator.empty(BOX), NoiseSums.empty(1, BOX // 2 + 1)
        images = ImageTerms("particle", SPECTRA)
        accumulate(batch, whiten(batch, SPECTRA), posterior, volume, sums, noise, images=images, scored=scored)
        made.append((sums.grid.clone(), noise.spectra(SPECTRA)[0, 2:13], images._found[0][1]))
    assert torch.equal(made[0][0], made[1][0])
    np.testing.assert_allclose(made[1][1], made[0][1], rtol=0.12)
    level, count = made[1][2][:, 2], made[1][2][:, 3]
    assert level.mean() == pytest.approx(1, abs=0.03) and (count < 0.8 * made[0][2][:, 3]).all()


# --- in a refinement


def masked_request(folder: Path, mode: str = "noise", **settings):
    few = in_memory(simulate(phantom_map(BOX, PIXEL_A, 14.0), 60, snr_db=-1.0, shift_sd_A=4.0, seed=9))
    settings = {"max_iterations": 2, "healpix_order": 1, "image_mask": mode, **settings}
    return replace(request_for(few, folder, **settings), diameter_A=110.0)


RANKS_SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_image_mask as t
from cryoiso.parallel.context import get_context
t.batches.BATCH_IMAGES = 16
t.NativeEngine().refine(t.masked_request(Path(sys.argv[2])), get_context())
"""


@pytest.mark.mpi
def test_ranks_and_interruptions_give_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "BATCH_IMAGES", 16)
    require_same_bits(masked_request, RANKS_SCRIPT, tmp_path)
    NativeEngine().refine(masked_request(tmp_path / "other", "zero"), Context())
    assert contents(tmp_path / "other")["half1.mrc"] != contents(tmp_path / "1")["half1.mrc"]


def test_what_cannot_be_masked_is_refused(source):
    with raises_code("options-conflict"):
        require_whole_images(of_kind(source.read(np.arange(N)), source.particles, "premultiplied").particles)
    job = parse_job({
        "particles": {"file": "a.star"}, "reference": {"file": "b.mrc"},
        "refine": {"engine": "relion", "image_mask": "zero"},
    })  # fmt: skip
    with pytest.raises(UsageError, match=r"refine\.image_mask"):
        require_engine(job)
