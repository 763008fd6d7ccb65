"""The phantom and a particle set of it that tests of the likelihood and the search share."""

from __future__ import annotations

import pytest
from likelihood_helper import BOX, PIXEL_A

from cryoiso.core.types import DensityMap
from cryoiso.physics.phantom import phantom_map
from cryoiso.physics.simulation import SimulatedSource, simulate


@pytest.fixture(scope="module")
def truth() -> DensityMap:
    return phantom_map(BOX, PIXEL_A, 14.0)


@pytest.fixture(scope="module")
def source(truth: DensityMap) -> SimulatedSource:
    """60 particles of the phantom at 0 dB."""
    return simulate(truth, 60, snr_db=0.0, shift_sd_A=8.0, seed=7)
