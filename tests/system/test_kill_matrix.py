"""Real jobs of ranks that lose a rank, or RELION, or are told to stop, in every stage: all end, and nothing is lost.

A row hits every rank in every stage of its work, RELION wherever it works, and 20 times in all at least. What it hit is
one JSON object, in the property ``kill matrix`` of the test and in the file that CRYOISO_KILL_RECORD names.
CRYOISO_KILLS asks for fewer (or more) strikes a row; a row that has then not hit everything says so and counts as
skipped. What each row costs is in docs/benchmarks.md.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from kill_helper import Tally, chain, leave_alone, record
from pipeline_helper import cryoiso_here, hash_files, simulate, write_job

pytestmark = [pytest.mark.mpi, pytest.mark.slow]

SHORT = {"refine_max_iterations": 3}
AUXILIARY = {"auxiliary_steps": 12, "auxiliary_rounds": 1, "auxiliary_settle_deg": 0.0, "auxiliary_balance": True}
NETWORKS = {"correct_sub_maps": 4, "correct_cube_px": 16, "correct_epochs": 1, "realign_epochs": 1}
WITH_RELION = {"refine_engine": "relion", "refine_max_iterations": 2, "refine_padding": 1, "sample_diameter_A": 140.0}
AT_ONCE = {"refine_max_iterations": 3, "realign_start_step_deg": 30.0}
"""The correction works from RELION's first, coarse iteration."""
WORKS: dict[str, dict[str, Any]] = {
    "refine": SHORT,
    "auxiliary": {"run_workflow": "auxiliary", **AUXILIARY},
    "realign": {"run_workflow": "realign", **SHORT, **NETWORKS},
    "both": {"run_workflow": "both", "micelle_enable": True, **SHORT, **AUXILIARY, **NETWORKS},
}
RELION_WORKS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "refine": (WITH_RELION, {"refine"}),
    "realign": ({"run_workflow": "realign", **WITH_RELION, **NETWORKS, **AT_ONCE}, {"refine"}),
    "auxiliary": ({"run_workflow": "auxiliary", **WITH_RELION, **AUXILIARY}, {"refine", "corefine-1", "local"}),
}
"""Settings, and the stages in which RELION works."""
KILL, STOP = [signal.SIGKILL], [signal.SIGTERM, signal.SIGUSR1]
ASKED = int(os.environ.get("CRYOISO_KILLS", "0"))
KILLS = ASKED or 20
RELION_HITS = 10
MOST_RUNS = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return simulate(tmp_path_factory.mktemp("data"), n=60).parent


def our_files(folder: Path) -> dict[str, str]:
    """Hashes of all but the files of RELION, which hold times and the names of folders."""
    return {name: digest for name, digest in hash_files(folder).items() if "/relion/" not in name}


def strike_all_over(name: str, jobs: list[Path], folder: Path, numbers: list[int], relion: set[str]) -> dict[str, Any]:
    """Runs that are struck until everything was hit, each compared with one that was left alone.

    Args:
        jobs: the same with other places for the images; taken in turn.
        relion: the stages in which RELION is to be struck.

    Returns:
        what is kept of it.
    """
    began = time.monotonic()
    seconds, worked = leave_alone(2, jobs[0], folder / "whole")
    assert set(worked) >= relion
    tally = Tally(seconds, {s: worked[s] for s in seconds if s in relion}, 2, numbers, RELION_HITS if relion else 0)
    require_correction(folder / "whole")
    expected, same = our_files(folder / "whole"), list[bool]()
    while len(same) < MOST_RUNS and (len(tally.hits) < KILLS or (tally.missing() and not ASKED)):
        turn = len(same)
        run = folder / f"struck{turn}"
        aims = tally.aims(turn, ASKED - len(tally.hits) if ASKED else 100)
        chain(jobs[turn % len(jobs)], run, tally, aims, turn)
        same.append(require_nothing_lost(run, folder / "whole", expected))
    kept = record(name, tally, same, len(expected), began)
    assert len(tally.hits) >= KILLS, kept
    return kept


def require_nothing_lost(run: Path, whole: Path, expected: dict[str, str]) -> bool:
    """Whether a run that was struck has the bits of one that was left alone; it must, unless RELION went on in it.

    RELION that goes on after one of its iterations does not do what it would have done (nor when started by hand: it
    takes another resolution and other poses). Then everything is there, whole and as it was recorded, and nothing
    before RELION is another.
    """
    found = our_files(run)
    assert not list(run.rglob("*.part")) and not (run / "lock.json").exists()
    other = [name for name in expected.keys() | found.keys() if found.get(name) != expected.get(name)]
    if "--continue run_it" not in (run / "logs" / "rank-0000.log").read_text():
        assert not other
        return True
    assert found.keys() == expected.keys() and not [name for name in other if name < "03_refine"]
    checked = cryoiso_here("verify", run)
    assert checked.returncode == 0, checked.stderr
    for file in run.rglob("refine.json"):
        numbers, others = (iterations_of(path) for path in (file, whole / file.relative_to(run)))
        assert numbers == list(range(others[0], others[0] + len(numbers))), file
    return not other


def iterations_of(file: Path) -> list[int]:
    """Numbers of a refinement's iterations; RELION's begin with 2 where each half-set has a reference of its own."""
    return [record["iteration"] for record in json.loads(file.read_text())["iterations"]]


def require_correction(run: Path) -> None:
    """Where a work has the correction in its loop, it is to be struck there: it must have had something to do."""
    if 'workflow = "realign"' in (run / "job.toml").read_text():
        (file,) = run.glob("[0-9][0-9]_refine/refine.json")
        assert any(record["correction"]["applied"] for record in json.loads(file.read_text())["iterations"])


def keep(kept: dict[str, Any], record_property: Any) -> None:
    """Keeps a row, and stands by what the title of this file says."""
    line = json.dumps(kept)
    record_property("kill matrix", line)
    print(line)
    if file := os.environ.get("CRYOISO_KILL_RECORD"):
        with open(file, "a") as stream:
            stream.write(line + "\n")
    if kept["never_hit"] and ASKED:
        pytest.skip(f"LOUD: only {ASKED} strikes were asked for, and these were never hit: {kept['never_hit']}")
    assert not kept["never_hit"], kept


@pytest.mark.parametrize("numbers", [KILL, STOP], ids=["kill", "stop"])
@pytest.mark.parametrize("work", list(WORKS))
def test_struck_in_every_stage(work, numbers, data, tmp_path, record_property):
    """Every second run has its images on scratch, which nobody may leave full."""
    disk = tmp_path / "disk"
    disk.mkdir()
    jobs = [write_job(data, f"{work}{numbers[0]}{bool(scratch)}.toml", **WORKS[work], run_scratch=scratch)
            for scratch in ("", str(disk))]  # fmt: skip
    kept = strike_all_over(work, jobs, tmp_path, numbers, set())
    assert not list(disk.rglob("shard-*"))
    keep(kept, record_property)


@pytest.mark.relion
@pytest.mark.parametrize(
    ("work", "numbers"),
    [("refine", KILL), ("refine", STOP), ("realign", KILL), ("auxiliary", KILL)],
    ids=["refine-kill", "refine-stop", "realign-kill", "auxiliary-kill"],
)
def test_relion_is_struck(work, numbers, data, tmp_path, record_property):
    """A run with RELION, whose own processes are killed, and ours; ours alone are told to stop."""
    settings, stages = RELION_WORKS[work]
    job = write_job(data, f"relion-{work}{numbers[0]}.toml", **settings)
    kept = strike_all_over(f"{work} by RELION", [job], tmp_path, numbers, stages if numbers == KILL else set())
    keep(kept, record_property)
