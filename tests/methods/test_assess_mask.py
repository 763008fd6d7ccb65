"""The verdict and the solvent mask: a mask that makes the agreement of the half-maps is noticed, and never ends in
"fine"; a good one changes nothing."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest

from cryoiso.core.types import DensityMap
from cryoiso.methods.anisotropy.filter import filtered, missing_cone
from cryoiso.methods.assess.measure import diagnose
from cryoiso.methods.assess.verdict import MASK_MADE
from cryoiso.metrics.anisotropy import conical_fsc
from cryoiso.metrics.fsc_curve import fsc, randomise_phases, randomise_where, transform
from cryoiso.metrics.mask_effect import mask_effect
from cryoiso.physics.masks import sphere_mask
from cryoiso.physics.phantom import phantom_map
from cryoiso.pipeline.stages.half_maps import make_mask
from cryoiso.report.sections.anisotropy import number_rows, sentences

BOX, PIXEL_A = 40, 5.0


@lru_cache
def pair(noise: float, cone_deg: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Half-maps of the phantom, without a cone about z, in white noise (over the phantom's standard deviation)."""
    truth = np.asarray(phantom_map(BOX, PIXEL_A, 12.0).data, np.float32)
    signal = filtered(truth, missing_cone(BOX, cone_deg)) if cone_deg else truth
    rng = np.random.default_rng(5)
    one, two = (signal + noise * truth.std() * rng.normal(size=truth.shape).astype(np.float32) for _ in (1, 2))
    return one, two


def good_mask(halves: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    return make_mask(DensityMap((halves[0] + halves[1]) / 2, PIXEL_A))


def hard(radius_px: float) -> np.ndarray:
    return sphere_mask(BOX, radius_px, 0).numpy()


@lru_cache
def measured(noise: float, cone_deg: float, radius_px: float | None) -> dict:
    """Diagnosis with a hard sphere; None: with a good mask; 0: without one."""
    halves = pair(noise, cone_deg)
    mask = good_mask(halves) if radius_px is None else hard(radius_px) if radius_px else None
    return diagnose(*halves, mask, PIXEL_A, None, "C1")


@pytest.mark.parametrize("radius_px", [6, 5, 4, 3, 2, 1])
def test_no_mask_makes_an_anisotropic_map_fine(radius_px):
    """A cone of 40° is missing. With these masks cFAR is 0.89 to 0.99, which used to be "fine"."""
    numbers = measured(0.3, 40.0, radius_px)
    verdict, directional = numbers["verdict"], numbers["directional"]
    assert directional["cfar"] > 0.8 and directional["mask"]["cfar_unmasked"] < 0.05
    assert directional["mask"]["share_worst"] > 0.9
    assert verdict["verdict"] == "inconclusive"  # anisotropic, and no poses to tell why
    assert "The mask makes much of the agreement" in verdict["sentence"]
    assert "The map is anisotropic: cFAR 0.00" in verdict["sentence"] and "wider mask" in verdict["advice"]
    names = {e["name"]: e["value"] for e in verdict["evidence"]}
    assert names["cFAR (open definition)"] < 0.05 and names["the same, directions that agree least"] > MASK_MADE


def test_a_soft_mask_that_carries_agreement_into_a_missing_cone_is_noticed():
    """Of half-maps with little noise the FSC is high in every shell, so that no shell's phases would be random; within
    a good mask the missing cone fills with what its neighbours agree on (cFAR 0.83)."""
    halves = pair(0.05, 40.0)
    assert fsc(*halves)[1:-1].min() > 0.9
    numbers = measured(0.05, 40.0, None)
    assert numbers["directional"]["cfar"] > 0.7 and numbers["directional"]["mask"]["share_worst"] > 0.9
    assert numbers["verdict"]["verdict"] == "inconclusive"
    assert "The map is anisotropic: cFAR 0.00" in numbers["verdict"]["sentence"]


@pytest.mark.parametrize("noise", [0.05, 0.5])
def test_a_good_mask_stays_fine(noise):
    numbers = measured(noise, 0.0, None)
    assert numbers["verdict"]["verdict"] == "fine", numbers["verdict"]
    assert numbers["directional"]["mask"]["share_worst"] < 0.4 and "unmasked" not in numbers["directional"]
    assert "mask makes" not in numbers["verdict"]["sentence"]


@pytest.mark.parametrize("radius_px", [6, 3, 1])
def test_an_even_map_in_a_tight_mask_is_not_called_fine(radius_px):
    numbers = measured(0.3, 0.0, radius_px)
    assert numbers["verdict"]["verdict"] == "inconclusive"
    assert "without it there is no anisotropy beyond noise" in numbers["verdict"]["sentence"].lower()
    assert numbers["directional"]["mask"]["cfar_unmasked"] > 0.5


def test_noise_in_a_tight_mask_is_never_fine():
    rng = np.random.default_rng(2)
    noise = rng.normal(size=(2, BOX, BOX, BOX)).astype(np.float32)
    for radius_px in (6, 2, 1):
        assert diagnose(*noise, hard(radius_px), PIXEL_A, None)["verdict"]["verdict"] in ("junk", "inconclusive")


def test_report_and_log_say_it(caplog):
    measured.cache_clear()
    numbers = measured(0.3, 40.0, 3)
    assert "the mask makes much of the half-maps' agreement" in caplog.text
    rows = {label: value for _, label, value, _, _ in number_rows(numbers)}
    assert rows["the same, directions that agree least"] > 90 and rows["cFAR without the mask"] < 0.05
    assert "no number that was measured with it should be quoted" in sentences(numbers)[0]


def test_without_a_mask_there_is_no_effect_of_one():
    numbers = measured(0.3, 40.0, 0)
    assert numbers["directional"]["mask"] is None
    assert diagnose(*pair(0.3, 40.0), np.ones((BOX,) * 3), PIXEL_A, None)["directional"]["mask"] is None


def test_share_of_a_mask_is_that_of_the_randomised_fsc():
    """Where all directions are alike it is Chen's measure: what is left with random phases from one shell on."""
    halves, mask = pair(0.5), hard(5)
    masked = conical_fsc(*(transform(half, mask) for half in halves), BOX, PIXEL_A)
    found = mask_effect(*halves, mask, masked, seed=1)
    start = int(np.flatnonzero(fsc(*halves)[1:] < 0.8)[0]) + 1
    random = fsc(*(randomise_phases(half, start, 1, uid) for uid, half in enumerate(halves, 1)), mask)
    shells = np.arange(start + 2, BOX // 2 + 1)
    plain = (random[shells] * shells**2).sum() / (fsc(*halves, mask)[shells] * shells**2).sum()
    assert found.share == pytest.approx(plain, abs=0.05) and 0.8 < plain < 1.05


def test_randomising_chosen_coefficients_leaves_the_others():
    half = pair(0.5)[0]
    change = np.zeros((BOX, BOX, BOX // 2 + 1), bool)
    change[:, :, 5:] = True
    before, after = transform(half), transform(randomise_where(half, change, 3))
    np.testing.assert_allclose(after[~change], before[~change], atol=1e-3 * np.abs(before).max())
    np.testing.assert_allclose(np.abs(after), np.abs(before), atol=1e-3 * np.abs(before).max())
    assert np.abs(after - before)[change].mean() > 0.5 * np.abs(before)[change].mean()
