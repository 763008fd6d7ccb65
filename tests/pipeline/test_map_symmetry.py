"""Maps and masks that meet a point group: right and noisy ones pass; axes elsewhere are found, named and moved."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
from pipeline_helper import cryoiso_here

from cryoiso.core.errors import EXIT_INPUT, InputError
from cryoiso.core.types import DensityMap
from cryoiso.io.mrc import read_map, write_map
from cryoiso.metrics.mapmodel import correlation
from cryoiso.physics.filters import lowpass
from cryoiso.physics.fit import apply_fit
from cryoiso.physics.map_symmetry import find_frame, map_symmetry, symmetry_score
from cryoiso.physics.phantom import pseudo_atoms_to_map, trimer
from cryoiso.physics.so3 import rotvec_to_matrix
from cryoiso.physics.symmetry import cryosparc_turn, generators, point_group
from cryoiso.pipeline.inputs.standard_frame import (
    mask_correlation,
    require_mask_symmetry,
    require_symmetry,
    warn_of_symmetry,
)

BOX, PIXEL = 36, 5.0


def turn(axis, deg: float) -> np.ndarray:
    return rotvec_to_matrix(np.radians(deg) * np.asarray(axis, float))[0]


@lru_cache(maxsize=32)
def atoms(group: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pseudo-atoms of an object of this point group and no more."""
    coords, weight, sigma = trimer(1)
    if group == "C3":
        return coords, weight, sigma
    third = len(coords) // 3
    one, weight, sigma = coords[:third] - coords[:third].mean(0), weight[:third], sigma[:third]
    ops = point_group(group)
    if len(ops) > 1:
        one = one * 0.6 + np.array([22.0, 14.0, 19.0])
    return np.concatenate([one @ op.T for op in ops]), np.tile(weight, len(ops)), np.tile(sigma, len(ops))


def density(group: str, rotation=None, shift_A=(0, 0, 0), noise: float = 0.0) -> DensityMap:
    """The exact density of the object after x -> R x + d; ``noise``: standard deviation over that of the map."""
    coords, weight, sigma = atoms(group)
    moved = coords @ (np.eye(3) if rotation is None else rotation).T + np.asarray(shift_A)
    found = pseudo_atoms_to_map(moved, weight, sigma, BOX, PIXEL, 13.0)
    white = np.random.default_rng(1).standard_normal(found.data.shape).astype(np.float32)
    return DensityMap(found.data + np.float32(noise * found.data.std()) * white, PIXEL)


def lowpassed(full: DensityMap, resolution_A: float) -> DensityMap:
    return DensityMap(np.asarray(lowpass(full.data, full.pixel_size_A, resolution_A), np.float32), full.pixel_size_A)


@pytest.mark.parametrize("group", ["C2", "C3", "C7", "D2", "D3", "D4", "T", "O", "I1", "I3"])
def test_what_has_the_group_in_the_standard_frame_passes(group):
    found = require_symmetry(density(group), group, "a.mrc", 30.0)
    assert found.verdict == "has it" and found.score > 0.93 and found.frame is None


@pytest.mark.parametrize("group", ["C3", "C5", "D2", "O"])
@pytest.mark.parametrize("resolution_A", [40.0, 60.0])
def test_a_low_passed_map_is_looked_at_where_it_has_density(group, resolution_A):
    """Beyond, flattened rounding errors would hide the symmetry."""
    found = require_symmetry(lowpassed(density(group), resolution_A), group, "a.mrc", resolution_A)
    assert found.score > 0.65 and found.frame is None


def test_a_low_passed_map_with_its_axis_elsewhere_is_still_refused():
    for wrong in (density("C3", turn([1, 0, 0], 25)), density("C3", shift_A=(20, 0, 0)), density("C1")):
        with pytest.raises(InputError, match="symmetry C3"):
            require_symmetry(lowpassed(wrong, 40.0), "C3", "a.mrc", 40.0)


@pytest.mark.parametrize(
    ("group", "rotation", "shift_A", "tilt_deg", "offset_A"),
    [
        ("C3", turn([1, 0, 0], 25), (0, 0, 0), 25, 0),
        ("C3", turn([0, 1, 0], 90), (0, 0, 0), 90, 0),
        ("C3", np.eye(3), (15, 0, 0), 0, 15),
        ("C3", turn([1, 1, 0], 40), (8, -6, 4), 40 * 2**0.5, None),
        ("D3", turn([0, 1, 0], 30), (5, 5, 5), 30, 75**0.5),
        ("O", turn([1, 0, 0], 20), (0, 0, 0), 20, 0),
        ("I2", turn([1, 0, 0], 12), (0, -5, 0), 12, 5),
    ],
)
def test_axes_that_lie_elsewhere_are_found_and_the_map_is_moved(group, rotation, shift_A, tilt_deg, offset_A):
    moved = density(group, rotation, shift_A)
    found = map_symmetry(moved, group, 30.0)
    assert found.verdict == "elsewhere" and found.frame is not None and not found.cryosparc
    assert found.tilt_deg == pytest.approx(tilt_deg, abs=1)
    if offset_A is not None:
        assert found.offset_A == pytest.approx(offset_A, abs=1)
    again = apply_fit(moved, found.frame)
    assert symmetry_score(again, group, 20.0) > 0.93
    with pytest.raises(InputError, match=rf"has the symmetry {group}, but not in the standard frame.*--standard-frame"):
        require_symmetry(moved, group, "a.mrc", 30.0)


def test_noise_does_not_make_a_right_map_wrong_nor_a_wrong_one_right(caplog):
    """A signal of a third of the noise's variance in every voxel: the correlation at 20 Å is below a half."""
    right = require_symmetry(density("C3", noise=1.7), "C3", "a.mrc", 30.0)
    assert right.verdict == "noisy" and right.score < 0.6
    assert any("only through much noise" in record.message for record in caplog.records)
    wrong = map_symmetry(density("C3", turn([1, 0, 0], 25), noise=1.7), "C3", 30.0)
    assert wrong.verdict == "elsewhere" and wrong.tilt_deg == pytest.approx(25, abs=2)


@pytest.mark.parametrize(
    ("has", "asked"), [("C1", "C2"), ("C1", "C3"), ("C1", "D2"), ("C3", "C4"), ("C3", "D3"), ("D2", "C4")]
)
def test_what_does_not_have_the_group_is_refused(has, asked):
    assert map_symmetry(density(has), asked, 30.0).verdict == "none"
    with pytest.raises(InputError, match=rf"does not have the symmetry {asked}.*expected a correlation.*--symmetrise"):
        require_symmetry(density(has), asked, "a.mrc", 30.0)


@pytest.mark.parametrize(("has", "asked"), [("D3", "C3"), ("D2", "C2"), ("O", "C4"), ("O", "D4")])
def test_what_has_more_than_the_group_passes(has, asked):
    assert map_symmetry(density(has), asked).verdict == "has it"


@pytest.mark.parametrize("group", ["D3", "D5"])
def test_cryosparcs_dihedral_frame_is_recognised_and_turned_by_90_over_n_degrees(group):
    """Its two-fold axis lies on y: the object turned by 90 degrees about z."""
    fold = int(group[1:])
    theirs = density(group, turn([0, 0, 1], 90))
    found = map_symmetry(theirs, group, 30.0)
    assert found.verdict == "elsewhere" and found.cryosparc and found.frame is not None
    np.testing.assert_allclose(found.frame.rotation, turn([0, 0, 1], 90 / fold), atol=1e-9)
    expected = density(group, turn([0, 0, 1], 90 / fold) @ turn([0, 0, 1], 90))
    assert correlation(apply_fit(theirs, found.frame).data, expected.data) > 0.98
    with pytest.raises(InputError, match=r"cryoSPARC's, with a two-fold axis on y instead of x"):
        require_symmetry(theirs, group, "a.mrc")


@pytest.mark.parametrize("group", ["D1", "D3", "D5", "D7"])
def test_the_turn_puts_a_two_fold_axis_from_y_onto_one_of_ours(group):
    rotation = cryosparc_turn(group)
    assert rotation is not None
    theirs = rotation.T @ point_group(group) @ rotation
    assert np.abs(theirs - np.diag([-1.0, 1.0, -1.0])).max((1, 2)).min() < 1e-12
    assert np.abs(point_group(group) - np.diag([-1.0, 1.0, -1.0])).max((1, 2)).min() > 0.1


@pytest.mark.parametrize("group", ["C1", "C3", "D2", "D4", "T", "O", "I", "I1"])
def test_all_other_groups_are_alike_in_both_programs(group):
    assert cryosparc_turn(group) is None
    if group[0] == "D":
        assert np.abs(point_group(group) - np.diag([-1.0, 1.0, -1.0])).max((1, 2)).min() < 1e-12
    fold, axis = generators(group)[0]
    assert np.abs(point_group(group) - turn(axis, 360 / fold)).max((1, 2)).min() < 1e-12


def test_real_maps(shared):
    """Beta-galactosidase (D2) and a TRP channel with its lipids (C4) as deposited; a ribosome has no symmetry."""
    betagal = read_map(shared / "data/maps/betagal_relion_tutorial_3.54A_100.mrc")
    channel = read_map(shared / "data/maps/emd_6824_2.64A_70.mrc")
    ribosome = read_map(shared / "data/maps/emd_5625_4.23A_56.map")
    assert map_symmetry(betagal, "D2").score > 0.9 and map_symmetry(channel, "C4").score > 0.9
    assert map_symmetry(channel, "C3").verdict == "none" and map_symmetry(ribosome, "C3").verdict == "none"
    frame = find_frame(channel, "C4")
    assert frame is not None and np.degrees(np.arccos(frame.rotation[2, 2])) < 0.5


def test_masks(tmp_path):
    def mask(*place) -> np.ndarray:
        full = density(*place).data
        return (full > 0.3 * full.max()).astype(np.float32)

    assert mask_correlation(mask("C3"), "C3") > 0.9
    require_mask_symmetry(mask("C3", turn([1, 0, 0], 3)), "C3", "m.mrc")
    require_mask_symmetry(np.ones((BOX,) * 3, np.float32), "I", "m.mrc")
    for wrong in (mask("C3", turn([1, 0, 0], 25)), mask("C3", None, (15, 0, 0)), mask("C1", None, (20, 10, 0))):
        with pytest.raises(InputError, match=r"m.mrc: the mask does not have the symmetry C3"):
            require_mask_symmetry(wrong, "C3", "m.mrc")
        require_mask_symmetry(wrong, "C1", "m.mrc")


def test_a_map_that_is_only_measured_brings_a_warning(caplog):
    assert warn_of_symmetry(density("C3"), "C3", "it") == "" and not caplog.records
    words = warn_of_symmetry(density("C3", turn([1, 0, 0], 25)), "C3", "it")
    assert "25.0° from z" in words and words in caplog.text


# --- on the command line


@pytest.fixture(scope="module")
def tilted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tilted")
    write_map(folder / "tilted.mrc", density("C3", turn([1, 0, 0], 25)).data, PIXEL)
    write_map(folder / "right.mrc", density("C3").data, PIXEL)
    return folder


def test_reference_refuses_it_and_moves_it_on_request(tilted, tmp_path):
    out = tmp_path / "out.mrc"
    refused = cryoiso_here("reference", tilted / "tilted.mrc", out, "--symmetry", "C3", "--lowpass", 0)
    assert refused.returncode == EXIT_INPUT and not out.exists()
    assert "tilted.mrc: the reference has the symmetry C3" in refused.stderr and "25.0° from z" in refused.stderr
    words = ("--symmetry", "C3", "--lowpass", 0, "--standard-frame")
    moved = cryoiso_here("reference", tilted / "tilted.mrc", out, *words)
    assert moved.returncode == 0 and "rotated by 25.0" in moved.stdout, moved.stderr
    assert correlation(read_map(out).data, density("C3").data) > 0.97
    fitted = cryoiso_here("reference", tilted / "tilted.mrc", out, *words[:4], "--fit", tilted / "right.mrc")
    assert fitted.returncode == 0 and correlation(read_map(out).data, density("C3").data) > 0.97
    wrong = cryoiso_here("reference", tilted / "right.mrc", out, *words[:4], "--fit", tilted / "tilted.mrc")
    assert wrong.returncode == EXIT_INPUT and "tilted.mrc: the map to fit into has the symmetry C3" in wrong.stderr
    even = cryoiso_here("reference", tilted / "tilted.mrc", out, *words[:4], "--symmetrise")
    assert even.returncode == 0 and symmetry_score(read_map(out), "C3", 20.0) > 0.95


def test_simulate_refuses_it(tilted, tmp_path):
    words = ("simulate", tilted / "tilted.mrc", tmp_path / "set", "--n", 2, "--symmetry", "C3")
    refused = cryoiso_here(*words)
    assert (
        refused.returncode == EXIT_INPUT and "the object has the symmetry C3, but not in the standard" in refused.stderr
    )
    assert not (tmp_path / "set" / "particles.star").exists()
