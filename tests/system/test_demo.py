"""launch/demo.sh with a stand-in for the program: what it asks for, and that its last words are the report's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from cryoiso.core.config import parse_job

ROOT = Path(__file__).parents[2]
SENTENCES = ["Of 7 particles 3 are seen from the side.", "Before 2 of them got a wrong view.", "In this run 1 of them."]
STANDIN = """#!{python}
import json, sys
from pathlib import Path
words = sys.argv[1:]
with open("{log}", "a") as file:
    file.write(json.dumps([Path(sys.argv[0]).name, *words]) + "\\n")
if words[:1] == ["report"]:
    folder = Path(words[1])
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps({{"comparison": {{"sentences": {sentences}}}}}))
"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder in which the script ran, its output, and the commands it gave."""
    place = tmp_path_factory.mktemp("demo")
    shutil.copytree(ROOT / "launch", place / "launch", symlinks=True)
    shutil.copy(ROOT / "pyproject.toml", place)
    programs = place / ".venv" / "bin"
    programs.mkdir(parents=True)
    log = place / "commands.jsonl"
    for name in ("cryoiso", "mpirun"):
        (programs / name).write_text(STANDIN.format(python=sys.executable, log=log, sentences=SENTENCES))
        (programs / name).chmod(0o755)
    (programs / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (programs / "python").chmod(0o755)
    stamp = "echo \"$(cksum pyproject.toml | cut -d' ' -f1-2) $PWD mpich\" > .venv/.cryoiso-installed"
    subprocess.run(["bash", "-c", stamp], cwd=place, check=True)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "CRYOISO_VENV": str(place / ".venv"), "PARTICLES": "7", "SEED": "3"}
    done = subprocess.run(["bash", "launch/demo.sh"], cwd=place, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return place, done.stdout, [json.loads(line) for line in log.read_text().splitlines()]


def test_before_is_the_usual_refinement_and_after_the_default(demo):
    folder = demo[0] / "demo" / "phantom"
    default, usual = (tomllib.loads((folder / name).read_text()) for name in ("job.toml", "before.toml"))
    assert "refine" not in default and default["run"].keys() == {"title"}
    switches = {"regularisation": "mean-weight", "weighted_fsc": False, "view_density": False}
    assert usual.pop("refine") == switches
    assert usual.pop("run")["title"] != default.pop("run")["title"] and usual == default
    now = parse_job(default).refine
    assert all(getattr(now, key) != value for key, value in switches.items())


def test_both_runs_get_the_same_particles_and_are_compared(demo):
    commands = demo[2]
    assert [words[:2] for words in commands] == [
        ["cryoiso", "simulate"], ["cryoiso", "reference"], ["mpirun", "-n"], ["mpirun", "-n"], ["cryoiso", "report"],
    ]  # fmt: skip
    simulate = commands[0]
    assert simulate[simulate.index("--n") + 1] == "7" and simulate[simulate.index("--seed") + 1] == "3"
    assert [words[6:8] for words in commands[2:4]] == [
        ["run", "demo/phantom/before.toml"], ["run", "demo/phantom/job.toml"],
    ]  # fmt: skip
    assert commands[4][2:] == ["demo/phantom/run", "--before", "demo/phantom/before"]


def test_the_last_words_are_the_reports(demo):
    said = demo[1]
    for number, sentence in enumerate(SENTENCES, 1):
        assert f"  {number}. {sentence}\n" in said
    assert str(demo[0] / "demo/phantom/run/report.html") in said


def test_help_is_its_comment():
    said = subprocess.run(["bash", ROOT / "launch/demo.sh", "--help"], capture_output=True, text=True).stdout
    assert said.startswith("Shows what preferred orientation does") and "SEED" in said and "set -" not in said
