"""How the cores of a node are divided between ranks and threads, where a job leaves it open.

Every rank of a refinement has Fourier grids of its own, and threads of a rank share them. So ranks give way to threads
where the grids of several would not fit into the memory of a node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cryoiso.core.config import Job, LaunchSection
from cryoiso.pipeline.finding import gib
from cryoiso.pipeline.planning import memory
from cryoiso.pipeline.planning.job_size import Problem
from cryoiso.pipeline.workflow import starts_a_program

USUAL_RANKS = 4
"""Of a node without GPUs; results are the same bits on one to four ranks."""
BYTES_PER_CORE = 2 << 30
"""What a batch system gives a core at least where nothing else is asked for."""


@dataclass(frozen=True)
class Division:
    """Ranks and threads of a node without GPUs."""

    ranks_per_node: int
    cpus_per_rank: int
    node_bytes: int
    """planned, of the node with rank 0"""
    limit_bytes: int
    """what the node has, or is taken to have"""
    usual_bytes: int
    """the same as ``node_bytes`` with ``USUAL_RANKS``"""

    @property
    def fits(self) -> bool:
        return self.node_bytes <= self.limit_bytes

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "fits": self.fits}

    def in_words(self) -> str:
        """One sentence for people."""
        words = f"{self.ranks_per_node} rank(s) of {self.cpus_per_rank} threads per node: {gib(self.node_bytes)}"
        if self.ranks_per_node < USUAL_RANKS:
            words += f" ({USUAL_RANKS} ranks would need {gib(self.usual_bytes)}, each having grids of its own)"
        limit = f"{gib(self.limit_bytes)} of memory"
        return (
            f"{words}, within {limit}"
            if self.fits
            else f"{words}, which is more than {limit}: give --ram-gb, if a node has more"
        )


def chooses_ranks(job: Job) -> bool:
    """Whether ranks are to be chosen: they are not given, there is no GPU for each, and no other program refines."""
    return job.launch.ranks_per_node is None and not job.launch.gpus and not starts_a_program(job)


def division_of(p: Problem, section: LaunchSection) -> Division:
    """The most ranks whose memory fits into a node; the other cores become threads.

    Args:
        section: [launch]; ``ram_gb`` is the memory of a node, else ``BYTES_PER_CORE`` for each core.
    """
    cores = USUAL_RANKS * section.cpus_per_rank
    limit = memory_limit(section, cores)
    needed = {ranks: node_bytes(p, section.nodes, ranks) for ranks in (4, 2, 1)}
    ranks = next((ranks for ranks, size in needed.items() if size <= limit), 1)
    return Division(ranks, cores // ranks, needed[ranks], limit, needed[USUAL_RANKS])


def memory_limit(section: LaunchSection, cores: int) -> int:
    """Bytes of a node: ``ram_gb``, else ``BYTES_PER_CORE`` for each core."""
    return int(1e9 * section.ram_gb) if section.ram_gb is not None else BYTES_PER_CORE * cores


def node_bytes(p: Problem, nodes: int, ranks_per_node: int, stages: Sequence[str] | None = None) -> int:
    """Memory of the node that rank 0 is on, in the stage that takes most.

    Args:
        stages: only these (default: all of the job).
    """
    own, metadata = memory.memory_of_stages(p, nodes * ranks_per_node), memory.metadata_of_stages(p)
    return max(metadata[name] + ranks_per_node * own[name] for name in stages or own)
