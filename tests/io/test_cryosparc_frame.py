"""Poses of Dn with odd n from .cs files: turned from cryoSPARC's frame, so that the map has its two-fold axis on x."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pipeline_helper import cryoiso_here
from scipy.spatial.transform import Rotation

from cryoiso.core.types import DensityMap
from cryoiso.io import conventions, read_particle_file
from cryoiso.io.mrc import read_map, write_map
from cryoiso.metrics.mapmodel import correlation
from cryoiso.physics.map_symmetry import symmetry_score
from cryoiso.physics.phantom import pseudo_atoms_to_map, trimer
from cryoiso.physics.projection import project
from cryoiso.physics.so3 import random_rotations, rotvec_to_matrix
from cryoiso.physics.symmetry import point_group

BOX, PIXEL = 32, 6.0


def about_z(deg: float) -> np.ndarray:
    return rotvec_to_matrix(np.radians([0, 0, deg]))[0]


def object_of(group: str, rotation: np.ndarray) -> DensityMap:
    coords, weight, sigma = trimer(1)
    third = len(coords) // 3
    one = 0.6 * (coords[:third] - coords[:third].mean(0)) + np.array([22.0, 14.0, 19.0])
    ops = point_group(group)
    whole = np.concatenate([one @ op.T for op in ops]) @ rotation.T
    weight, sigma = np.tile(weight[:third], len(ops)), np.tile(sigma[:third], len(ops))
    return pseudo_atoms_to_map(whole, weight, sigma, BOX, PIXEL, 15.0)


@pytest.mark.parametrize("group", ["D3", "D5", "D7"])
def test_turned_poses_see_the_turned_map_as_the_others_saw_theirs(group):
    theirs, ours = object_of(group, about_z(90)), object_of(group, about_z(90 / int(group[1:])) @ about_z(90))
    assert symmetry_score(ours, group, 20.0) > 0.93 and symmetry_score(theirs, group, 20.0) < 0.85
    pose = random_rotations(np.random.default_rng(0), 6)
    turned = conventions.from_cryosparc_frame(pose, group)
    a, b = (
        project(torch.from_numpy(m.data), torch.from_numpy(p.astype(np.float32))).numpy()
        for m, p in ((theirs, pose), (ours, turned))
    )
    assert np.linalg.norm(a - b) < 0.03 * np.linalg.norm(a)
    np.testing.assert_allclose(conventions.to_cryosparc_frame(turned, group), pose, atol=1e-12)


@pytest.mark.parametrize("group", ["C1", "C7", "D2", "D4", "T", "O", "I"])
def test_other_poses_stay(group):
    pose = random_rotations(np.random.default_rng(0), 2)
    assert conventions.from_cryosparc_frame(pose, group) is pose


def test_a_cs_file_of_a_d3_particle_gives_the_right_map(tmp_path):
    """Images of the object in cryoSPARC's frame with the poses there, as .cs: reconstructed with D3."""
    theirs, ours = object_of("D3", about_z(90)), object_of("D3", about_z(30) @ about_z(90))
    write_map(tmp_path / "theirs.mrc", theirs.data, PIXEL)
    words = ("--n", 400, "--symmetry", "C3", "--noise", "none", "--with-poses", "--halves", "--seed", 2)
    made = cryoiso_here("simulate", tmp_path / "theirs.mrc", tmp_path / "set", *words)
    assert made.returncode == 0, made.stderr
    cs = write_cs(tmp_path / "set" / "particles.cs", read_particle_file(tmp_path / "set" / "particles.star"))
    given, turned = read_particle_file(cs), read_particle_file(cs, symmetry="D3")
    np.testing.assert_allclose(turned.rotation, given.rotation @ about_z(30).T, atol=1e-9)
    done = cryoiso_here("reconstruct", cs, "--out", tmp_path / "out", "--symmetry", "D3", "--invert", "no")
    assert done.returncode == 0, done.stderr
    found = read_map(tmp_path / "out" / "map.mrc").data
    inside = ours.data > 0.05 * ours.data.max()
    assert correlation(found, ours.data, inside) > 0.95
    unturned = cryoiso_here(
        "reconstruct", tmp_path / "set/particles.star", "--out", tmp_path / "two", "--symmetry", "D3"
    )
    assert unturned.returncode == 0, unturned.stderr
    ruined = read_map(tmp_path / "two" / "map.mrc").data
    assert max(correlation(ruined, m.data, m.data > 0.05 * m.data.max()) for m in (ours, theirs)) < 0.9


def write_cs(path, p):
    """The particles as cryoSPARC keeps them: Rodrigues vectors, shifts in pixels."""
    g = p.groups[0]
    columns = {
        "uid": p.uid, "blob/path": np.array([str(s).encode() for s in p.stack]), "blob/idx": p.index.astype("u4"),
        "blob/shape": np.full((len(p), 2), BOX, "u4"), "blob/psize_A": np.full(len(p), PIXEL, "f4"),
        "blob/sign": np.ones(len(p), "f4"), "ctf/accel_kv": np.full(len(p), g.voltage_kV, "f4"),
        "ctf/cs_mm": np.full(len(p), g.spherical_aberration_mm, "f4"),
        "ctf/amp_contrast": np.full(len(p), g.amplitude_contrast, "f4"), "ctf/df1_A": p.defocus_u_A.astype("f4"),
        "ctf/df2_A": p.defocus_v_A.astype("f4"), "ctf/df_angle_rad": np.radians(p.defocus_angle_deg).astype("f4"),
        "alignments3D/pose": Rotation.from_matrix(p.rotation.transpose(0, 2, 1)).as_rotvec().astype("f4"),
        "alignments3D/shift": (p.shift_A / PIXEL).astype("f4"), "alignments3D/psize_A": np.full(len(p), PIXEL, "f4"),
        "alignments3D/split": (p.half - 1).astype("u4"),
    }  # fmt: skip
    table = np.zeros(len(p), [(k, v.dtype, v.shape[1:]) for k, v in columns.items()])
    for name, values in columns.items():
        table[name] = values
    with path.open("wb") as stream:
        np.save(stream, table)
    return path
