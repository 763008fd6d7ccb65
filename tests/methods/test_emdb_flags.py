"""EMDB's flags: each raised by a curve or map made for it, none by an ordinary one; the rule, written anew."""

from __future__ import annotations

import numpy as np
import pytest

from cryoiso.methods.assess.emdb_flags import emdb_flags, sentences

SHELLS = np.arange(65)
ORDINARY = 1 / (1 + np.exp((SHELLS - 35) / 5))


def raised(curve, primary=None):
    return {flag["name"] for flag in emdb_flags(curve, primary) if flag["raised"]}


def test_an_ordinary_curve_raises_nothing():
    noise = 0.02 * np.random.default_rng(0).standard_normal(65)
    assert raised(ORDINARY + noise) == set()


@pytest.mark.parametrize(
    ("name", "curve"),
    [
        ("FSC minimum", ORDINARY - 0.15 * np.exp(-(((SHELLS - 55) / 3) ** 2))),
        ("FSC end", 0.15 + 0.85 * ORDINARY),
        ("FSC peaks", ORDINARY * 0.5 + 0.45 * np.cos(SHELLS / 2.4) ** 2 * (SHELLS < 55)),
        ("FSC slope", np.where(SHELLS < 30, 1.0, 0.0)),
    ],
)
def test_each_flag_has_its_curve(name, curve):
    assert name in raised(curve)


def test_the_first_shells_are_not_looked_at():
    curve = ORDINARY.copy()
    curve[:5] = -1
    assert raised(curve) == set()


def test_values_follow_the_rule_of_the_archive():
    rng = np.random.default_rng(7)
    curve = np.clip(ORDINARY + 0.1 * rng.standard_normal(65), -1, 1)
    values = {flag["name"]: flag["value"] for flag in emdb_flags(curve)}
    seen = curve[5:]
    slopes = [abs(np.mean(np.diff(seen[i - 5 : i]))) for i in range(5, len(seen))]
    assert values["FSC slope"] == pytest.approx(max(slopes))
    assert values["FSC minimum"] == seen.min() and values["FSC end"] == seen[-1]


def test_a_masked_map_is_flagged():
    rng = np.random.default_rng(1)
    density = rng.standard_normal((24,) * 3)
    assert raised(None, density) == set()
    ball = ((np.indices(density.shape) - 12) ** 2).sum(0) < 81
    assert raised(None, density * ball) == {"primary map masked"}
    words = sentences(emdb_flags(None, density * ball))
    assert len(words) == 1 and "masked" in words[0]


def test_short_and_missing_curves_are_passed_over():
    assert emdb_flags(ORDINARY[:8]) == [] and emdb_flags(None) == []
