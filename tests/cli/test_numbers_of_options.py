"""Numbers that no computation can use are refused with the option's name, before anything is computed."""

from __future__ import annotations

import pytest
from pipeline_helper import cryoiso_here

from cryoiso.core.errors import EXIT_USAGE

SIMULATE = ("simulate", "phantom", "set", "--n", 4, "--box", 28, "--pixel-size", 6)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "option", ["--snr-db", "--spread", "--pole-tilt", "--cs", "--voltage", "--defocus", "--shift-sd"]
)
def test_what_is_not_finite(option, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = (value, 20000) if option == "--defocus" else (value,)
    done = cryoiso_here(*SIMULATE, option, *values)
    assert done.returncode == EXIT_USAGE and option in done.stderr, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_the_option_is_named_as_it_is_written(tmp_path):
    words = ("ctf-refine", "none.star", "--ref", "none.mrc", "--resolution", 8, "--out", tmp_path / "out")
    done = cryoiso_here(*words, "--range", "nan")
    assert done.returncode == EXIT_USAGE and "--range: a finite number is expected (found nan)" in done.stderr


@pytest.mark.parametrize("words", [("--snr-db", "1e9"), ("--box", 100_000), ("--voltage", 300_000)])
def test_what_is_beyond_all_sense(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = cryoiso_here(*SIMULATE, *words)
    assert done.returncode == EXIT_USAGE and words[0] in done.stderr, done.stdout + done.stderr
    assert cryoiso_here("reference", "phantom", "x.mrc", "--box", 100_000, "--pixel-size", 4).returncode == EXIT_USAGE


def test_more_images_than_the_disk_holds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = cryoiso_here("simulate", "phantom", "set", "--n", 10**12)
    assert done.returncode == 1 and "no space left on the disk" in done.stderr and "[disk-full]" in done.stderr


def test_truth_without_poses(tmp_path):
    done = cryoiso_here("diagnose", "half1.mrc", "half2.mrc", "--truth-particles", "truth.star")
    assert done.returncode == EXIT_USAGE and "--truth-particles needs --particles" in done.stderr, done.stderr
