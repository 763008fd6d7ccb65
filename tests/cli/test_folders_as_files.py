"""The name of a folder where a file is meant, or nothing at all: one sentence, before anything is computed."""

from __future__ import annotations

import json
import os
import stat

import numpy as np
import pytest
from errors_helper import raises_code
from pipeline_helper import cryoiso_here

from cryoiso.cli import diagnose_cmd
from cryoiso.core.errors import EXIT_INPUT, EXIT_USAGE, InputError
from cryoiso.io.atomic import atomic_write, require_target
from cryoiso.io.mrc import write_map
from cryoiso.physics.phantom import phantom_map


@pytest.fixture
def halves(tmp_path):
    """Two half-maps, 16 px of 10 Å."""
    density, noise = phantom_map(16, 10.0, 25.0).data, np.random.default_rng(0).standard_normal((2, 16, 16, 16))
    for number in (1, 2):
        data = density + 0.1 * density.std() * noise[number - 1]
        write_map(tmp_path / f"half{number}.mrc", data.astype(np.float32), 10.0)
    return tmp_path / "half1.mrc", tmp_path / "half2.mrc"


@pytest.mark.parametrize("command", ["run", "launch", "plan"])
@pytest.mark.parametrize("name", [".", "", "/"])
def test_a_folder_in_place_of_the_job_file(command, name):
    done = cryoiso_here(command, name)
    assert done.returncode == EXIT_USAGE and "folder" in done.stderr and "[file-not-regular]" in done.stderr, (
        done.stderr
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("option", ["--out", "--fsc3d", "--local-resolution"])
@pytest.mark.parametrize("name", [".", ""])
def test_a_folder_in_place_of_a_file_to_write(halves, option, name):
    done = cryoiso_here("diagnose", *halves, option, name)
    assert done.returncode == EXIT_INPUT and "[file-not-regular]" in done.stderr, done.stdout + done.stderr
    assert not done.stdout, "refused before anything is measured"


def test_no_device_or_pipe_is_replaced_by_a_file(halves, tmp_path):
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to("/dev/full")
    for name in (pipe, link):
        with raises_code("file-not-regular", InputError, match="device, pipe or socket"), atomic_write(name):
            pass
        done = cryoiso_here("diagnose", *halves, "--out", name)
        assert done.returncode == EXIT_INPUT and "a device, pipe or socket" in done.stderr, done.stdout + done.stderr
    for name in ("/dev/null", "/dev/stdout", "/proc/self/fd/1"):  # only asked, never written: a fault would break them
        with raises_code("file-not-regular", InputError, match="device, pipe or socket"):
            require_target(name)
    assert stat.S_ISFIFO(os.stat(pipe).st_mode) and link.is_symlink()


@pytest.mark.parametrize("option", ["--fsc3d", "--phase-cosine", "--local-resolution"])
def test_a_map_under_the_name_of_another_kind_of_file(halves, tmp_path, option):
    done = cryoiso_here("diagnose", *halves, option, tmp_path / "map.png", "--out", tmp_path / "numbers.json")
    assert done.returncode == EXIT_USAGE and "map.png" in done.stderr and "[option-malformed]" in done.stderr
    assert not (tmp_path / "numbers.json").exists(), "refused before anything is measured"


def test_a_reference_is_written_under_the_names_of_maps(tmp_path):
    words = ("reference", "phantom", tmp_path / "phantom.MAP", "--box", 28, "--pixel-size", 6)
    assert cryoiso_here(*words).returncode == 0
    refused = cryoiso_here(*words[:2], tmp_path / "phantom.png", *words[3:])
    assert refused.returncode == EXIT_USAGE and "let the name end in .mrc" in refused.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["phantom.MAP"]


def test_numbers_are_on_disk_before_a_closed_pipe_ends_the_command(tmp_path, monkeypatch):
    def closed(_text: str) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(diagnose_cmd, "echo", closed)
    with pytest.raises(BrokenPipeError):
        diagnose_cmd._tell({"particles": 3}, tmp_path / "numbers.json")
    assert json.loads((tmp_path / "numbers.json").read_text())["particles"] == 3


@pytest.fixture(scope="module")
def particles(tmp_path_factory):
    """Eight particles with poses and half-sets, a reference and a job."""
    folder = tmp_path_factory.mktemp("set")
    words = ("--n", 8, "--box", 28, "--pixel-size", 6, "--with-poses", "--halves", "--snr-db", 0)
    made = cryoiso_here("simulate", "phantom", folder, *words)
    assert made.returncode == 0, made.stderr
    (folder / "job.toml").write_text('[particles]\nfile = "particles.star"\n[reference]\nfile = "truth_map.mrc"\n')
    return folder


WRITERS = {
    "run": ("run", "job.toml", "--out"),
    "refine": ("refine", "particles.star", "--ref", "truth_map.mrc", "--out"),
    "reconstruct": ("reconstruct", "particles.star", "--out"),
    "ctf-refine": ("ctf-refine", "particles.star", "--ref", "truth_map.mrc", "--resolution", 14, "--out"),
    "ingest": ("ingest", "particles.star"),
    "convert": ("convert", "particles.star", "--to", "cryodrgn"),
    "correct": ("correct", "truth_map.mrc", "--missing-cone", 30, "--pixel-size", 6, "--out"),
    "simulate": ("simulate", "phantom", "--n", 4, "--box", 28, "--pixel-size", 6),
}


@pytest.mark.parametrize("below", ["", "folder"])
@pytest.mark.parametrize("command", WRITERS)
def test_a_file_in_place_of_a_folder_to_write_into(particles, tmp_path, command, below):
    (tmp_path / "taken").write_text("something")
    words = [particles / w if (particles / str(w)).is_file() else w for w in WRITERS[command]]
    done = cryoiso_here(*words, tmp_path / "taken" / below)
    assert done.returncode == EXIT_INPUT and "a file is where the folder is to be made" in done.stderr, done.stderr
    assert f"{tmp_path / 'taken'}:" in done.stderr and (tmp_path / "taken").read_text() == "something"


def test_a_job_file_without_names(tmp_path):
    job = tmp_path / "job.toml"
    job.write_text('[particles]\nfile = ""\n[reference]\nfile = "r.mrc"\n')
    done = cryoiso_here("run", job)
    assert done.returncode == EXIT_USAGE and "'particles.file' is empty [job-key-missing]" in done.stderr, done.stderr
    job.write_text(f'[particles]\nfile = "{tmp_path}"\n[reference]\nfile = "r.mrc"\n')
    done = cryoiso_here("run", job)
    assert done.returncode == EXIT_INPUT and "no shards in this folder" in done.stderr and "STAR" in done.stderr
