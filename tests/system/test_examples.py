"""The example scripts run, and say what is true."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_projections_hold_the_map_and_the_ctf_changes_them():
    projections, images = example("projection_and_ctf").main()
    from cryoiso.physics.phantom import phantom_map

    along_z = phantom_map(64, 3.0, resolution_A=8.0).data.sum(0)
    assert np.corrcoef(projections[0].numpy().ravel(), along_z.ravel())[0, 1] > 0.999
    assert images.shape == projections.shape and float(images.min()) < float(projections.min())


def test_a_badly_measured_direction_lowers_sphericity_and_cfar():
    uneven = example("fsc_and_3dfsc").main([])
    assert uneven["cfar"] < 0.7 and uneven["sphericity"] < 0.97 and 8 < uneven["resolution_A"] < 40


def test_half_maps_from_a_star_file(data, tmp_path):
    resolution = example("reconstruct_from_star").main(str(data / "truth.star"), "C3", str(tmp_path / "maps"))
    assert sorted(p.name for p in (tmp_path / "maps").iterdir()) == ["half1.mrc", "half2.mrc"] and np.isfinite(
        resolution
    )


def test_a_refinement_in_python_finds_the_poses():
    assert example("refine_in_python").main(particles=120, iterations=2) < 8


@pytest.mark.parametrize("name", sorted(p.stem for p in EXAMPLES.glob("*.py")))
def test_every_example_says_how_it_is_run(name):
    assert f"python examples/{name}.py" in (EXAMPLES / f"{name}.py").read_text()
