"""Ranks give way to threads where the grids of several ranks would not fit into a node."""

from __future__ import annotations

import json
import re

import pytest
from launch_helper import make_job
from pipeline_helper import cryoiso_here

from cryoiso.core.config import Job, LaunchSection
from cryoiso.core.errors import EXIT_MISSING
from cryoiso.pipeline.planning.job_size import Problem
from cryoiso.pipeline.planning.ranks_that_fit import BYTES_PER_CORE, chooses_ranks, division_of, node_bytes

GB = 10**9


def problem(box: int, n: int = 50_000, **sections) -> Problem:
    job = Job.model_validate({"particles": {"file": "p.star"}, "reference": {"file": "r.mrc"}, **sections})
    return Problem(job, n, box, 1.31, 150.0)


def test_small_boxes_keep_four_ranks_and_large_ones_get_threads():
    small = division_of(problem(64), LaunchSection())
    assert (small.ranks_per_node, small.cpus_per_rank, small.limit_bytes) == (4, 4, 16 * BYTES_PER_CORE)
    large = division_of(problem(400), LaunchSection(ram_gb=64))
    assert large.ranks_per_node < 4 and large.ranks_per_node * large.cpus_per_rank == 16
    assert large.fits and large.usual_bytes > 64 * GB


@pytest.mark.parametrize("box", [128, 256, 400])
@pytest.mark.parametrize("nodes", [1, 3])
def test_the_most_ranks_that_fit_are_taken(box, nodes):
    p = problem(box)
    four, two, one = (node_bytes(p, nodes, ranks) for ranks in (4, 2, 1))
    assert four > two > one
    for limit, expected in ((four, 4), (four - GB // 10, 2), (two, 2), (two - GB // 10, 1), (one, 1), (one / 2, 1)):
        found = division_of(p, LaunchSection(ram_gb=limit / GB + 1e-6, nodes=nodes, cpus_per_rank=3))
        assert (found.ranks_per_node, found.cpus_per_rank) == (expected, 12 // expected)
        assert found.node_bytes == {4: four, 2: two, 1: one}[expected]
        assert found.fits == (limit >= one)


def test_a_job_that_does_not_fit_at_all_is_told():
    found = division_of(problem(400), LaunchSection(ram_gb=1))
    assert found.ranks_per_node == 1 and not found.fits
    assert "give --ram-gb" in found.in_words() and "4 ranks would need" in found.in_words()


@pytest.mark.parametrize(
    "sections",
    [{"launch": {"ranks_per_node": 4}}, {"launch": {"gpus": 2}}, {"refine": {"engine": "relion"}}],
)
def test_what_the_job_settles_is_left_alone(sections):
    assert not chooses_ranks(problem(256, **sections).job)
    assert chooses_ranks(problem(256).job)


def test_plan_and_launch_choose_and_say_the_same(data):
    job = data / "job.toml"
    plan = json.loads(cryoiso_here("plan", job, "--json").stdout)["launch"]
    assert plan["fits"] and plan["ranks_per_node"] == 4
    assert "cryoiso launch starts 4 rank(s) of 4 threads per node" in cryoiso_here("plan", job).stdout
    text = cryoiso_here("launch", job, "--scheduler", "slurm", "--mpi", "pmix").stdout
    assert "--ntasks-per-node=4" in text and "OMP_NUM_THREADS=4" in text

    limit_gb = (plan["node_bytes"] - GB // 10) / GB
    made = cryoiso_here("launch", job, "--scheduler", "slurm", "--mpi", "pmix", "--ram-gb", limit_gb)
    assert "--ntasks-per-node=2" in made.stdout and "OMP_NUM_THREADS=8" in made.stdout
    assert re.search(r"2 rank\(s\) of 8 threads per node: .* \(4 ranks would need .*\), within", made.stderr)
    given = cryoiso_here("launch", job, "--scheduler", "slurm", "--mpi", "pmix", "--ram-gb", limit_gb,
                         "--ranks-per-node", 4)  # fmt: skip
    assert "--ntasks-per-node=4" in given.stdout and "would need" not in given.stderr
    assert re.search(r"4 rank\(s\) of 4 threads per node need about .*, more than", given.stderr)
    assert "--ranks-per-node 2 --cpus-per-rank 8" in given.stderr
    refused = cryoiso_here("launch", job, "--scheduler", "slurm", "--mpi", "pmix", "--ram-gb", limit_gb / 2,
                           "--ranks-per-node", 4, "--submit")  # fmt: skip
    assert refused.returncode == EXIT_MISSING and not refused.stdout and "[memory-short]" in refused.stderr
    assert not job.with_name("job-launch.sh").exists()
    assert json.loads(cryoiso_here("plan", job, "--json", "--ranks-per-node", 2).stdout)["launch"] is None


def test_launch_writes_its_script_where_inputs_cannot_be_read(tmp_path):
    job = make_job(tmp_path / "data")
    done = cryoiso_here("launch", job, "--scheduler", "slurm", "--mpi", "pmix")
    assert done.returncode == 0 and "--ntasks-per-node=4" in done.stdout
    assert "ranks per node are not adapted to memory" in done.stderr
