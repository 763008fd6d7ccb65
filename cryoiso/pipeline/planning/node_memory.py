"""Whether a batch job's ranks fit into the memory of its nodes: chosen here where the job leaves it open, else checked.

On GPUs the ranks of a node are given by its GPUs, so there memory is checked only.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from cryoiso.core.config import Job, LaunchSection
from cryoiso.core.errors import CryoisoError, MissingError
from cryoiso.parallel.context import Context
from cryoiso.pipeline.finding import gib
from cryoiso.pipeline.job_inputs import Inputs
from cryoiso.pipeline.planning import memory
from cryoiso.pipeline.planning.job_size import Problem, problem_of
from cryoiso.pipeline.planning.ranks_that_fit import chooses_ranks, division_of, memory_limit, node_bytes
from cryoiso.pipeline.records.run_folder import RunFolder
from cryoiso.pipeline.workflow import WITHOUT_GPU, folder_stages, starts_a_program

logger = logging.getLogger("cryoiso")

HOPELESS = 1.5
"""Times the memory asked for from which on a job is refused, as at the start of a run (``site.checks``)."""


@dataclass(frozen=True)
class NodeMemory:
    """Memory of the node with rank 0, for ranks that were chosen by the user or go with GPUs."""

    ranks_per_node: int
    cpus_per_rank: int
    node_bytes: int
    """planned, in the stage that takes most"""
    limit_bytes: int
    """what the job asks for, or is taken to get"""
    asked: bool
    """whether the job asks for memory"""
    fewer_ranks: int
    """the most ranks that fit; 0: not one does, or ranks cannot be fewer"""
    gpu_bytes: int = 0
    """of GPU memory, per rank"""
    key: str = "ram_gb"
    """of [launch], that memory is asked for with"""

    @property
    def fits(self) -> bool:
        return self.node_bytes <= self.limit_bytes

    @property
    def hopeless(self) -> bool:
        return self.asked and self.node_bytes > HOPELESS * self.limit_bytes

    def in_words(self) -> str:
        """One sentence for people, and what to do if the ranks do not fit."""
        option = "--" + self.key.replace("_", "-")
        limit = f"{gib(self.limit_bytes)} of memory " + (
            f"asked for (launch.{self.key})" if self.asked else "that a batch system is taken to give (2 GiB per core)"
        )
        words = "first job of the chain: " if self.key == "cpu_ram_gb" else ""
        words += f"{self.ranks_per_node} rank(s) of {self.cpus_per_rank} threads per node need about "
        words += f"{gib(self.node_bytes)}" + (f", and {gib(self.gpu_bytes)} of each GPU" if self.gpu_bytes else "")
        if self.fits:
            return f"{words}, within the {limit}"
        words += f", more than the {limit}: give {option} {math.ceil(self.node_bytes / 1e9)}"
        if self.fewer_ranks:
            threads = self.ranks_per_node * self.cpus_per_rank // self.fewer_ranks
            words += f", or --ranks-per-node {self.fewer_ranks} --cpus-per-rank {threads}"
        return words


def fit_to_nodes(job: Job, *, chain: bool = False) -> Job:
    """A job whose ranks fit into its nodes, as far as that can be known here; what does not fit is said.

    Args:
        chain: the stages without a GPU are a batch job of their own (``launch.cpu_ranks``, ``launch.cpu_ram_gb``).

    Raises:
        MissingError: the user's ranks need far more memory than the job asks for.
    """
    if starts_a_program(job):
        return job
    try:
        problem = problem_of(Inputs(job, RunFolder(Path.cwd(), folder_stages(job)), Context()))
    except CryoisoError as error:
        what = "adapted to" if chooses_ranks(job) else "compared with"
        logger.warning("ranks per node are not %s memory, as the inputs cannot be read here: %s", what, error)
        return job
    for part in ([first_of_chain(problem)] if chain else []) + ([] if chooses_ranks(job) else [chosen_ranks(problem)]):
        report(part)
    if not chooses_ranks(job):
        return job
    division = division_of(problem, job.launch)
    logger.log(logging.INFO if division.fits else logging.WARNING, "%s", division.in_words())
    ranks = {"ranks_per_node": division.ranks_per_node, "cpus_per_rank": division.cpus_per_rank}
    return job.model_copy(update={"launch": job.launch.model_copy(update=ranks)})


def report(part: NodeMemory) -> None:
    """Says what a batch job needs.

    Raises:
        MissingError: it asks for far less.
    """
    if part.hopeless:
        raise MissingError(part.in_words(), code="memory-short")
    logger.log(logging.INFO if part.fits else logging.WARNING, "%s", part.in_words())


def chosen_ranks(p: Problem) -> NodeMemory:
    """The memory of a job whose ranks per node are given, or are those of its GPUs."""
    section = p.job.launch
    on_gpus = section.gpus > 0 and p.job.run.device != "cpu"
    p = replace(p, device="cuda") if on_gpus else p
    ranks = section.ranks_per_node or section.gpus
    cores = ranks * section.cpus_per_rank
    limit = memory_limit(section, cores)
    fewer = 0 if on_gpus else next(fewer_that_fit(p, section, ranks, limit), 0)
    gpu_bytes = max(memory.gpu_memory(p, section.nodes * ranks).values(), default=0) if on_gpus else 0
    needed = node_bytes(p, section.nodes, ranks)
    return NodeMemory(ranks, section.cpus_per_rank, needed, limit, section.ram_gb is not None, fewer, gpu_bytes)


def fewer_that_fit(p: Problem, section: LaunchSection, ranks: int, limit_bytes: int) -> Iterator[int]:
    """Fewer ranks that divide the cores of the given ones and fit, the most first."""
    cores = ranks * section.cpus_per_rank
    for count in range(ranks - 1, 0, -1):
        if cores % count == 0 and node_bytes(p, section.nodes, count) <= limit_bytes:
            yield count


def first_of_chain(p: Problem) -> NodeMemory:
    """The memory of the job of the stages without a GPU, on one node."""
    section = p.job.launch
    asks = section.model_copy(update={"ram_gb": section.cpu_ram_gb})
    needed = node_bytes(p, 1, section.cpu_ranks, WITHOUT_GPU)
    limit = memory_limit(asks, section.cpu_ranks * section.cpus_per_rank)
    return NodeMemory(
        section.cpu_ranks, section.cpus_per_rank, needed, limit, section.cpu_ram_gb is not None, 0, key="cpu_ram_gb"
    )
