"""The proposal of a point group: found wherever the axes are, told from pseudo-symmetry, and its poses moved along."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from pipeline_helper import cryoiso_here
from test_map_symmetry import BOX, PIXEL, atoms, density, turn

from cryoiso.core.errors import UsageError
from cryoiso.core.types import DensityMap
from cryoiso.io import read_particle_file
from cryoiso.io.mrc import read_map, write_map
from cryoiso.io.star.write import write_particles
from cryoiso.physics.fit_result import Placement
from cryoiso.physics.map_symmetry import symmetry_score
from cryoiso.physics.phantom import pseudo_atoms_to_map
from cryoiso.physics.projection import FourierVolume
from cryoiso.physics.simulation import make_particles, simulate
from cryoiso.physics.symmetry_proposal import propose_symmetry
from cryoiso.pipeline.jobfile import read_job

ELSEWHERE = turn([1, 2, 0.5], 47)


def half_maps(full: DensityMap, noise: float) -> tuple[DensityMap, DensityMap]:
    """Two maps with independent white noise of so many times the map's standard deviation."""
    sd = noise * full.data.std()
    made = [full.data + sd * np.random.default_rng(seed).standard_normal(full.data.shape) for seed in (1, 2)]
    return tuple(DensityMap(one.astype(np.float32), full.pixel_size_A) for one in made)


def nearly_c3(rotation=None) -> DensityMap:
    """The trimer with one subunit's outer half removed."""
    coords, weight, sigma = (values.copy() for values in atoms("C3"))
    first = np.arange(len(coords)) < len(coords) // 3
    away = first & (coords[:, 2] > np.median(coords[first, 2]))
    weight = np.where(away, 0.0, weight)
    moved = coords if rotation is None else coords @ rotation.T
    return pseudo_atoms_to_map(moved, weight, sigma, BOX, PIXEL, 13.0)


SLOWER = [pytest.param(group, marks=pytest.mark.slow) for group in ("C2", "C7", "D3", "T", "O", "I2")]


@pytest.mark.parametrize("group", ["C1", "D2", *SLOWER])
def test_the_group_and_its_frame_are_found(group):
    moved = density(group, ELSEWHERE, (4, -3, 2))
    found = propose_symmetry(moved, max_fold=7 if group == "C7" else 5)
    assert found.group == group, found.words
    assert found.pseudo is None or group == "C2", "this one is long and thin: nearly D2"
    if group != "C1":
        from cryoiso.physics.fit import apply_fit

        assert symmetry_score(apply_fit(moved, found.frame), group, 20.0) > 0.9
    best = {test.fold for test in found.folds if test.stands_out and test.score > 0.9}
    expected = {
        "C1": set(),
        "C2": {2},
        "C7": {7},
        "D2": {2},
        "D3": {2, 3},
        "T": {2, 3},
        "O": {2, 3, 4},
        "I2": {2, 3, 5},
    }
    assert best == expected[group]


@pytest.mark.parametrize(("group", "noise"), [("C3", 2.0), ("D2", 2.0)])
def test_half_maps_tell_a_symmetry_through_noise(group, noise):
    """The single map's correlation falls with the noise, the ratio of the half-maps' curves stays 1."""
    found = propose_symmetry(*half_maps(density(group, ELSEWHERE), noise), max_fold=3)
    assert found.group == group
    test = next(g for g in found.groups if g.group == group)
    assert test.frame.score < 0.9 and test.ratio == pytest.approx(1, abs=0.04)


def test_a_pseudo_symmetry_is_named_not_proposed():
    found = propose_symmetry(*half_maps(nearly_c3(ELSEWHERE), 0.5), max_fold=4)
    assert found.group == "C1" and found.pseudo == "C3"
    assert "only nearly" in found.words and "do not impose" in found.words
    assert next(g for g in found.groups if g.group == "C3").ratio < 0.93


def test_noise_has_no_symmetry():
    rng = np.random.default_rng(0)
    halves = [DensityMap(rng.standard_normal((BOX,) * 3).astype(np.float32), PIXEL) for _ in range(2)]
    found = propose_symmetry(*halves, max_fold=3)
    assert found.group == "C1" and not any(test.stands_out for test in found.folds)


def test_poses_in_the_new_frame_give_the_same_images():
    """Of the map before it was moved and of the moved one, with the origins that go with each."""
    full = density("C1")
    placement = Placement(ELSEWHERE, np.array([6.0, -4.0, 3.0]), 1.0)
    coords, weight, sigma = atoms("C1")
    moved = pseudo_atoms_to_map(placement.points(coords), weight, sigma, BOX, PIXEL, 13.0)
    particles = make_particles(4, BOX, PIXEL, shift_sd_A=5.0, seed=2)
    turned = particles.with_poses(*placement.poses(*particles.require_poses()))
    images = [_projections(one, p) for one, p in ((full, particles), (moved, turned))]
    assert np.abs(images[0] - images[1]).max() < 0.02 * np.abs(images[0]).max()


def _projections(density_map: DensityMap, particles) -> np.ndarray:
    from cryoiso.physics.fourier import fourier_disc, fourier_to_images, shift_phases
    from cryoiso.physics.projection import scatter_to_half_plane

    disc = fourier_disc(BOX, BOX // 2 - 2, with_dc=True)
    volume = FourierVolume.from_volume(torch.as_tensor(density_map.data), 3)
    slices = volume.slices(torch.as_tensor(particles.rotation, dtype=torch.float32), disc)
    ky, kx = (torch.as_tensor(k) / BOX for k in (disc.ky, disc.kx))
    phases = shift_phases(ky, kx, torch.as_tensor(-particles.shift_A / PIXEL, dtype=torch.float32))
    return fourier_to_images(scatter_to_half_plane(slices * phases, disc), BOX).numpy()


# --- as a command and in a job


def test_the_command_moves_maps_and_particles(tmp_path):
    halves = half_maps(density("C3", ELSEWHERE, (4, -3, 2)), 0.3)
    files = [tmp_path / f"half{h}.mrc" for h in (1, 2)]
    for file, one in zip(files, halves, strict=True):
        write_map(file, one.data, one.pixel_size_A)
    source = simulate(halves[0], 5, seed=1)
    particles = replace(source.particles, stack=np.array(["a.mrcs"] * 5), index=np.arange(5))
    write_particles(tmp_path / "p.star", particles)
    words = ("symmetry", *files, "--particles", tmp_path / "p.star", "--out", tmp_path / "o", "--max-fold", "4")
    done = cryoiso_here(*words)
    assert done.returncode == 0, done.stderr
    assert "symmetry C3" in done.stdout and "has it" in done.stdout
    facts = json.loads((tmp_path / "o" / "symmetry.json").read_text())
    assert facts["proposed"] == "C3"
    moved = read_map(tmp_path / "o" / "half1.mrc")
    assert symmetry_score(moved, "C3", 20.0) > 0.8 > symmetry_score(halves[0], "C3", 20.0)
    group = next(g for g in facts["groups"] if g["group"] == "C3")
    placement = Placement(np.array(group["rotation"]), np.array(group["shift_A"]), 1.0)
    expected = placement.poses(*particles.require_poses())
    written = read_particle_file(tmp_path / "o" / "particles.star", "", ("pose",))
    np.testing.assert_allclose(written.rotation, expected[0], atol=1e-5)
    np.testing.assert_allclose(written.shift_A, expected[1], atol=1e-3)
    again = cryoiso_here("symmetry", *files, "--out", tmp_path)
    assert again.returncode == 2 and "overwrite" in again.stderr


def test_auto_in_a_job_is_c1_with_a_proposal(tmp_path):
    text = '[particles]\nfile = "p.star"\n[reference]\nfile = "r.mrc"\n[sample]\nsymmetry = "auto"\n'
    (tmp_path / "job.toml").write_text(text + '[run]\nworkflow = "refine"\n')
    _, job = read_job(tmp_path / "job.toml")
    assert job.sample.symmetry == "C1" and job.run.propose_symmetry
    (tmp_path / "job.toml").write_text(text + '[run]\nworkflow = "auxiliary"\n')
    with pytest.raises(UsageError, match=r"proposes a point group") as refused:
        read_job(tmp_path / "job.toml")
    assert refused.value.code == "options-conflict"
