"""How a job runs: workflow, seed, devices, scratch; and what ``cryoiso launch`` requests from the batch system."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cryoiso.core.sections.base import Section


class RunSection(Section):
    """Workflow, random numbers, devices."""

    workflow: Literal["refine", "auxiliary", "realign", "both"] = Field(
        "refine",
        description="refine: refinement alone; auxiliary: with auxiliary particles from a generator; realign: with "
        "anisotropy correction in the loop; both: auxiliary particles and correction",
    )
    propose_symmetry: bool = Field(
        False, description="test the final half-maps for a point group; what is found is proposed, not imposed"
    )
    seed: int = Field(1, ge=0, description="seed of all random numbers")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="device to compute on; auto: a GPU if present")
    scratch: str = Field(
        "",
        description="copy the images to a local disk of each node and read them there: a folder ($VARIABLES and {host} "
        "are replaced on each node), or auto: $TMPDIR or similar if that is a local disk (default: no copy)",
    )
    title: str = Field("", description="title of the report")
    cs_result: bool = Field(
        False, description="write result/particles.cs too, for cryoSPARC: the uids and fields of a .cs input, new poses"
    )
    hash_inputs: Literal["all", "small"] = Field(
        "all",
        description="SHA-256 of image stacks and given shards, computed while they are read; all: always; small: only "
        "up to 2 GiB in total",
    )
    stop_before_end_s: float = Field(
        120.0, ge=0, description="stop with a checkpoint this long before the batch job's end, if it is known; 0: never"
    )


class LaunchSection(Section):
    """What ``cryoiso launch`` requests from the batch system; nothing here changes a result."""

    scheduler: Literal["slurm", "pbs", "lsf", "mpirun"] = Field(
        "slurm", description="batch system; pbs: PBS Pro, OpenPBS; mpirun: no batch system"
    )
    name: str = Field("", description="name of the batch job (default: that of the job file)")
    nodes: int = Field(1, ge=1, description="number of nodes")
    gpus: int = Field(0, ge=0, description="GPUs per node")
    gpu_type: str = Field("", description="type of GPU, if the site requires one, e.g. a100")
    ranks_per_node: int | None = Field(None, ge=1, description="MPI ranks per node (default: one per GPU, else 4)")
    cpus_per_rank: int = Field(4, ge=1, description="CPU cores, and threads, per rank")
    ram_gb: float | None = Field(None, gt=0, description="memory per node (default: the site's)")
    time: str = Field(
        "24:00:00", description="wall time limit, HH:MM:SS or D-HH:MM:SS; longer runs continue in the next job"
    )
    grace_s: int = Field(300, ge=10, description="time before the limit at which the job writes a checkpoint and stops")
    requeue: bool = Field(True, description="requeue the job if it stopped before the run was complete")
    expedite: bool = Field(
        False,
        description="Slurm 25.11 or later, where the site allows it: after a node failure restart at once, with the "
        "highest priority (--requeue=expedite)",
    )
    account: str = Field("", description="account or project to charge")
    queue: str = Field("", description="queue or partition")
    modules: list[str] = Field([], description="environment modules to load")
    setup: list[str] = Field([], description="shell lines that prepare the environment, after the modules")
    program: str = Field("", description="path of cryoiso on the nodes (default: this installation's, or the image's)")
    image: str = Field("", description="container image with cryoiso (a SIF file)")
    image_command: str = Field("", description="command that runs the image (default: apptainer exec, --nv with GPUs)")
    mpi: str = Field(
        "auto",
        description="how ranks are started: mpirun, or under Slurm the argument of srun --mpi (pmix for Open MPI, pmi2 "
        "for MPICH); auto: by the MPI library of this installation",
    )
    mpirun: str = Field(
        "",
        description="command line of mpirun; {ranks}, {ranks_per_node}, {nodes} are replaced (default: by MPI library)",
    )
    extra: list[str] = Field([], description="further scheduler directives, e.g. --qos=long (without #SBATCH)")
    template: str = Field("", description="the site's own script, with placeholders of cryoSPARC, RELION or cryoiso")
    variables: dict[str, str | int | float] = Field(
        {}, description="values of that script's own placeholders, e.g. {extra1 = '8gb'}"
    )
    cpu_queue: str = Field("", description="with --chain: queue of the first job, without GPUs (default: the same)")
    cpu_ranks: int = Field(4, ge=1, description="with --chain: MPI ranks of the first job, on one node")
    cpu_time: str = Field("", description="with --chain: wall time limit of the first job (default: the same)")
    cpu_ram_gb: float | None = Field(
        None, gt=0, description="with --chain: memory of the first job's node (default: the site's)"
    )
    cpu_extra: list[str] = Field([], description="with --chain: further scheduler directives of the first job")
