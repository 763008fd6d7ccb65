"""The memory of ranks that a user has chosen, or that go with GPUs, beside what a batch job asks for."""

from __future__ import annotations

import logging

import pytest

from cryoiso.core.config import Job
from cryoiso.core.errors import MissingError
from cryoiso.pipeline.planning.job_size import Problem
from cryoiso.pipeline.planning.node_memory import HOPELESS, chosen_ranks, first_of_chain, report
from cryoiso.pipeline.planning.ranks_that_fit import BYTES_PER_CORE, node_bytes

GB = 10**9


def problem(box: int = 256, n: int = 50_000, **launch) -> Problem:
    sections = {"particles": {"file": "p.star"}, "reference": {"file": "r.mrc"}, "launch": launch}
    return Problem(Job.model_validate(sections), n, box, 1.31, 150.0)


def test_ranks_that_fit_are_only_reported(caplog):
    part = chosen_ranks(problem(ranks_per_node=4, ram_gb=64))
    assert part.fits and part.asked and part.node_bytes == node_bytes(problem(), 1, 4)
    with caplog.at_level(logging.INFO, "cryoiso"):
        report(part)
    assert [r.levelno for r in caplog.records] == [logging.INFO]


def test_too_little_memory_is_a_warning_with_the_numbers_and_two_ways_out(caplog):
    needed = node_bytes(problem(), 1, 4)
    part = chosen_ranks(problem(ranks_per_node=4, cpus_per_rank=3, ram_gb=needed / GB / 1.2))
    assert not part.fits and not part.hopeless and part.fewer_ranks == 3
    report(part)
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    for words in ("4 rank(s) of 3 threads per node need about 25.", "GiB of memory asked for (launch.ram_gb)",
                  f"--ram-gb {-(-needed // GB)}", "--ranks-per-node 3 --cpus-per-rank 4"):  # fmt: skip
        assert words in caplog.text


def test_far_too_little_is_refused():
    needed = node_bytes(problem(), 1, 4)
    report(chosen_ranks(problem(ranks_per_node=4, ram_gb=1.01 * needed / GB / HOPELESS)))
    with pytest.raises(MissingError, match=r"--ranks-per-node 2 --cpus-per-rank 8") as caught:
        report(chosen_ranks(problem(ranks_per_node=4, ram_gb=0.99 * needed / GB / HOPELESS)))
    assert caught.value.code == "memory-short"


def test_a_job_that_asks_for_no_memory_is_never_refused(caplog):
    part = chosen_ranks(problem(400, ranks_per_node=4, cpus_per_rank=1))
    assert part.limit_bytes == 4 * BYTES_PER_CORE and part.node_bytes > HOPELESS * part.limit_bytes
    assert part.fewer_ranks == 0
    report(part)
    assert "taken to give (2 GiB per core)" in caplog.text and "--ranks-per-node" not in caplog.text


def test_on_gpus_ranks_stay_as_many_as_gpus(caplog):
    part = chosen_ranks(problem(400, gpus=4, ram_gb=60))
    assert (part.ranks_per_node, part.fewer_ranks) == (4, 0) and part.gpu_bytes > 10 * GB
    report(part)
    assert "of each GPU" in caplog.text and "--ram-gb" in caplog.text and "--ranks-per-node" not in caplog.text
    assert chosen_ranks(problem(400, gpus=4, ranks_per_node=8, ram_gb=600)).ranks_per_node == 8


def test_the_first_job_of_a_chain_has_memory_of_its_own():
    part = first_of_chain(problem(n=4_000_000, cpu_ranks=2, cpu_ram_gb=4, ram_gb=500))
    assert part.limit_bytes == 4 * GB and part.hopeless
    with pytest.raises(MissingError, match=r"^first job of the chain: 2 rank\(s\) .* --cpu-ram-gb 1\d$"):
        report(part)
