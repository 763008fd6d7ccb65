"""A command does not replace an earlier result unless it is told to; it looks before it reads anything."""

from __future__ import annotations

import json

import pytest
from test_cli import cryoiso

from cryoiso.core.errors import EXIT_DONE, EXIT_INPUT, EXIT_USAGE
from cryoiso.io.mrc import write_map
from cryoiso.physics.phantom import phantom_map

RESUMED = {
    "refine": ("refine.json", "none.star", "--ref", "none.mrc"),
    "realign": ("refine.json", "none.star", "--ref", "none.mrc"),
    "classify": ("classify.json", "none.star"),
    "micelle": ("micelle.json", "none.star", "--ref", "none.mrc"),
    "correct": ("correct.json", "none.mrc", "none.mrc"),
    "auxiliary train": ("train.json", "none.star", "--ref", "none.mrc"),
}
OTHERS = {
    "reconstruct": ("half1.mrc", "none.star"),
    "ctf-refine": ("ctf_refine.json", "none.star", "--ref", "none.mrc", "--resolution", 8),
    "auxiliary generate": ("generate.json", "none.folder", "none.star"),
    "rebalance": ("rebalance.json", "none.star", "--cap", 5),
    "symmetry": ("symmetry.json", "none.mrc"),
}
COMMANDS = RESUMED | OTHERS


@pytest.mark.parametrize("command", COMMANDS)
def test_an_earlier_result_is_kept(tmp_path, command):
    name, *words = COMMANDS[command]
    (tmp_path / name).write_text("a result")
    done = cryoiso(*command.split(), *words, "--out", tmp_path)
    assert done.returncode == EXIT_USAGE, done.stderr
    assert f"already holds {name}" in done.stderr and "--overwrite" in done.stderr
    assert (tmp_path / name).read_text() == "a result"
    flags = ("--overwrite", "--resume") if command in RESUMED else ("--overwrite",)
    for flag in flags:  # the next thing that is wrong is then the input
        done = cryoiso(*command.split(), *words, "--out", tmp_path, flag)
        assert done.returncode in (EXIT_INPUT, EXIT_USAGE) and "none." in done.stderr, done.stderr
        assert "already holds" not in done.stderr


def test_symmetry_as_json(tmp_path):
    write_map(tmp_path / "map.mrc", phantom_map(28, 6.0, 14.0).data, 6.0)
    out, words = tmp_path / "out", ("symmetry", tmp_path / "map.mrc", "--max-fold", 3)
    done = cryoiso(*words, "--out", out, "--json")
    facts = json.loads(done.stdout)
    assert done.returncode == EXIT_DONE and facts["proposed"] in ("C1", "C3")
    assert facts.pop("files")[0] == str(out / "symmetry.json")
    assert facts == json.loads((out / "symmetry.json").read_text())
