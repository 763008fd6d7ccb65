"""The sign of protein by optics group: images of two kinds in one file."""

from __future__ import annotations

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
