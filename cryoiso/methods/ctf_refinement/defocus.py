"""From curves of log-likelihood against defocus to changes: prior width by expectation-maximisation, posterior mode."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

STEP_RAD = 0.2
"""Change of the CTF's phase at the finest resolution between two points of the grid."""
WIDTHS = 40
"""Prior widths that are tried before expectation-maximisation, from half a step to half the range."""
ITERATIONS = 200
TOLERANCE = 1e-4
NO_PRIOR_GAIN = 3.0
"""A width has to be worth this much marginal log-likelihood (p = 0.01); else it is 0."""


def grid_A(range_A: float, wavelength_A: float, finest_A: float) -> Float[np.ndarray, " g"]:
    """(g,) changes of defocus from -range_A to range_A, 0 among them."""
    step = STEP_RAD * finest_A**2 / (math.pi * wavelength_A)
    count = max(2, math.ceil(range_A / step))
    return np.linspace(-range_A, range_A, 2 * count + 1)


def prior_width_A(curves: Float[np.ndarray, "n g"], grid: Float[np.ndarray, " g"]) -> float:
    """Standard deviation s of changes with the prior N(0, s^2) that maximises the marginal likelihood, 0 where no width
    is significantly better than none.

    Expectation-maximisation, s^2 = mean over curves of E[change^2 | data], starts from the best of a series of widths,
    since it converges slowly far from its end.

    Args:
        curves: log-likelihoods at the grid's points.
        grid: changes in Å.
    """
    if not len(curves):
        return 0.0
    top = curves.max(1, keepdims=True)
    likelihood = np.exp((curves - top).astype(np.float64))
    step = float(grid[1] - grid[0])
    none = float(np.log(np.maximum(likelihood[:, len(grid) // 2], 1e-300)).sum())
    widths = np.geomspace(0.5 * step, 0.5 * grid[-1], WIDTHS)
    marginal = [_marginal(likelihood, _prior(grid, s)) for s in widths]
    width = float(widths[int(np.argmax(marginal))])
    for _ in range(ITERATIONS):
        prior = _prior(grid, width)
        square = (likelihood @ (prior * grid**2)) / np.maximum(likelihood @ prior, 1e-300)
        updated = float(np.sqrt(square.mean()))
        done = abs(updated - width) <= TOLERANCE * width
        width = updated
        if done or width < 0.25 * step:
            break
    gain = _marginal(likelihood, _prior(grid, max(width, 1e-3 * step))) - none
    return width if gain > NO_PRIOR_GAIN else 0.0


def _prior(grid: np.ndarray, width_A: float) -> np.ndarray:
    weight: np.ndarray = np.exp(-0.5 * (grid / width_A) ** 2)
    normalised: np.ndarray = weight / weight.sum()
    return normalised


def _marginal(likelihood: np.ndarray, prior: np.ndarray) -> float:
    return float(np.log(np.maximum(likelihood @ prior, 1e-300)).sum())


@dataclass(frozen=True)
class DefocusModes:
    """Posterior modes of n curves."""

    change_A: Float[np.ndarray, " n"]
    gain: Float[np.ndarray, " n"]
    """Log-likelihood at the mode minus that at no change."""
    at_limit: Bool[np.ndarray, " n"]
    """The mode is at an end of the grid."""


def posterior_modes(curves: Float[np.ndarray, "n g"], grid: Float[np.ndarray, " g"], width_A: float) -> DefocusModes:
    """Largest value of log-likelihood plus Gaussian log-prior on the grid, refined by a parabola through three points.

    Args:
        width_A: standard deviation of the prior; 0: no change.
    """
    n, rows = len(curves), np.arange(len(curves))
    if width_A <= 0 or n == 0:
        return DefocusModes(np.zeros(n), np.zeros(n), np.zeros(n, bool))
    values = curves.astype(np.float64)
    posterior = values - 0.5 * (grid / width_A) ** 2
    best = posterior.argmax(1)
    at_limit = (best == 0) | (best == len(grid) - 1)
    inner = np.clip(best, 1, len(grid) - 2)
    below, middle, above = (posterior[rows, inner + k] for k in (-1, 0, 1))
    bend = 2 * middle - below - above
    offset = np.where(bend > 0, 0.5 * (above - below) / np.where(bend > 0, bend, 1.0), 0.0)
    offset = np.where(at_limit, best - inner, np.clip(offset, -0.5, 0.5))
    low, mid, high = (values[rows, inner + k] for k in (-1, 0, 1))
    value = mid + 0.5 * offset * (high - low) + 0.5 * offset**2 * (high - 2 * mid + low)
    step = grid[1] - grid[0]
    return DefocusModes(grid[inner] + offset * step, value - values[:, len(grid) // 2], at_limit)


def errors_A(fisher: Float[np.ndarray, " n"], width_A: float) -> Float[np.ndarray, " n"]:
    """(n,) standard deviation of the true change about the mode: 1 / sqrt(F + 1 / s^2), F the Fisher information in
    1/Å^2; 0 for a width s of 0."""
    if width_A <= 0:
        return np.zeros(len(fisher))
    error: np.ndarray = 1.0 / np.sqrt(fisher + 1.0 / width_A**2)
    return error
