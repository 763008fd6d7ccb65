"""Batch systems: one record per system, with its environment variables and how a script is submitted to it.

A new system is one record here, a query in ``pipeline.batch.walltime`` and, if jobs are to be launched on it, a
template in ``pipeline/batch/templates`` and its name in ``launch.scheduler``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Submission:
    """How a script is given to a batch system."""

    command: tuple[str, ...]
    after: tuple[str, ...]
    """Further words for a job that starts when job {job} has ended well."""
    job_id: str
    """Regular expression whose group is the job's number in what the command prints."""
    script_on_stdin: bool = False


@dataclass(frozen=True)
class BatchSystem:
    """A batch system as a process sees it."""

    key: str
    """As in ``launch.scheduler`` where scripts can be made for it."""
    title: str
    variables: Mapping[str, str]
    """What a run notes -> environment variable that holds it; ``job`` is there for every system."""
    submission: Submission | None = None
    start: str = ""
    """Variable with the job's start in seconds since the epoch."""
    end: str = ""
    """Variable with its end in seconds since the epoch."""
    local_disk: str = ""
    """Variable with the job's folder on the node's own disk."""
    prefix: str = ""
    """Of all its variables that must not reach an MPI program started from inside a job."""
    step: tuple[str, ...] = field(default=())
    """Prefixes of those that describe one step and rank."""


SLURM = BatchSystem(
    "slurm", "Slurm",
    {
        "job": "SLURM_JOB_ID", "nodes": "SLURM_JOB_NODELIST", "cluster": "SLURM_CLUSTER_NAME",
        "partition": "SLURM_JOB_PARTITION", "name": "SLURM_JOB_NAME", "restarts": "SLURM_RESTART_COUNT",
        "array_task": "SLURM_ARRAY_TASK_ID",
    },
    Submission(
        ("sbatch", "--parsable"), ("--dependency=afterok:{job}", "--kill-on-invalid-dep=yes"), r"^(\d+)",
    ),
    start="SLURM_JOB_START_TIME", end="SLURM_JOB_END_TIME", local_disk="SLURM_TMPDIR", prefix="SLURM_",
    step=(
        "SLURM_STEP", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_GTIDS", "SLURM_TASK_PID", "SLURM_SRUN",
        "SLURM_LAUNCH", "SLURM_MPI", "SLURM_PMI", "SLURM_DISTRIBUTION", "SLURM_CPU_BIND", "SLURM_NTASKS_PER",
        "SLURM_UMASK",
    ),
)  # fmt: skip
PBS = BatchSystem(
    "pbs", "PBS",
    {"job": "PBS_JOBID", "nodes": "PBS_NODEFILE", "partition": "PBS_QUEUE", "name": "PBS_JOBNAME"},
    Submission(("qsub",), ("-W", "depend=afterok:{job}"), r"^(\S+)$"),
    local_disk="PBS_JOBFS",
)  # fmt: skip
LSF = BatchSystem(
    "lsf", "LSF",
    {"job": "LSB_JOBID", "nodes": "LSB_HOSTS", "partition": "LSB_QUEUE", "name": "LSB_JOBNAME"},
    Submission(("bsub",), ("-w", "done({job})"), r"Job <(\d+)>", script_on_stdin=True),
)  # fmt: skip
FLUX = BatchSystem("flux", "Flux", {"job": "FLUX_JOB_ID"})
GRID_ENGINE = BatchSystem(
    "grid_engine", "Grid Engine", {"job": "JOB_ID", "nodes": "PE_HOSTFILE", "partition": "QUEUE", "name": "JOB_NAME"}
)
SYSTEMS = (SLURM, PBS, LSF, FLUX, GRID_ENGINE)
"""In the order in which a job's variables are looked for."""
BY_KEY = {system.key: system for system in SYSTEMS}
JOB_START = "CRYOISO_JOB_START"
"""Which start of a requeued job this is, as scripts say for systems that do not count starts."""


def current(env: Mapping[str, str] | None = None) -> BatchSystem | None:
    """The batch system that this process is a job of."""
    env = os.environ if env is None else env
    return next((system for system in SYSTEMS if env.get(system.variables["job"])), None)


def job_facts(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """What the batch system says about this process's job, by the names of ``BatchSystem.variables``; empty outside of
    one."""
    env = os.environ if env is None else env
    system = current(env)
    return {} if system is None else {name: env[key] for name, key in system.variables.items() if env.get(key)}


def this_start(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """The batch job of this process, and which start of it: a requeued job keeps its number.

    Only of systems that scripts are made for: those count the starts of a job, or the script does.
    """
    env = os.environ if env is None else env
    system = current(env)
    facts = job_facts(env) if system is not None and system.submission is not None else {}
    return {"job": facts.get("job", ""), "restart": facts.get("restarts") or env.get(JOB_START) or "0"}
