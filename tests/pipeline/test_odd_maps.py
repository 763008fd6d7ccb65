"""Reference maps as databases have them: any box, any order of axes, voxels that are no cubes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from errors_helper import raises_code
from model_helper import odd

from cryoiso.core.errors import InputError
from cryoiso.io.mapbox import read_map_box
from cryoiso.physics.filters import lowpass
from cryoiso.physics.phantom import phantom_map
from cryoiso.physics.resample import resample_map
from cryoiso.pipeline.inputs.reference import prepare_reference

BOX, PIXEL_A = 48, 4.0


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    return phantom_map(BOX, PIXEL_A, 12.0, seed=3).data


def reference(path: Path, box_px: int = BOX, pixel_A: float = PIXEL_A, **how: object):
    return prepare_reference(path, box_px, pixel_A, 30.0, resample=True, **how)


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 2, 1), (2, 3, 1), (3, 1, 2), (1, 3, 2), (2, 1, 3)])
def test_any_order_of_axes_and_start_gives_the_same_map(tmp_path, truth, order):
    made = reference(odd(tmp_path / "a.mrc", truth, (PIXEL_A,) * 3, order, start=(-24, 5, 7)))
    np.testing.assert_array_equal(made.map.data, truth)
    assert made.facts["map"]["mapc_mapr_maps"] == list(order)


@pytest.mark.parametrize("order", [(1, 2, 3), (2, 3, 1)])
def test_a_box_that_is_no_cube_keeps_its_middle_voxel_in_the_centre(tmp_path, truth, order):
    crop = truth[3:45, 2:46, 4:44]  # voxel n // 2 of every axis is voxel 24 of the whole
    path = odd(tmp_path / "a.mrc", crop + 5.0, (PIXEL_A,) * 3, order, start=(9, -3, 1))
    made = reference(path)
    inside = np.zeros_like(truth, bool)
    inside[3:45, 2:46, 4:44] = True
    edge = np.abs(truth[~inside]).max()
    assert np.abs(made.map.data - truth)[inside].max() < max(1e-4 * truth.max(), edge)
    assert made.facts["map"]["box_px"] == [40, 44, 42] and "40 x 44 x 42 px" in made.source


def test_voxels_that_are_no_cubes_and_pixels_of_any_size(tmp_path, truth):
    """Every second voxel along z of a map that has nothing finer than such voxels hold, on a grid of 4.6 Å."""
    smooth = np.asarray(lowpass(truth, PIXEL_A, 20.0))
    path = odd(tmp_path / "a.mrc", smooth[::2], (PIXEL_A, PIXEL_A, 2 * PIXEL_A))
    made = reference(path, 41, 4.6)
    assert not read_map_box(path).is_plain and "4 x 4 x 8 Å" in made.source
    expected = resample_map(smooth, PIXEL_A, 41, 4.6)
    assert np.linalg.norm(made.map.data - expected) < 0.01 * np.linalg.norm(expected)


def test_clear_errors(tmp_path, truth):
    path = odd(tmp_path / "a.mrc", truth[:40], (PIXEL_A,) * 3)
    with raises_code("grid-mismatch", InputError, match="48 x 48 x 40 px of 4 Å.*reference.resample"):
        prepare_reference(path, BOX, PIXEL_A, 30.0)
    with raises_code("reference-size-mismatch", InputError):
        reference(path, 24, 3.0)
    with raises_code("pixel-size-missing", InputError):
        reference(odd(tmp_path / "b.mrc", truth[:40], (PIXEL_A, PIXEL_A, 0.0)))
    bad = truth[:40].copy()
    bad[3, 3, 3] = np.nan
    with raises_code("map-not-finite", InputError):
        reference(odd(tmp_path / "c.mrc", bad, (PIXEL_A,) * 3))


def test_a_real_map_that_is_no_cube(shared_data):
    made = reference(shared_data / "maps/emd_7795_1.8A_84x58x62.mrc", 80, 1.9)
    assert made.map.data.shape == (80, 80, 80) and made.map.data.max() > 0
    total = read_map_box(shared_data / "maps/emd_7795_1.8A_84x58x62.mrc")
    mass = float(np.asarray(total.data, np.float64).sum()) * np.prod(total.voxel_A)
    assert float(made.map.data.sum(dtype=np.float64)) * 1.9**3 == pytest.approx(mass, rel=0.02)
