"""Real jobs of ranks that lose a rank, or RELION, or are told to stop, in every stage: all end, and nothing is lost."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from kill_helper import chain, launch, seconds_of_stages, summary
from pipeline_helper import hash_files, simulate, write_job

pytestmark = [pytest.mark.mpi, pytest.mark.slow]

AUXILIARY = {"auxiliary_steps": 12, "auxiliary_rounds": 1, "auxiliary_settle_deg": 0.0}
NETWORKS = {"correct_sub_maps": 4, "correct_cube_px": 16, "correct_epochs": 1, "realign_epochs": 1}
WORKFLOWS: dict[str, dict[str, Any]] = {
    "refine": {"refine_max_iterations": 3},
    "auxiliary": {"run_workflow": "auxiliary", **AUXILIARY},
    "realign": {"run_workflow": "realign", "refine_max_iterations": 3, **NETWORKS},
}
KILLS = int(os.environ.get("CRYOISO_KILLS", "20"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return simulate(tmp_path_factory.mktemp("data"), n=60).parent


def our_files(folder: Path) -> dict[str, str]:
    """Hashes of all but the files of RELION, which hold times and the names of folders."""
    return {name: digest for name, digest in hash_files(folder).items() if "/relion/" not in name}


def strike_all_over(job: Path, with_scratch: Path, folder: Path, targets: list[str], numbers: list[int]) -> str:
    """Runs that are struck until there were enough hits, each compared with one that was left alone."""
    process = launch(2, job, folder / "whole")
    _, said = process.communicate(timeout=900)
    assert process.returncode == 0, said
    expected, seconds = our_files(folder / "whole"), seconds_of_stages(folder / "whole")
    hits: list[Any] = []
    for seed in range(10):
        run = folder / f"struck{seed}"
        hits += chain(2, with_scratch if seed % 2 else job, run, seconds, targets, numbers, seed)
        found = our_files(run)
        assert found == expected, [name for name in expected.keys() | found.keys()
                                   if found.get(name) != expected.get(name)]  # fmt: skip
        assert not list(run.rglob("*.part")) and not (run / "lock.json").exists()
        if len(hits) >= KILLS:
            break
    assert len(hits) >= KILLS
    return summary(hits)


@pytest.mark.parametrize("numbers", [[signal.SIGKILL], [signal.SIGTERM, signal.SIGUSR1]], ids=["kill", "stop"])
@pytest.mark.parametrize("workflow", list(WORKFLOWS))
def test_struck_in_every_stage(workflow, numbers, data, tmp_path, record_property):
    """Every second run has its images on scratch, which nobody may leave full."""
    disk = tmp_path / "disk"
    disk.mkdir()
    jobs = [write_job(data, f"{workflow}{numbers[0]}{bool(scratch)}.toml", **WORKFLOWS[workflow], run_scratch=scratch)
            for scratch in ("", str(disk))]  # fmt: skip
    said = strike_all_over(*jobs, tmp_path, ["0", "1"], numbers)
    record_property("kill matrix", said)
    print(f"{workflow}: {said}")
    assert not list(disk.rglob("shard-*"))


@pytest.mark.relion
def test_relion_is_struck(data, tmp_path, record_property):
    """A refinement by RELION, whose own processes are killed, and ours."""
    job = write_job(
        data, "relion.toml", refine_engine="relion", refine_max_iterations=2, refine_padding=1, sample_diameter_A=140.0
    )  # fmt: skip
    said = strike_all_over(job, job, tmp_path, ["relion"], [signal.SIGKILL])
    assert "'relion'" in said
    record_property("kill matrix", said)
    print(f"relion: {said}")
