"""Do particles confirm their reference? The right one, a homologue of known likeness, a random fold, a mirror image."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from cryoiso.methods.audit import confirmed
from cryoiso.methods.audit.confirmed import BandGrid, ReferenceCorrelation
from cryoiso.methods.audit.likeness import Band, filtered
from cryoiso.physics.filters import power_spectrum
from cryoiso.physics.symmetry import point_group
from cryoiso.pipeline.audit.controls import reference as control

BOX, PIXEL_A, LOWPASS_A, DIAMETER_A = 32, 5.0, 30.0, 120.0
C3 = point_group("C3")
BAND = confirmed.band_of(LOWPASS_A, 13.0, BOX, PIXEL_A)


def outline() -> np.ndarray:
    """A long body, so that outline alone makes unrelated densities alike."""
    z, y, x = np.indices((BOX,) * 3) - BOX // 2
    return (z / 11) ** 2 + (y / 8) ** 2 + (x / 8) ** 2 <= 1


ORBIT = confirmed.representatives(BOX, C3)
EVEN = np.exp(-0.5 * ((np.arange(BOX // 2 + 1) - 4) / 6) ** 2)


def model() -> np.ndarray:
    """A density with the spectrum that all others get."""
    from cryoiso.physics.filters import apply_radial

    white = np.random.default_rng(0).standard_normal((BOX,) * 3)
    return np.asarray(apply_radial(white, EVEN), np.float64)


def fold(number: int) -> np.ndarray:
    """A random fold in the outline; numbers that `confirm` with seed 0 does not draw."""
    return np.asarray(confirmed.random_density(outline().astype(float), ORBIT, model(), 77, number), np.float64)


def half_maps(truth: np.ndarray, noise: float, seed: int = 5) -> list[np.ndarray]:
    """Truth and independent noise, as strong as ``noise`` times the truth in the band."""
    made = []
    for half in (1, 2):
        white = np.random.default_rng([seed, half]).standard_normal((BOX,) * 3).ravel()[ORBIT]
        scale = noise * filtered(truth, BAND).std() / filtered(white, BAND).std()
        made.append(truth + scale * white)
    return made


def confirm(truth: np.ndarray, reference: np.ndarray, noise: float = 1.0, seed: int = 5) -> ReferenceCorrelation:
    first, second = half_maps(truth, noise, seed)
    return confirmed.confirm(
        (first + second) / 2, (first, second), reference, confirmed.mirror_image(reference), outline(), BAND, PIXEL_A,
        DIAMETER_A, C3,
    )  # fmt: skip


@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_the_right_reference_has_correlation_1_whatever_the_noise(noise):
    found = confirm(fold(1), fold(1), noise)
    assert found.value == pytest.approx(1, abs=0.1) and control.verdict_of(found) == "pass"
    assert found.mirror < 0.5 and found.reached == 0


def test_the_likeness_of_a_homologue_is_recovered():
    truth, other = fold(1), fold(2)
    for share in (0.6, 0.8):
        homologue = share * truth + np.sqrt(1 - share**2) * other
        low, high = confirm(truth, homologue).interval
        assert low < share < high


def test_other_folds_and_the_mirror_image_of_the_truth_are_not_confirmed():
    truth = fold(1)
    found = [confirm(truth, fold(number)) for number in range(10, 14)]
    assert [control.verdict_of(one) for one in found] == ["fail"] * 4
    values, errors = (np.array([getattr(one, k) for one in found]) for k in ("value", "error"))
    assert np.abs(values / errors).max() < 4
    mirrored = confirm(truth, confirmed.mirror_image(truth))
    assert control.verdict_of(mirrored) != "pass" and mirrored.mirror == pytest.approx(1, abs=0.1)


def test_pure_noise_confirms_nothing():
    nothing = half_maps(fold(1), 1.0)
    first, second = (half - fold(1) for half in nothing)
    found = confirmed.confirm(
        (first + second) / 2, (first, second), fold(1), fold(2), outline(), BAND, PIXEL_A, DIAMETER_A, C3
    )
    assert control.verdict_of(found) != "pass" and abs(found.value) < 4 * found.error


@pytest.mark.parametrize(
    ("lowpass_A", "resolution_A", "finest_A", "may_refute"),
    [
        (30, 8, 15, True),
        (40, 8, 20, True),
        (30, 18, 18, True),
        (20, 5, 15, True),  # to 10 Å a homologue of 53 % identity has 0.57, to 15 Å 0.70
        (15, 5, 7.5, False),
        (10, 3, 5, False),
        (16, 8, 8, False),  # no two shells before 15 Å
    ],
)
def test_only_shells_in_which_a_homologue_would_agree_refute_a_reference(lowpass_A, resolution_A, finest_A, may_refute):
    """A right homologue of 53 % identity at 10 Å, with a correlation of 0.22, was called another molecule."""
    band = confirmed.band_of(lowpass_A, resolution_A, 192, 1.25)
    assert band.last == int(240 / finest_A)
    decoys = np.full(60, 0.02)
    unlike = ReferenceCorrelation(0.22, decoys, 0.05, 240 / band.last)
    assert unlike.may_refute == may_refute
    assert control.verdict_of(ReferenceCorrelation(0.9, decoys, 0.3, 240 / band.last)) == "pass"
    assert control.verdict_of(ReferenceCorrelation(0.1, decoys, 0.05, 240 / band.last)) == (
        "fail" if may_refute else "inconclusive"
    )
    small = confirmed.band_of(20, 5, 72, 2.4)
    assert small.last == 17, "to 10 Å, since no two shells lie before 15 Å; there it may refute"
    sentence = control.judged(unlike, lowpass_A, (band.first, band.last)).sentence
    assert ("Finer than 10 Å a right homologue may have as little" in sentence) != may_refute
    assert ("another molecule" in sentence) == may_refute


def test_half_maps_without_any_agreement_give_no_number():
    first = fold(1)
    found = confirmed.confirm(
        first, (first, -first), first, fold(2), outline(), BAND, PIXEL_A, DIAMETER_A, C3
    )  # fmt: skip
    assert np.isnan(found.value) and control.verdict_of(found) == "inconclusive"
    record = control.judged(found, LOWPASS_A, (6, 10))
    assert "do not agree" in record.sentence and record.as_dict()["number"] is None


def test_decoys_have_the_symmetry_and_spectrum_of_the_reference():
    one = fold(3)
    np.testing.assert_allclose(power_spectrum(one, 3)[3:12], power_spectrum(model(), 3)[3:12], rtol=0.2)
    odd = np.ones((9, 9, 9))
    quarter = confirmed.random_density(odd, confirmed.representatives(9, point_group("C4")), odd, 1, 0)
    np.testing.assert_allclose(np.rot90(quarter, axes=(1, 2)), quarter, atol=1e-5 * np.abs(quarter).max())


@pytest.mark.parametrize("box", [8, 9])
def test_a_mirror_image_keeps_the_centre_and_twice_is_once(box):
    some = np.random.default_rng(0).standard_normal((box,) * 3)
    mirrored = confirmed.mirror_image(some)
    np.testing.assert_array_equal(mirrored[:, :, box // 2], some[:, :, box // 2])
    np.testing.assert_array_equal(mirrored[:, :, box // 2 + 2], some[:, :, box // 2 - 2])
    np.testing.assert_array_equal(confirmed.mirror_image(mirrored), some)


def test_a_coarser_grid_keeps_shells_and_numbers():
    band, truth = Band(5, 8), fold(1)
    grid = BandGrid.of(band, BOX, PIXEL_A)
    assert grid.box_px == 24 and grid.box_px * grid.pixel_size_A == pytest.approx(BOX * PIXEL_A)
    from cryoiso.metrics.fsc_curve import fsc

    pair = truth, truth + 0.5 * fold(2)
    fine, coarse = fsc(*pair), fsc(*(grid.take(v, PIXEL_A) for v in pair))
    np.testing.assert_allclose(coarse[:9], fine[:9], atol=1e-3)


def confirmation(value: float, rms: float, mirror: float = 0.0) -> ReferenceCorrelation:
    return ReferenceCorrelation(value, rms * np.array([1.0, -1.0]), mirror, 16.0)


@pytest.mark.parametrize(
    ("found", "verdict", "words"),
    [
        (confirmation(0.8, 0.1), "pass", "confirm the reference"),
        (confirmation(0.1, 0.1), "fail", "do not confirm"),
        (confirmation(0.35, 0.2), "inconclusive", "neither confirm nor refute"),
        (confirmation(0.8, 0.1, mirror=0.75), "inconclusive", "mirror image"),
    ],
)
def test_verdict_and_sentence(found, verdict, words):
    record = control.judged(found, 30.0, (7, 19))
    assert record.verdict == verdict and words in record.sentence


class Grid:
    """What the control asks of a run before it reads its maps."""

    def __init__(self, lowpass_A: float, resolution_A: float, box_px: int, pixel_size_A: float) -> None:
        self.job = SimpleNamespace(reference=SimpleNamespace(lowpass_A=lowpass_A))
        self.resolution_A, self.box_px, self.pixel_size_A = resolution_A, box_px, pixel_size_A


@pytest.mark.parametrize(
    ("grid", "why", "advice"),
    [
        (Grid(30, 26, 64, 4.0), "and the resolution of 26.0 Å", "coarser first reference (reference.lowpass_A = 50)"),
        (Grid(30, 45, 64, 4.0), "the resolution of 45.0 Å is no finer than", "refine more particles."),
        (Grid(60, 4, 48, 3.0), "(60 Å) and half of that, 30 Å", "finer first reference (reference.lowpass_A = 30)"),
        (Grid(30, 7, 24, 3.0), "box of 72 Å has too few", "finer first reference (reference.lowpass_A = 20)"),
    ],
    ids=["hardly finer", "coarser", "small box, coarse reference", "small box"],
)  # fmt: skip
def test_a_run_without_shells_to_compare_says_why_and_what_helps(grid, why, advice):
    record = control.record(grid, None, {})  # type: ignore[arg-type]
    assert record.verdict == "inconclusive" and why in record.sentence and advice in record.sentence
    assert "hardly finer" not in record.sentence


@pytest.mark.parametrize(
    ("lowpass_A", "resolution_A", "better_A"),
    [(30, 5, None), (28, 5, None), (10, 5, 30), (20, 5, 30), (40, 5, 30), (60, 5, 30), (30, 22, 40), (50, 22, None)],
)
def test_a_low_pass_filter_is_advised_only_where_it_leaves_more_shells(lowpass_A, resolution_A, better_A):
    assert confirmed.better_lowpass(lowpass_A, resolution_A, 192, 1.25) == better_A


@pytest.mark.parametrize("box_px", [24, 48, 72, 96, 128, 220, 300, 512])
@pytest.mark.parametrize("pixel_size_A", [0.65, 1.06, 2.4, 4.0])
def test_bands_stay_within_the_box_and_the_resolution_and_advice_leads_to_a_band(box_px, pixel_size_A):
    for lowpass_A in (5, 8, 10, 15, 20, 25, 30, 45, 60):
        for resolution_A in (2 * pixel_size_A, 3.0, 9.9, 15.0, 28.0, 70.0, np.inf):
            grid = resolution_A, box_px, pixel_size_A
            band, better_A = confirmed.band_of(lowpass_A, *grid), confirmed.better_lowpass(lowpass_A, *grid)
            if band.usable:
                assert band.last < box_px // 2 and box_px * pixel_size_A / band.last >= resolution_A - 1e-6
                assert box_px * pixel_size_A / band.first < lowpass_A
            assert better_A is None or confirmed.band_of(better_A, *grid).usable


def test_sentence_and_caption_name_the_shells_that_were_compared():
    record = control.judged(confirmation(0.35, 0.2), 20.0, (12, 15), "Refine more.")
    assert "Between 20.0 and 16.0 Å" in record.sentence and record.sentence.endswith("Refine more.")
    assert record.figure is not None and "between 20.0 and 16.0 Å" in record.figure.caption
