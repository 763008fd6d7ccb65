"""Images without power in some shells: low-passed, padded or denoised stacks, and those beside ordinary ones."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
from errors_helper import raises_code
from mixed_helper import two_microscopes
from test_refine_engine import BOX, PIXEL_A, errors_of, in_memory, request_for

from cryoiso.core.errors import InputError
from cryoiso.engines.native import NativeEngine
from cryoiso.io.mrc import read_map
from cryoiso.io.sources import ArraySource
from cryoiso.methods.assess.measure import diagnose
from cryoiso.metrics.fsc_curve import fsc, fsc_corrected
from cryoiso.parallel.context import Context
from cryoiso.physics.masks import sphere_mask
from cryoiso.physics.phantom import phantom_map
from cryoiso.physics.simulation import simulate
from cryoiso.refine import noise
from cryoiso.refine.initial_model import initial_model
from cryoiso.refine.iterate import Refinement
from cryoiso.refine.reconstruct import reconstruct_halves, reconstruct_references

N, CUT = 160, 11
CUT_A = BOX * PIXEL_A / CUT


def filtered(source: ArraySource, keep, rows=slice(None)) -> ArraySource:
    """The images of some rows with their coefficients times ``keep(radius)``, through float16 as shards store them."""
    f = np.fft.fftfreq(BOX) * BOX
    factor = keep(np.hypot(f[:, None], np.arange(BOX // 2 + 1)[None]))
    images = np.array(source.read(np.arange(len(source.particles))))
    images[rows] = np.fft.irfft2(np.fft.rfft2(images[rows]) * factor, s=(BOX, BOX)).astype(np.float16)
    other = ArraySource(images.astype(np.float32), source.particles)
    other.truth = source.truth
    return other


@pytest.fixture(scope="module")
def whole() -> ArraySource:
    return in_memory(simulate(phantom_map(BOX, PIXEL_A, 14.0), N, snr_db=-3.0, shift_sd_A=4.0, seed=9))


def refined(source, folder, **settings):
    result = NativeEngine().refine(request_for(source, folder, **{"max_iterations": 3, **settings}), Context())
    return result, [read_map(result.half_maps[half]).data for half in (1, 2)]


def test_a_low_passed_stack_gives_the_map_of_the_whole_one(whole, tmp_path, caplog):
    """Its noise beyond the cut is rounding error, 1e-8 of what is before; its inverse ended the second iteration."""
    with caplog.at_level(logging.WARNING, "cryoiso"):
        result, halves = refined(filtered(whole, lambda r: r <= CUT), tmp_path / "low")
    assert f"optics group 1 (opticsGroup1) have no power beyond {BOX * PIXEL_A / (CUT + 1):.2f} Å" in caplog.text
    expected, plain = refined(whole, tmp_path / "whole", max_resolution_A=CUT_A - 0.01)
    errors = errors_of(result.particles, whole.particles, "C3")
    assert errors.median_deg < 5 and errors.fraction_over(20) < 0.05
    assert abs(errors.median_deg - errors_of(expected.particles, whole.particles, "C3").median_deg) < 0.2
    for mine, theirs in zip(halves, plain, strict=True):
        assert fsc(mine, theirs)[1 : CUT + 1].min() > 0.995
        assert np.vdot(mine, theirs) / np.vdot(theirs, theirs) == pytest.approx(1, abs=0.01)
    # nothing is claimed where there is nothing, and nothing is left that a mask would correlate
    assert result.resolution_A >= CUT_A - 1e-9
    assert result.iterations[-1]["resolution_unmasked_A"] >= CUT_A - 1e-9
    power = np.abs(np.fft.fftn(halves[0])) ** 2
    f = np.fft.fftfreq(BOX) * BOX
    radius = np.sqrt(f[:, None, None] ** 2 + f[:, None] ** 2 + f**2)
    assert power[np.rint(radius) > CUT].max() < 1e-10 * power.max()
    summary = json.loads((tmp_path / "low" / "refine.json").read_text())
    band = {"optics_group": 1, "name": "opticsGroup1", "from_A": 16.0, "to_A": None, "shells": [12, 16]}
    assert summary["empty_shells"] == [band]
    assert summary["noise_variance"][0][CUT + 1 :] == [None] * 5 and None not in summary["noise_variance"][0][: CUT + 1]
    assert "empty_shells" not in json.loads((tmp_path / "whole" / "refine.json").read_text())


def test_soft_edges_and_missing_low_shells(whole, tmp_path):
    """A soft edge falls through all small values, a high-pass leaves the first shells empty."""
    edge = lambda r: 0.5 + 0.5 * np.cos(np.pi * np.clip((r - 8) / 5, 0, 1))  # noqa: E731
    soft, _ = refined(filtered(whole, edge), tmp_path / "soft")
    errors = errors_of(soft.particles, whole.particles, "C3")
    assert errors.median_deg < 6 and errors.fraction_over(20) < 0.08
    high, _ = refined(filtered(whole, lambda r: (r > 2.5) | (r == 0)), tmp_path / "high")
    errors = errors_of(high.particles, whole.particles, "C3")
    assert errors.median_deg < 6 and errors.fraction_over(20) < 0.08
    summary = json.loads((tmp_path / "high" / "refine.json").read_text())
    assert [band["shells"] for band in summary["empty_shells"]] == [[1, 2]] and high.resolution_A < 20


def test_one_low_passed_optics_group_among_others(tmp_path, caplog):
    """It adds nothing beyond its cut; the other group's data still count there."""
    source = two_microscopes(80, BOX, PIXEL_A, 5.2, snr_db=-3.0, shift_sd_A=5.0)
    group = int(source.particles.optics[0])
    mixed = filtered(source, lambda r: r <= 9, source.particles.optics != group)
    with caplog.at_level(logging.WARNING, "cryoiso"):
        run = Refinement(request_for(mixed, None), Context(), "cpu", 145.0)
        model = initial_model(run, 40.0)
    assert caplog.text.count("no power beyond") == 1 and run.limit == (BOX - 1) // 2 and len(run.empty) == 0
    assert np.isfinite(model.sigma2[group]).all() and np.isinf(model.sigma2[1 - group][10:]).all()
    stepped = run.step(model)
    assert np.isinf(stepped.sigma2[1 - group][10:]).all() and np.isfinite(stepped.sigma2[1 - group][:10]).all()
    with_both = Refinement(request_for(source, None), Context(), "cpu", 145.0)
    alike = with_both.step(initial_model(with_both, 40.0))
    for half in (1, 2):
        assert fsc(stepped.half_maps[half], alike.half_maps[half])[1:10].min() > 0.98


def test_constant_images_of_a_group_are_an_error(whole):
    flat = replace(whole.particles, groups=whole.particles.groups * 2, optics=np.arange(N, dtype=np.int32) % 2)
    source = filtered(whole, lambda r: r > -1)
    source = ArraySource(np.where((np.arange(N) % 2 == 1)[:, None, None], 0, source.read(np.arange(N))), flat)
    source.truth = whole.truth
    with pytest.raises(InputError, match=r"row 2: the image 2@.* is constant \(80 images in all\)"):
        initial_model(Refinement(request_for(source, None), Context(), "cpu", 145.0), 40.0)


def test_maps_of_low_passed_images_claim_nothing_beyond(whole, caplog):
    """A mask makes what leaks beyond the cut agree: FSC corrected for it 0.3 up to Nyquist, 12 Å, was claimed."""
    maps = {}
    for name, source in (("low", filtered(whole, lambda r: r <= 8)), ("whole", whole)):
        with caplog.at_level(logging.WARNING, "cryoiso"):
            halves = reconstruct_halves(source, source.particles, Context(), symmetry="C3")
        maps[name] = [halves[h].data for h in (1, 2)]
    assert caplog.text.count("no power beyond 21.33 Å; the map ends there") == 2  # once a half, of one set only
    for mine, theirs in zip(maps["low"], maps["whole"], strict=True):
        curve = fsc(mine, theirs)  # beside the cut, data are interpolated from both sides of it
        assert curve[1:6].min() > 0.999 and curve[1:8].min() > 0.99
    mask = sphere_mask(BOX, 9, 4.0).numpy()
    curves = fsc_corrected(*maps["low"], mask, seed=1)
    assert curves["last_shell"] == 8 and all(not curves[k][9:].any() for k in ("unmasked", "masked", "corrected"))
    assert fsc_corrected(*maps["whole"], mask, seed=1)["last_shell"] == BOX // 2
    numbers = diagnose(*maps["low"], mask, PIXEL_A, None, "C3")
    assert numbers["data_to_A"] == 24 and any("nothing beyond 24.00 Å" in note for note in numbers["notes"])
    assert numbers["resolution_0143_A"] == numbers["resolution_0143_masked_A"] == 24
    directions = numbers["directional"]
    assert min(directions["resolution_A"]) == 24 and not any(directions["cfsc_max"][9:])
    assert directions["expected"]["even"]["cfar"] > 0.8
    assert diagnose(*maps["whole"], mask, PIXEL_A, None, "C3")["data_to_A"] is None
    plain, _, curve = reconstruct_references(
        filtered(whole, lambda r: r <= 8), whole.particles, Context(), symmetry="C3", diameter_A=145.0
    )
    assert not curve[9:].any() and curve[1:6].min() > 0.9 and np.array_equal(plain[1].data, maps["low"][0])


# --- one bad image among good ones


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (np.nan, r"row 8: the image 8@.* has NaN or infinite pixels"),
        (0.0, r"row 8: the image 8@.* is constant"),
        (1e4, r"row 8: 1 of 160 images have most of the total power: 8@.*at most 100 times"),
    ],
)
def test_one_bad_image_is_named(whole, factor, words):
    """It ended in "the reference does not match the images"."""
    images = np.array(whole.read(np.arange(N)))
    images[7] = images[7] * factor
    with pytest.raises(InputError, match=words):
        initial_model(Refinement(request_for(of_images(whole, images), None), Context(), "cpu", 145.0), 40.0)


def of_images(source: ArraySource, images: np.ndarray, **columns) -> ArraySource:
    other = ArraySource(images, replace(source.particles, **columns))
    other.truth = source.truth
    return other


def test_one_bad_defocus_and_a_strong_image(whole, caplog):
    images = np.array(whole.read(np.arange(N)))
    defocus = whole.particles.defocus_u_A.copy()
    defocus[30] = np.nan
    source = of_images(whole, images, defocus_u_A=defocus)
    with pytest.raises(InputError, match=r"row 31: the image 31@.* a CTF that is not a number.*U, V, angle = nan"):
        initial_model(Refinement(request_for(source, None), Context(), "cpu", 145.0), 40.0)
    images[7] = images[7] * 11
    with caplog.at_level(logging.WARNING, "cryoiso"):
        initial_model(Refinement(request_for(of_images(whole, images), None), Context(), "cpu", 145.0), 40.0)
    assert "1 of 160 images are far stronger than the others: 8@" in caplog.text


def test_optics_groups_of_other_scales_are_sound(whole):
    """Images that were not normalised: another microscope's may be a hundred times as strong."""
    power = np.concatenate([np.full(20, 1.0), np.full(20, 1e4)])
    particles = whole.particles.take(np.arange(40))
    particles = replace(particles, groups=(*particles.groups[:1], replace(particles.groups[0], number=2)),
                        optics=np.repeat([0, 1], 20).astype(np.int32))  # fmt: skip
    noise.require_sound_images(particles, np.stack([power, np.ones(40)], 1))
    power[3] = 1e4  # as strong as the other group's, but not for its own
    with raises_code("image-unusable", InputError) as caught:
        noise.require_sound_images(particles, np.stack([power, np.ones(40)], 1))
    assert caught.value.row == 4
    medians = noise.group_medians(power[:, None], particles.optics, np.arange(40) < 20)
    assert medians[:20, 0].tolist() == [1.0] * 20 and medians[20:, 0].tolist() == [1.0] * 20


# --- the parts


def test_a_floor_under_spectra_keeps_those_of_ordinary_images(whole):
    rng = np.random.default_rng(1)
    ordinary = rng.uniform(0.1, 20, (2, 17))
    assert np.array_equal(noise.floored(ordinary, np.ones((2, 17))), ordinary)
    low = ordinary.copy()
    low[0, 5], low[1, 7:] = 1e-9, 1e-8
    previous = np.ones((2, 17))
    previous[1, 7:] = np.inf
    found = noise.floored(low, previous)
    assert found[0, 5] == 1e-4 * np.median(low[0, 1:]) and np.isinf(found[1, 7:]).all()
    assert np.array_equal(found[1, :7], low[1, :7])


def test_weights_of_small_variances_are_scaled_by_a_power_of_two():
    assert noise.weight_scale(np.array([[1.0, 0.5, 1 / 64, np.inf]])) == 1
    scale = noise.weight_scale(np.array([[1.0, 1e-4, np.inf]]))
    assert scale == 2.0**-8 and 1e-4**-1 * scale <= noise.LARGEST_WEIGHT


def test_bands_are_named_by_group(whole):
    groups = (whole.particles.groups[0], replace(whole.particles.groups[0], number=5, name="b", pixel_size_A=3.0))
    power = np.ones((2, 17))
    power[0, 1:3], power[1, 9:] = 1e-7, 0.0
    count = np.ones((2, 17))
    spectra = noise.mean_spectra(power, count, groups)
    with pytest.raises(InputError, match=r"the images of optics group 5 \(b\) are constant"):
        noise.mean_spectra(power * np.array([[1.0], [0.0]]), count, groups)
    facts = noise.empty_facts(spectra, groups, 32)
    assert [(f["optics_group"], f["from_A"], f["to_A"], f["shells"]) for f in facts] == [
        (1, 192.0, 96.0, [1, 2]), (5, 10.667, None, [9, 16]),
    ]  # fmt: skip
    both = replace(whole.particles, groups=groups, optics=np.arange(N, dtype=np.int32) % 2)
    one, two = (replace(both, optics=np.full(N, k, np.int32)) for k in (0, 1))
    # the second group's shell 8 is at the frequency of the first one's 16
    assert noise.last_shell(spectra, both, 6.0, 15) == 15 and noise.last_shell(spectra, two, 6.0, 20) == 16
    assert noise.last_shell(spectra, two, 3.0, 15) == 8
    assert noise.empty_between(spectra, one, 6.0, 15).tolist() == [1, 2]
    assert noise.empty_between(spectra, both, 6.0, 15).tolist() == []
