"""The sign of protein by optics group: images of two kinds in one file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_io_ingest import BOX, blobs, make_set, settings

from cryoiso.io.contrast_sign import decide_sign
from cryoiso.io.star.read import read_particles


@pytest.mark.parametrize("factor", [1, -1])
@pytest.mark.parametrize("few", [5, 20])
def test_optics_groups_of_both_signs_are_told(tmp_path, caplog, factor, few):
    """60 images, some of them of the other sign: with few the others decide, with many nothing is decided."""
    stacks = {"a.mrcs": factor * blobs(60 - few), "b.mrcs": -factor * blobs(few)}
    rows = [("a.mrcs", k, 0) for k in range(60 - few)] + [("b.mrcs", k, 1) for k in range(few)]
    mixed = [rows[k] for k in np.random.default_rng(1).permutation(60)]
    decision = decide_sign(read_particles(make_set(tmp_path, stacks, mixed, boxes=(BOX, BOX))), settings(invert="auto"))
    if few == 5:
        assert (decision.sign == factor).all() and decision.reason == "decided by the data"
    white, dark = (1, 2) if factor > 0 else (2, 1)
    assert f"white in the images of optics group {white} and dark in those of {dark}" in caplog.text


def test_groups_that_agree_or_do_not_tell_are_not_mentioned(tmp_path, caplog):
    noise = np.random.default_rng(2).normal(size=(20, BOX, BOX))
    for name, other in (("agree", blobs(20)), ("noise", noise)):
        (folder := tmp_path / name).mkdir()
        rows = [("a.mrcs", k, 0) for k in range(40)] + [("b.mrcs", k, 1) for k in range(20)]
        star = make_set(folder, {"a.mrcs": blobs(40), "b.mrcs": other}, rows, boxes=(BOX, BOX))
        assert (decide_sign(read_particles(star), settings(invert="auto")).sign == 1).all()
    assert "protein seems" not in caplog.text


def stack_of(folder: Path, image: np.ndarray, seed: int) -> Path:
    """60 copies of an image with noise of standard deviation 1."""
    images = (image + np.random.default_rng(seed).normal(size=(60, *image.shape))).astype(np.float32)
    rows = [("a.mrcs", k, 0) for k in range(60)]
    return make_set(folder, {"a.mrcs": images}, rows, pixels=(3.0, 3.0), boxes=(len(image),) * 2)


def radius(box: int = 32) -> np.ndarray:
    axis = (np.arange(box) - box // 2) / box
    return np.hypot(axis[:, None], axis)


@pytest.mark.parametrize("factor", [1, -1])
def test_hollow_particles_do_not_tell_their_sign(tmp_path, caplog, factor):
    """A ring, as D2 beta-galactosidase is along one axis: its dark centre was believed, the map came out inverted."""
    r = radius()
    ring = np.exp(-(((r - 0.16) / 0.05) ** 2)) - 3 * np.exp(-((r / 0.04) ** 2))
    decision = decide_sign(read_particles(stack_of(tmp_path, factor * ring, 4)), settings(invert="auto"))
    assert (decision.sign == 1).all() and decision.reason.startswith("undecided")
    assert "at one radius" in caplog.text and "Set invert" in caplog.text


@pytest.mark.parametrize("factor", [1, -1])
def test_a_fringe_around_the_particle_does_not_hide_its_sign(tmp_path, factor):
    r = radius()
    fringed = 3 * np.exp(-((r / 0.08) ** 2)) - 0.3 * np.exp(-(((r - 0.2) / 0.05) ** 2))
    decision = decide_sign(read_particles(stack_of(tmp_path, factor * fringed, 5)), settings(invert="auto"))
    assert (decision.sign == factor).all() and decision.reason == "decided by the data"
