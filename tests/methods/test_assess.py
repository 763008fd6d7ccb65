"""The verdict on simulated sets whose fault is known: maps are reconstructed from images, with right or wrong poses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cryoiso.core.config import RefineSection
from cryoiso.core.protocols import RefineRequest
from cryoiso.core.types import DensityMap, Particles
from cryoiso.engines.native import NativeEngine
from cryoiso.io.sources import ArraySource
from cryoiso.methods.assess.measure import diagnose
from cryoiso.methods.assess.verdict import judge
from cryoiso.metrics.pose_error import pose_errors
from cryoiso.parallel.context import Context
from cryoiso.physics.phantom import homologue, phantom_map, pseudo_atoms_to_map
from cryoiso.physics.simulation import simulate
from cryoiso.physics.so3 import rotation_with_view
from cryoiso.physics.views import Views
from cryoiso.pipeline.stages.half_maps import make_mask
from cryoiso.refine.reconstruct import reconstruct_halves

BOX, PIXEL_A, N = 40, 5.0, 1000


def particle_set(snr_db: float = -8.0, **views) -> tuple[ArraySource, DensityMap]:
    source = simulate(phantom_map(BOX, PIXEL_A, 12.0), N, snr_db=snr_db, views=Views(**views), seed=4)
    half = (np.arange(N) % 2 + 1).astype(np.int8)
    return ArraySource(source.read(np.arange(N)), replace(source.particles, half=half)), source.volume


def measured(source: ArraySource, particles: Particles) -> dict:
    maps = reconstruct_halves(source, particles, Context(), symmetry="C3")
    halves = [maps[h].data for h in (1, 2)]
    mask = make_mask(DensityMap((halves[0] + halves[1]) / 2, PIXEL_A))
    return diagnose(*halves, mask, PIXEL_A, particles, "C3")


def values(numbers: dict) -> dict[str, float]:
    return {e["name"].split(" (")[0]: e["value"] for e in numbers["verdict"]["evidence"]}


@pytest.fixture(scope="module")
def top_views() -> tuple[ArraySource, DensityMap]:
    return particle_set(mode="preferred", fraction=0.95)


def test_even_views_are_fine():
    source, _ = particle_set(mode="uniform")
    numbers = measured(source, source.particles)
    verdict = numbers["verdict"]
    assert verdict["verdict"] == "fine", verdict
    assert numbers["directional"]["cfar"] > 0.5 and numbers["sampling"]["estimated"]["scf_star"] > 0.9
    assert "does not prove that the poses are right" in verdict["sentence"]


def test_missing_views_with_true_poses(top_views):
    source, _ = top_views
    numbers = measured(source, source.particles)
    assert numbers["verdict"]["verdict"] == "missing views", numbers["verdict"]
    found = values(numbers)
    assert found["cFAR"] < 0.5 and found["SCF* over that of even views"] < 0.3
    assert found["directions with less than half of that"] < 0.15
    assert found["cFAR that these views would give"] < 0.5


def test_top_views_put_to_the_side(top_views):
    """A quarter of the particles: SCF* is better than before and the map worse."""
    source, _ = top_views
    rng = np.random.default_rng(1)
    rotation = source.particles.rotation.copy()
    moved = rng.choice(np.flatnonzero(np.abs(rotation[:, 2, 2]) > 0.8), N // 4, replace=False)
    turn, z = rng.uniform(0, 2 * np.pi, len(moved)), rng.uniform(-0.3, 0.3, len(moved))
    across = np.sqrt(1 - z**2)
    views = np.stack([across * np.cos(turn), across * np.sin(turn), z], 1)
    rotation[moved] = rotation_with_view(views, rng.uniform(0, 360, len(moved)))
    right, wrong = (
        measured(source, replace(source.particles, rotation=r)) for r in (source.particles.rotation, rotation)
    )
    assert wrong["verdict"]["verdict"] == "misassigned views", wrong["verdict"]
    found, before = values(wrong), values(right)
    assert found["directions with less than half of that"] > 0.25
    assert found["SCF* over that of even views"] > before["SCF* over that of even views"] + 0.2
    assert found["cFAR that these views would give"] > 3 * found["cFAR"]


def test_noise_is_junk():
    source, _ = particle_set(mode="uniform")
    images = np.random.default_rng(2).standard_normal((N, BOX, BOX)).astype(np.float32)
    numbers = measured(ArraySource(images, source.particles), source.particles)
    assert numbers["verdict"]["verdict"] == "junk", numbers["verdict"]
    assert values(numbers)["SCF* over that of even views"] > 0.9


@pytest.mark.slow
def test_plain_refinement_of_few_side_views(tmp_path):
    """98 % top views in coloured noise, refined from a homologue: half of the side views are lost, which is noticed.

    With the true poses the same images are merely short of views.
    """
    volume, views = phantom_map(BOX, PIXEL_A, 11.0), Views("preferred", fraction=0.98)
    made = simulate(volume, 1500, snr_db=-15.0, views=views, seed=3, noise="coloured", shift_sd_A=3.0)
    truth = replace(made.particles, half=(np.arange(1500) % 2 + 1).astype(np.int8))
    source = ArraySource(made.read(np.arange(1500)), truth)
    reference = pseudo_atoms_to_map(*homologue(), BOX, PIXEL_A, 10.0)
    request = RefineRequest(source, reference, "C3", tmp_path, RefineSection(), 1, diameter_A=145.0, lowpass_A=30.0)
    found = NativeEngine().refine(request, Context()).particles
    errors = pose_errors(found.rotation, truth.rotation, "C3", align="axis")
    assert errors.by_view()["side_over_20"] > 0.3
    plain, ideal = measured(source, found), measured(source, truth)
    assert plain["verdict"]["verdict"] == "misassigned views", plain["verdict"]
    assert ideal["verdict"]["verdict"] == "missing views", ideal["verdict"]


def facts(**changes) -> dict:
    """Numbers of a good map, with changes: cfar, noise (evenness left by it), views_cfar, short, scf, resolution."""
    c = {"cfar": 0.8, "even": 0.9, "views_cfar": 0.85, "short": 0.0, "scf": 0.95, "resolution_A": 4.0, **changes}
    poses = c["scf"] is not None
    expected = {"even": {"cfar": c["even"], "evenness": c["even"]}}
    if poses:
        expected["views"] = {"cfar": c["views_cfar"], "evenness": 0.9, "short_fraction": c["short"]}
    return {
        "box_px": 128,
        "pixel_size_A": 1.5,
        "resolution_0143_masked_A": c["resolution_A"],
        "directional": {
            "cfar": c["cfar"],
            "evenness": c["cfar"],
            "expected": expected,
            "resolution_min_A": 3.5,
            "resolution_max_A": 5.0,
        },
        "sampling": {"estimated": {"scf_star": c["scf"], "scf_star_even": 1.0}} if poses else {},
    }


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "fine"),
        ({"scf": 0.5}, "inconclusive"),  # uneven views, yet an even map
        ({"cfar": 0.2, "scf": 0.3, "views_cfar": 0.2}, "missing views"),
        ({"cfar": 0.2, "scf": 0.95, "short": 0.5}, "misassigned views"),
        ({"cfar": 0.2, "scf": 0.3, "short": 0.5}, "misassigned views"),
        ({"cfar": 0.2, "scf": 0.95}, "inconclusive"),  # anisotropic, but not by its views
        ({"cfar": 0.2, "scf": None}, "inconclusive"),  # no poses
        ({"cfar": 0.2, "even": 0.25}, "inconclusive"),  # noise makes as much
        ({"cfar": None, "even": None, "resolution_A": 120.0}, "junk"),
        ({"scf": None}, "fine"),
    ],
)
def test_table_of_verdicts(changes, verdict):
    found = judge(facts(**changes))
    assert found.verdict == verdict and found.sentence.endswith(".") and found.advice.endswith(".")
    names = [e.name for e in found.evidence]
    assert len(names) == len(set(names)) >= 4 and all(e.says for e in found.evidence)
    if verdict == "misassigned views":
        assert ("uneven besides" in found.sentence) == (changes["scf"] < 0.81)
