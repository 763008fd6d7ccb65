"""The folder of an External job of RELION's GUI: what a program writes there about its end and its results.

RELION waits for one of the files RELION_JOB_EXIT_SUCCESS, _FAILURE and _ABORTED, and then reads
RELION_OUTPUT_NODES.star, a table ``output_nodes`` of files that other jobs can take as input. Version 3.1 reads the
number of a node's type, version 4 and later its label; each ignores the other's column. ``job_pipeline.star`` is
written by RELION itself, before the program starts. (pipeliner.cpp, pipeline_jobs.h of 3.1.3, 4.0.1 and 5.0.1.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryoiso.io.atomic import write_text

OUTPUT_NODES = "RELION_OUTPUT_NODES.star"
ABORT_NOW = "RELION_JOB_ABORT_NOW"
"""RELION's GUI makes this file to ask a running job to stop."""
SUCCESS, FAILURE, ABORTED = "RELION_JOB_EXIT_SUCCESS", "RELION_JOB_EXIT_FAILURE", "RELION_JOB_EXIT_ABORTED"
RUN_OUT = "run.out"
"""The file of a job's output that the GUI shows."""


@dataclass(frozen=True)
class NodeType:
    """What kind of file an output is."""

    number: int
    """In RELION 3.1."""
    label: str
    """In RELION 4 and later."""


PARTICLES = NodeType(3, "ParticleGroupMetadata.star.relion")
DENSITY = NodeType(6, "DensityMap.mrc")
MASK = NodeType(7, "Mask3D.mrc")
HALF_MAP = NodeType(10, "DensityMap.mrc.halfmap")


@dataclass(frozen=True)
class OutputNode:
    """A file that a job offers to other jobs."""

    file: str
    """Inside the job's folder."""
    type: NodeType


def begin(folder: Path) -> None:
    """Removes what an earlier start of the job left about its end."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (SUCCESS, FAILURE, ABORTED, OUTPUT_NODES):
        (folder / name).unlink(missing_ok=True)


def finish(folder: Path, mark: str) -> None:
    """Tells RELION how the job ended: SUCCESS, FAILURE or ABORTED."""
    (folder / ABORT_NOW).unlink(missing_ok=True)
    write_text(folder / mark, "")


def abort_wanted(folder: Path) -> bool:
    """Whether the user pressed "Abort"."""
    return (folder / ABORT_NOW).exists()


def write_output_nodes(folder: Path, nodes: Sequence[OutputNode]) -> None:
    """Writes those nodes whose files are there; without any, RELION expects no table.

    Args:
        folder: of the job, as RELION gave it: node names are relative to the project's folder.
    """
    rows = [
        f"{folder / node.file} {node.type.number} {node.type.label}" for node in nodes if (folder / node.file).exists()
    ]
    if not rows:
        return
    columns = ("_rlnPipeLineNodeName #1", "_rlnPipeLineNodeType #2", "_rlnPipeLineNodeTypeLabel #3")
    head = ("", "# version 30001", "", "data_output_nodes", "", "loop_", *columns)
    write_text(folder / OUTPUT_NODES, "\n".join((*head, *rows, "", "")))
