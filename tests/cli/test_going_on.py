"""An interrupted command says how to go on: a run by 'cryoiso resume', a single command by itself with --resume."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pipeline_helper import cryoiso_here, forget_signals, simulate, write_job

from cryoiso.cli.common import how_to_go_on
from cryoiso.parallel.context import Context
from cryoiso.pipeline import run


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    simulate(folder)
    return folder


@pytest.fixture
def stopped(monkeypatch):
    """Every command gets a signal at once."""
    monkeypatch.setattr(Context, "stop_requested", lambda self: True)
    yield
    forget_signals()


def said(*command: object) -> str:
    done = cryoiso_here(*command)
    assert done.returncode == 75 and done.stderr.count("error:") == 1, done.stderr
    return done.stderr.splitlines()[-1].removesuffix(" [stopped-by-signal]")


def test_every_command_names_its_own_way(data, tmp_path, stopped):
    star, ref = data / "particles.star", ("--ref", data / "truth_map.mrc")
    job, out = write_job(data), tmp_path / "out"
    same = "The same command with --resume goes on from there."
    assert said("run", job, "--out", out).endswith(f". 'cryoiso resume {out}' goes on from there.")
    assert said("resume", out).endswith(f". 'cryoiso resume {out}' goes on from there.")
    assert said("run", job).endswith(f". 'cryoiso resume {data}/job-run' goes on from there.")
    assert said("refine", star, *ref, "--out", tmp_path / "refine").endswith(same)
    assert said("realign", star, *ref, "--out", tmp_path / "realign").endswith(same)
    assert said("micelle", data / "truth.star", *ref, "--out", tmp_path / "micelle", "--threshold", 0.1).endswith(same)
    assert said("auxiliary", "train", data / "truth.star", *ref, "--out", tmp_path / "train").endswith(same)
    again = "Give the same command again."
    assert said("ingest", star, tmp_path / "shards").endswith(again)
    assert said("reconstruct", data / "truth.star", "--out", tmp_path / "maps").endswith(again)


def test_ctrl_c_says_how_to_go_on_where_there_is_something(data, tmp_path, monkeypatch):
    def pressed(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "check_job", pressed)
    done = cryoiso_here("run", write_job(data), "--out", tmp_path / "out")
    assert done.returncode == 130 and done.stderr.endswith("keyboard [interrupted-from-keyboard]\n"), done.stderr
    monkeypatch.undo()
    monkeypatch.setattr(run, "_work_through", pressed)
    done = cryoiso_here("run", write_job(data), "--out", tmp_path / "out")
    assert done.returncode == 130 and f"'cryoiso resume {tmp_path / 'out'}' goes on from there." in done.stderr
    assert "Traceback" not in done.stderr


def test_words_for_commands_that_end_before_they_begin():
    assert how_to_go_on("correct", {"go_on": False}) == how_to_go_on("correct", {"go_on": True})
    assert "job-run" in how_to_go_on("run", {"job": Path("a/job.toml"), "out": None, "go_on": True})


def test_names_that_are_not_utf8_are_refused_before_anything_is_written(data, tmp_path, monkeypatch):
    """As an option, as the folder that the command is given in, and in every command; a link with a good name works."""
    bad = tmp_path / os.fsdecode(b"folder \xff")
    bad.mkdir()
    job = write_job(data)
    commands = [
        ("run", job, "--out", bad / "run"), ("ingest", data / "particles.star", bad / "shards"),
        ("refine", bad / "p.star", "--ref", job, "--out", tmp_path / "o"),
    ]  # fmt: skip
    for command in commands:
        done = cryoiso_here(*command)
        assert done.returncode == 2 and done.stderr.count("error:") == 1 and r"folder \xff" in done.stderr, done.stderr
        assert "[name-not-utf8]" in done.stderr and "Traceback" not in done.stderr
    monkeypatch.chdir(bad)
    assert "is not valid UTF-8" in cryoiso_here("run", "job.toml").stderr
    monkeypatch.chdir(tmp_path)
    assert not list(bad.iterdir()) and not (tmp_path / "o").exists()
    (tmp_path / "good").symlink_to(bad)
    assert cryoiso_here("ingest", data / "particles.star", tmp_path / "good" / "shards").returncode == 0
    assert (bad / "shards/index.json").exists()
