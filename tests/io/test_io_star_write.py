"""STAR files written: only what changed is written anew, numbers and poses are good, RELION reads them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from star_helper import memory_particles, star

from cryoiso.io import conventions
from cryoiso.io.star import text_column
from cryoiso.io.star.columns import Columns
from cryoiso.io.star.read import read_particles, write_particles


def test_only_changed_poses_are_written_anew(tmp_path):
    p = read_particles(star(tmp_path))
    rotation = p.rotation.copy()
    rotation[1] = conventions.euler_to_matrix(1.0000004, 2, 3)[0]
    write_particles(tmp_path / "out.star", p.with_poses(rotation, p.shift_A))
    q = read_particles(tmp_path / "out.star")
    assert list(q.table["rlnAngleTilt"]) == ["20", "2.000000", "-20", "0"], (
        "a negative tilt is a fair pose: its text stays"
    )
    assert np.abs(q.rotation - rotation).max() < 2e-8


def test_files_read_and_written_in_small_slabs_are_the_same(tmp_path, monkeypatch):
    rows = [
        f"{i:06d}@{'ab'[i % 2]}.mrcs {1e4 + i} 9000 30 {'73'[i % 2]} {'é' * i}x {i} 20 30 {i}.5 0 1"
        for i in range(1, 24)
    ]
    path = star(tmp_path, rows=rows)

    def written(name: str) -> bytes:
        p = read_particles(path)
        rotation, defocus = p.rotation.copy(), p.defocus_u_A.copy()
        rotation[5::7], defocus[3::5] = np.eye(3), 12345.5
        p = replace(p.with_poses(rotation, p.shift_A), defocus_u_A=defocus)
        write_particles(tmp_path / name, p.with_results(rlnMaxValueProbDistribution=np.linspace(0, 1, len(p))))
        return (tmp_path / name).read_bytes()

    whole = written("whole.star")
    monkeypatch.setattr(text_column, "SLAB", 4)
    assert written("slabs.star") == whole


def test_written_poses_are_good_to_a_millionth(tmp_path):
    rng = np.random.default_rng(0)
    p = memory_particles(500)
    rotation = conventions.euler_to_matrix(
        rng.uniform(-180, 180, 500), rng.uniform(0, 180, 500), rng.uniform(-180, 180, 500)
    )
    shift = rng.normal(0, 20, (500, 2))
    p = p.with_poses(rotation, shift).with_results(
        rlnLogLikeliContribution=rng.normal(1e5, 1, 500), cryoisoFlag=np.arange(500)
    )
    write_particles(tmp_path / "out.star", p)
    q = read_particles(tmp_path / "out.star")
    assert np.abs(q.rotation - rotation).max() < 5e-8
    assert np.abs(q.shift_A - shift).max() <= 5.1e-7
    np.testing.assert_array_equal(q.uid, p.uid)
    np.testing.assert_array_equal(q.half, p.half)
    assert q.groups == p.groups
    np.testing.assert_array_equal(Columns(q.table, "").number("cryoisoFlag"), np.arange(500))
    relative = Columns(q.table, "").number("rlnLogLikeliContribution") / p.results["rlnLogLikeliContribution"]
    assert np.abs(relative - 1).max() < 1e-8


def test_the_inputs_of_writing_are_not_touched(tmp_path):
    p = read_particles(star(tmp_path))
    before = p.table.copy(), p.rotation.copy()
    write_particles(tmp_path / "out.star", p.with_poses(p.rotation[::-1], p.shift_A))
    assert p.table.equals(before[0]) and (p.rotation == before[1]).all()


@pytest.mark.relion
def test_relion_reads_what_we_write_and_keeps_our_identity_column(tmp_path):
    import subprocess

    rotation = conventions.euler_to_matrix(np.arange(20) * 17.0 - 170, np.arange(20) * 9.0, np.arange(20) * -18.0)
    p = memory_particles(20).with_poses(rotation, np.arange(40.0).reshape(20, 2) - 20.5)
    write_particles(tmp_path / "ours.star", p)
    command = [
        "relion_star_handler",
        "--i",
        "ours.star",
        "--o",
        "theirs.star",
        "--select",
        "rlnDefocusU",
        "--minval",
        "0",
    ]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    q = read_particles(tmp_path / "theirs.star")
    np.testing.assert_array_equal(q.uid, p.uid)
    assert np.abs(q.rotation - rotation).max() < 1e-6 and np.abs(q.shift_A - p.shift_A).max() < 1e-4
    assert q.group_values("pixel_size_A")[0] == pytest.approx(1.7, abs=1e-6)
