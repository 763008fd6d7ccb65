"""Files for cryoDRGN: its own parsers read them, and what they made of the same particles is equal."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from errors_helper import raises_code

from cryoiso.core.errors import InputError, UsageError
from cryoiso.io.mrc import write_stack
from cryoiso.io.star.read import read_particles
from cryoiso.io.star.text import read_blocks, write_blocks
from cryoiso.pipeline.commands.hand_over import hand_over

LOUD = "LOUD: "  # as in conftest: the summary names what was not checked
J24 = "poses/cryosparc_P12_J24"


def handed(source: Path, out: Path, **how: object) -> dict:
    return hand_over(source, out, "C1", "", (), **{"overwrite": False, **how})


def test_pickles_are_those_of_cryodrgns_parsers(shared_data, tmp_path):
    folder = shared_data / J24
    facts = handed(folder / "cryosparc_P12_J24_001_particles.cs", tmp_path / "out")
    assert facts["particles"] == 2019 and facts["sign"] == -1
    rotation, shift = pickle.loads((tmp_path / "out/poses.pkl").read_bytes())
    ctf = pickle.loads((tmp_path / "out/ctf.pkl").read_bytes())
    expected = pickle.loads((folder / "expected_pose.cs.pkl").read_bytes())
    assert np.abs(rotation - expected[0]).max() < 1e-4 and np.abs(shift - expected[1]).max() < 1e-6
    expected_ctf = pickle.loads((folder / "expected_ctf2.pkl").read_bytes())
    assert ctf.dtype == np.float32
    np.testing.assert_allclose(ctf, expected_ctf, rtol=1e-6, atol=1e-4)
    with raises_code("file-exists", UsageError):
        handed(folder / "cryosparc_P12_J24_001_particles.cs", tmp_path / "out")


def test_images_of_two_sizes_are_refused(shared_data, tmp_path):
    """cryoDRGN would take the first particle's pixel size for all."""
    blocks = read_blocks(shared_data / "particles/relion31_5/relion31.star")
    optics, particles = blocks[0].columns, blocks[-1].columns
    for column in optics.values():
        column.append(column[0])
    optics["rlnOpticsGroup"], optics["rlnImagePixelSize"][1] = ["1", "2"], "1.9"
    particles["rlnOpticsGroup"][2] = "2"
    write_blocks(tmp_path / "a.star", blocks)
    with raises_code("box-mismatch", InputError, match="1.9"):
        handed(tmp_path / "a.star", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


def small_set(shared_data: Path, folder: Path) -> Path:
    """Five particles with their stack, the last of them an auxiliary one, in a finished run's result."""
    blocks = read_blocks(shared_data / "particles/relion31_5/relion31.star")
    columns = blocks[-1].columns
    columns["rlnImageName"] = [f"{i}@stack.mrcs" for i in range(1, 6)]
    columns["cryoisoAuxiliary"] = ["0", "0", "0", "0", "1"]
    columns["cryoisoSign"] = ["1"] * 5
    blocks[0].columns["rlnImageSize"] = ["16"]
    (folder / "result").mkdir(parents=True)
    write_blocks(folder / "result/particles.star", blocks)
    with write_stack(folder / "result/stack.mrcs", 16, 1.0) as stack:
        stack.append(np.random.default_rng(1).normal(size=(5, 16, 16)).astype(np.float32))
    return folder


def test_a_run_is_handed_over_without_its_auxiliary_particles(shared_data, tmp_path):
    run = small_set(shared_data, tmp_path / "run")
    facts = handed(run, tmp_path / "out")
    assert (facts["particles"], facts["left_out"], facts["sign"]) == (4, 1, 1)
    star = read_particles(tmp_path / "out/particles.star")
    assert set(star.stack) == {str(run / "result/stack.mrcs")} and star.index.tolist() == [0, 1, 2, 3]
    assert len(pickle.loads((tmp_path / "out/poses.pkl").read_bytes())[0]) == 4


@pytest.mark.slow
def test_cryodrgns_own_loaders_take_them(shared_data, tmp_path):
    pytest.importorskip("cryodrgn", reason="pip install cryodrgn")
    from cryodrgn import ctf, pose, source

    run = small_set(shared_data, tmp_path / "run")
    out = tmp_path / "out"
    handed(run, out)
    particles = read_particles(out / "particles.star", "", ("pose",))
    images = source.ImageSource.from_file(str(out / "particles.star"), lazy=False)
    assert len(images) == 4 and images.D == 16
    tracker = pose.PoseTracker.load(str(out / "poses.pkl"), 4, 16)
    rotation, shift = tracker.get_pose(np.arange(4))
    assert np.abs(rotation.numpy() - particles.rotation).max() < 1e-6
    pixel = particles.group_values("pixel_size_A")[:, None]
    assert np.abs(shift.numpy() - particles.shift_A / pixel).max() < 1e-4
    loaded = ctf.load_ctf_for_training(16, str(out / "ctf.pkl"))
    np.testing.assert_allclose(loaded[:, 1], particles.defocus_u_A, rtol=1e-6)
    np.testing.assert_allclose(loaded[:, 0], pixel[:, 0], rtol=1e-6)


def recovar_python() -> str:
    """An interpreter that has recovar: its own environment, named in RECOVAR_PYTHON, or this one."""
    named = os.environ.get("RECOVAR_PYTHON", "")
    if not named and importlib.util.find_spec("recovar") is None:
        pytest.skip(f"{LOUD}no recovar: python -m venv E; E/bin/pip install recovar; RECOVAR_PYTHON=E/bin/python")
    return named or sys.executable


@pytest.mark.slow
def test_recovars_own_loaders_take_them(shared_data, tmp_path):
    """By the pickles and by the STAR file alone, which also has the half-sets. Run with recovar 1.0.5."""
    python = recovar_python()
    run, out = small_set(shared_data, tmp_path / "run"), tmp_path / "out"
    blocks = read_blocks(run / "result/particles.star")
    blocks[-1].columns["rlnRandomSubset"] = ["2", "1", "1", "2", "1"]
    write_blocks(run / "result/particles.star", blocks)
    handed(run, out)
    reader = Path(__file__).resolve().parents[1] / "helpers/recovar_reader.py"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, reader, out], capture_output=True, text=True, timeout=600, env=environment | {"JAX_PLATFORMS": "cpu"}
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    ours = read_particles(out / "particles.star", "", ("pose", "ctf"))
    pixel = ours.group_values("pixel_size_A")
    for way in ("pickles", "star"):
        one = found[way]
        assert (one["n"], one["box"]) == (4, 16) and one["voxel_A"] == pytest.approx(pixel[0], rel=1e-6), way
        assert np.abs(np.array(one["rotation"]) - ours.rotation).max() < 1e-5, way
        assert np.abs(np.array(one["shift_px"]) - ours.shift_A / pixel[:, None]).max() < 1e-4, way
        ctf = np.array(one["ctf"])
        np.testing.assert_allclose(ctf[:, 0], ours.defocus_u_A, rtol=1e-6)
        np.testing.assert_allclose(ctf[:, 3], ours.group_values("voltage_kV"), rtol=1e-6)
        np.testing.assert_allclose(ctf[:, 5], ours.group_values("amplitude_contrast"), rtol=1e-6)
    assert found["halves"] == [[1, 2], [0, 3]]
