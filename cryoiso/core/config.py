"""The job file's schema. Every key has a default but the particles and the reference; an unknown key is an error."""

from __future__ import annotations

import difflib
import json
import reprlib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cryoiso.core.commands import COMMANDS, split_command
from cryoiso.core.errors import UsageError


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)


class ParticlesSection(_Section):
    file: str = Field(description="particles: a RELION STAR file or a cryoSPARC .cs file")
    project: str = Field("", description="folder that relative image paths start from (empty: found as RELION does)")
    passthrough: list[str] = Field(
        [], description="cryoSPARC passthrough files with fields that a .cs file lacks (default: those beside it)"
    )
    invert: Literal["auto", "yes", "no"] = Field(
        "auto", description="multiply images by -1: yes if protein is dark in them, auto decides by the data"
    )
    normalise: bool = Field(True, description="scale every image to mean 0 and standard deviation 1 in its background")
    storage: Literal["float16", "float32"] = Field("float16", description="number format of the images in the shards")
    shard_mib: int = Field(256, ge=1, description="size of one shard file in MiB")


class ReferenceSection(_Section):
    file: str = Field(description="reference: an atomic model (PDB, mmCIF) or a map (MRC)")
    pixel_size_A: float | None = Field(
        None, gt=0, description="pixel size of the reference map, if its header is wrong"
    )
    resample: bool = Field(
        False, description="accept a map of another box or pixel size and bring it onto the data's grid"
    )
    lowpass_A: float = Field(
        30.0, gt=0, description="the refinement starts from the reference low-passed to this resolution"
    )
    fit: str = Field("", description="a map into whose frame the reference is turned and shifted (MRC, any grid)")
    fit_resolution_A: float | None = Field(
        None, gt=0, description="finest information that decides where it fits (default: 10, or 2.5 pixels if coarser)"
    )


class SampleSection(_Section):
    symmetry: str = Field("C1", description="point group: Cn, Dn, T, O or I")
    diameter_A: float | None = Field(None, gt=0, description="particle diameter (default: measured from the reference)")
    mask: str = Field("", description="solvent mask (MRC); empty: made from the half-maps themselves")


class RefineSection(_Section):
    engine: Literal["native", "relion"] = Field(
        "native", description="refinement engine: the embedded one, or RELION's relion_refine_mpi"
    )
    max_iterations: int = Field(25, ge=1, description="upper bound; the engine stops by itself when nothing improves")
    healpix_order: int = Field(2, ge=1, le=5, description="global search grid: 1 = 30, 2 = 15, 3 = 7.5 degrees")
    local_deg: float | None = Field(
        None, gt=0, le=90, description="search only within this angle of the particles' own poses (default: all views)"
    )
    shift_range_A: float | None = Field(None, gt=0, description="largest shift searched (default: a tenth of the box)")
    shift_step_A: float | None = Field(
        None, gt=0, description="coarsest step of the shift search (default: by resolution)"
    )
    finest_step_deg: float = Field(0.5, gt=0, description="the local search never gets finer than this")
    padding: int = Field(2, ge=1, le=4, description="Fourier padding of references and reconstructions")
    join_halves_A: float = Field(
        40.0, ge=0, description="halves share information coarser than this, to keep one frame"
    )
    solvent_mask: bool = Field(True, description="set the solvent of the references to zero")
    regularisation: Literal["uneven", "mean-weight"] = Field(
        "uneven",
        description="signal power of the references from the FSC: with the noise of unevenly measured directions, or "
        "with the mean weight of a shell, as RELION has it",
    )
    weighted_fsc: bool = Field(
        True, description="search radius and convergence from an FSC that counts directions as they were measured"
    )
    view_density: bool = Field(
        True, description="learn the density of views from the posteriors and search with it as a prior"
    )
    view_axis_odds: float = Field(
        4.0,
        ge=1,
        description="most that the learned density of views favours one axis over another, from whichever end they are "
        "seen; 1 switches it off",
    )
    view_polarity_floor: float = Field(
        0.1,
        gt=0,
        le=1,
        description="share of even views in the learned density that tells from which end an axis is seen; 1: off",
    )
    view_kernel_deg: float = Field(
        10.0, ge=3, le=60, description="standard deviation of the kernel that smooths the density of views"
    )
    junk: bool = Field(
        False,
        description="weigh particles by their probability of showing one at all, judged within viewing cones (native "
        "engine)",
    )
    stalled_iterations: int = Field(
        1, ge=1, le=10, description="iterations without a better resolution before the refinement has converged"
    )
    max_resolution_A: float | None = Field(None, gt=0, description="never use information finer than this")


class ReconstructSection(_Section):
    padding: int = Field(2, ge=1, le=4, description="Fourier padding of the final reconstruction")


class AuxiliarySection(_Section):
    preset: Literal["auto", "paper", "small"] = Field(
        "auto", description="size of the generator: paper (for GPUs), small (for CPUs), auto decides by the device"
    )
    generators: Literal["per-half", "shared", "white-noise", "coloured-noise"] = Field(
        "per-half",
        description="one generator per half-set keeps the halves independent; shared trains one on both; white-noise "
        "and coloured-noise train none: projections with white noise, or with the noise spectrum of the particles",
    )
    steps: int | None = Field(None, ge=1, description="training steps (default: paper 20,000, small 300)")
    batch: int | None = Field(None, ge=1, description="images a step, all ranks together (default: paper 8, small 16)")
    learning_rate: float | None = Field(None, gt=0, description="of Adam (default: paper 0.0001, small by preset)")
    likelihood_sd: float | None = Field(
        None, gt=0, description="noise left to the likelihood, in units of the images' noise (default by preset)"
    )
    kl_anneal_fraction: float = Field(
        0.5, gt=0, le=1, description="share of the training in which the weight of the KL term grows from 0 to 1"
    )
    condition_lowpass_A: float = Field(
        10.0, ge=0, description="the generator sees projections of the reference low-passed to this resolution"
    )
    poses: Literal["refine", "given"] = Field(
        "refine", description="poses that the first round starts from: refined ones, or those of the particle file"
    )
    ratio: float = Field(1.0, gt=0, le=20, description="auxiliary particles per raw particle")
    temperature: float = Field(
        0.5, ge=0, le=2, description="factor on the noise of auxiliary particles; below 1 they guide the raw ones more"
    )
    noise_group: Literal["own", "raw"] = Field(
        "own",
        description="own: auxiliary particles have optics groups, and noise spectra, of their own; raw: they share "
        "those of the raw particles, as published (meant for temperature 1)",
    )
    weight: float = Field(
        1.0,
        ge=0,
        description="factor on the weight that auxiliary particles have in the references (native engine); they never "
        "count for resolution, signal power or convergence",
    )
    rounds: int = Field(2, ge=1, le=9, description="rounds of training, generation and co-refinement at most")
    settle_deg: float = Field(
        1.0, ge=0, description="no further round once three quarters of the particles moved by less than this"
    )
    balance: bool = Field(True, description="end with a local refinement of a subset with balanced views")
    balance_cap: float = Field(
        3.0, gt=0, description="most particles of one direction, in multiples of the median direction that has any"
    )
    balance_keep: float = Field(
        0.25,
        ge=0,
        le=1,
        description="least share of the particles in that subset; the cap rises until it is kept",
    )
    local_deg: float = Field(10.0, gt=0, le=90, description="range of that local refinement")
    post_command: str = Field(
        "", description="run on each half's map between rounds; {input}, {output}, {half}, {round}, {pixel_size}"
    )
    export: bool = Field(False, description="also write the auxiliary particles as MRCS and STAR")

    @property
    def has_network(self) -> bool:
        """Whether a network makes the images."""
        return self.generators in ("per-half", "shared")


class CorrectSection(_Section):
    mode: Literal["paired", "independent"] = Field(
        "paired",
        description="paired: one network sees both half-maps, as published (its FSC is no resolution); independent: "
        "one network a half-map, which never sees the other half",
    )
    preset: Literal["auto", "paper", "small"] = Field(
        "auto",
        description="size of network and training: paper (for GPUs), small (for CPUs), auto decides by the device",
    )
    method: Literal["completion", "published"] = Field(
        "completion",
        description="completion: the network learns to restore rotated copies of the map, filtered like "
        "the data; published: the losses of the publication",
    )
    solvent_steps: int = Field(
        10, ge=0, description="completion: steps that keep density from going below the solvent, before the network"
    )
    rounds: int = Field(2, ge=1, description="completion: trainings in a row, each on the map of the one before")
    epochs: int | None = Field(
        None,
        ge=0,
        description="passes over the sub-maps, all rounds together (default: paper 30, small 10; 0: the solvent alone)",
    )
    sub_maps: int | None = Field(None, ge=1, description="sub-maps an epoch, drawn inside the mask (default by preset)")
    cube_px: int | None = Field(None, ge=16, description="edge of a sub-map, a multiple of 8 (default by preset)")
    batch: int | None = Field(None, ge=1, description="sub-maps a step, all ranks together (default by preset)")
    learning_rate: float | None = Field(None, gt=0, description="of Adam (default: small 0.001, else 0.0004)")
    alpha: float = Field(1.0, ge=0, description="published: weight of the equivariance loss")
    beta: float = Field(0.5, ge=0, description="published: weight of the noise2noise losses (paired mode only)")
    rotations: Literal["so3", "axes"] = Field(
        "so3", description="rotations of the map in training: any, or the 24 of the cube's axes as published"
    )
    cone_deg: float = Field(20.0, gt=0, le=60, description="half angle of the 3DFSC cones that measure the anisotropy")
    resolution_A: float | None = Field(
        None, gt=0, description="correct up to this resolution (default: where the half-map FSC drops below 0.143)"
    )
    keep_measured: bool = Field(
        True, description="take what was measured from the data and only the rest from the network; false: all from it"
    )


class RealignSection(_Section):
    mode: Literal["independent", "paired"] = Field(
        "independent",
        description="independent: one network a half-set, so that the half-map FSC stays a gold standard; paired: one "
        "network for both, as published, which ends their independence",
    )
    source: Literal["maps", "references"] = Field(
        "maps", description="correct the unregularised half-maps, as published, or the regularised references"
    )
    start_step_deg: float = Field(
        7.5, gt=0, description="the correction works in iterations with this angular sampling or a finer one"
    )
    start_resolution_A: float | None = Field(
        None, gt=0, description="and only once the resolution is better than this (default: at any)"
    )
    keep_lowres_A: float = Field(
        0.0, ge=0, description="keep the first reference's density coarser than this in all references; 0: do not"
    )
    whitening: bool = Field(True, description="flatten the spectrum from whitening_from_A to the resolution")
    whitening_from_A: float = Field(10.0, gt=0, description="where the flattening begins")
    fsc_weighting: bool = Field(True, description="weight every shell by the half-map FSC")
    correct: bool = Field(True, description="correct the anisotropy with the network")
    retrain: Literal["warm", "afresh", "never"] = Field(
        "warm", description="at every iteration: train on from the last network, begin a new one, or use the first one"
    )
    epochs: int | None = Field(None, ge=1, description="passes over the sub-maps each time (default: paper 5, small 3)")
    lowpass: bool = Field(
        False,
        description="low-pass the corrected references at the resolution, as published; false: beyond it stays what "
        "the engine made",
    )
    match_scale: bool = Field(
        True, description="bring every shell of the corrected reference to the grey scale of the measured directions"
    )


class RelionSection(_Section):
    program: str = Field("relion_refine_mpi", description="RELION's refinement program, a name or a path")
    launcher: str = Field(
        "auto",
        description="how the site starts it; {ranks} is replaced. auto: mpirun -n {ranks} (of RELION's own MPI) where "
        "relion_refine_mpi is used",
    )
    ranks: int = Field(3, ge=3, description="processes of RELION: one leader and an even number of followers")
    threads: int = Field(1, ge=1, description="threads of each of them (--j)")
    images: Literal["auto", "original", "export"] = Field(
        "auto",
        description="images RELION reads: the original stacks, or stacks written from the shards; auto: the originals "
        "if nothing was changed or added",
    )
    offset_range_px: float | None = Field(None, gt=0, description="shift search range (default: from shift_range_A)")
    offset_step_px: float = Field(1.0, gt=0, description="shift search step")
    auto_local_order: int = Field(4, ge=2, le=6, description="HEALPix order from which RELION searches locally")
    tau2: Literal["relion", "uneven"] = Field(
        "relion",
        description="signal power that regularises the references: relion: RELION's own, from the mean weight; uneven: "
        "from the noise that the FSC of unevenly measured directions sees (every iteration goes through our callback)",
    )
    extra: str = Field("", description="further arguments of relion_refine, as on a command line")
    timeout_min: float = Field(
        0.0, ge=0, description="stop with an error if RELION writes nothing for so long (minutes); 0: wait for ever"
    )


class MicelleSection(_Section):
    enable: bool = Field(False, description="reconstruct the micelle around the reference before the first round")
    threshold: float | None = Field(None, description="density of the reference that counts as protein (default: auto)")
    lowpass_A: float = Field(20.0, ge=0, description="resolution of the micelle")


class TruthSection(_Section):
    particles: str = Field(
        "", description="STAR file with the true poses of simulated particles, to measure errors against"
    )
    map: str = Field("", description="the true map of simulated particles")


class RunSection(_Section):
    workflow: Literal["refine", "auxiliary", "realign", "both"] = Field(
        "refine",
        description="refine; auxiliary: with auxiliary particles from a generator, against preferred views; realign: "
        "with anisotropy correction in the loop; both: auxiliary particles and the correction",
    )
    seed: int = Field(1, ge=0, description="every random number follows from it")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes a GPU where there is one")
    scratch: str = Field(
        "",
        description="copy the images to each node's own disk and read them there: a folder ($VARIABLES and {host} are "
        "replaced on each node), or auto: $TMPDIR and the like where that is such a disk; empty: do not",
    )
    title: str = Field("", description="a name for the report")
    hash_inputs: Literal["all", "small"] = Field(
        "all",
        description="SHA-256 of the image stacks, or of given shards, made while they are ingested: all, or small: "
        "only if they have at most 2 GiB together",
    )
    stop_before_end_s: float = Field(
        120.0, ge=0, description="stop with a checkpoint so long before the batch job's end, if that is known; 0: never"
    )


class LaunchSection(_Section):
    """What ``cryoiso launch`` asks of the batch system; nothing here changes a result."""

    scheduler: Literal["slurm", "pbs", "lsf", "mpirun"] = Field(
        "slurm", description="batch system: slurm, pbs (PBS Pro, OpenPBS), lsf, or mpirun (none)"
    )
    name: str = Field("", description="name of the batch job (default: that of the job file)")
    nodes: int = Field(1, ge=1, description="nodes")
    gpus: int = Field(0, ge=0, description="GPUs of each node; 0: none")
    gpu_type: str = Field("", description="kind of GPU, where the site wants it named, e.g. a100")
    ranks_per_node: int | None = Field(None, ge=1, description="MPI ranks of each node (default: one a GPU, else 4)")
    cpus_per_rank: int = Field(4, ge=1, description="CPU cores of each rank; it uses as many threads")
    ram_gb: float | None = Field(None, gt=0, description="memory of each node in GB (default: what the site gives)")
    time: str = Field("24:00:00", description="wall-time, HH:MM:SS or D-HH:MM:SS; longer runs go on in the next job")
    grace_s: int = Field(300, ge=10, description="so many seconds before its end the job writes a checkpoint and stops")
    requeue: bool = Field(True, description="queue the job again when it stopped before it was done")
    account: str = Field("", description="account or project that is charged")
    queue: str = Field("", description="queue or partition")
    modules: list[str] = Field([], description="modules to load")
    setup: list[str] = Field([], description="shell lines that prepare the environment, after the modules")
    program: str = Field("", description="cryoiso on the nodes (default: this installation's, or the image's)")
    image: str = Field("", description="container image that has cryoiso (a SIF file)")
    image_command: str = Field("", description="how an image is started (default: apptainer exec, --nv with GPUs)")
    mpi: str = Field(
        "auto",
        description="how ranks are started: mpirun, or under Slurm what srun --mpi gets (pmix for Open MPI, pmi2 for "
        "MPICH); auto: by the MPI library of this installation",
    )
    mpirun: str = Field(
        "", description="how mpirun is called; {ranks}, {ranks_per_node} and {nodes} are replaced (default: by library)"
    )
    extra: list[str] = Field([], description="further lines for the scheduler, e.g. --qos=long (without #SBATCH)")
    template: str = Field("", description="a site's own script, with placeholders as of cryoSPARC, RELION or cryoiso")
    variables: dict[str, str | int | float] = Field(
        {}, description="values for placeholders of that script that cryoiso does not know, e.g. {extra1 = '8gb'}"
    )
    cpu_queue: str = Field("", description="with --chain: queue of the first job, without GPUs (default: the same)")
    cpu_ranks: int = Field(4, ge=1, description="with --chain: MPI ranks of that job, on one node")
    cpu_time: str = Field("", description="with --chain: wall-time of that job (default: the same)")
    cpu_ram_gb: float | None = Field(
        None, gt=0, description="with --chain: memory of its node in GB (default: what the site gives)"
    )
    cpu_extra: list[str] = Field([], description="with --chain: further lines for the scheduler in that job")


class Job(_Section):
    """A whole job file."""

    particles: ParticlesSection
    reference: ReferenceSection
    sample: SampleSection = Field(default_factory=SampleSection)
    refine: RefineSection = Field(default_factory=RefineSection)
    reconstruct: ReconstructSection = Field(default_factory=ReconstructSection)
    auxiliary: AuxiliarySection = Field(default_factory=AuxiliarySection)
    micelle: MicelleSection = Field(default_factory=MicelleSection)
    correct: CorrectSection = Field(default_factory=CorrectSection)
    realign: RealignSection = Field(default_factory=RealignSection)
    relion: RelionSection = Field(default_factory=RelionSection)
    truth: TruthSection = Field(default_factory=TruthSection)
    run: RunSection = Field(default_factory=RunSection)
    launch: LaunchSection = Field(default_factory=LaunchSection)


MOST_EXPLAINED = 6
"""Mistakes of a job file that are told at once; a lost section head makes one of every key."""


def parse_job(data: dict[str, Any], file: object = "job.toml") -> Job:
    """Checks a decoded job file.

    Raises:
        UsageError: names every bad key with what was expected, what was found and the nearest known key.
    """
    try:
        job = Job.model_validate(data)
    except ValidationError as error:
        wrong = error.errors()
        text = "; ".join(_explain(file, e) for e in wrong[:MOST_EXPLAINED])
        more = len(wrong) - MOST_EXPLAINED
        raise UsageError(text + (f"; and {more} more" if more > 0 else "")) from None
    for section, key in COMMANDS:
        split_command(getattr(getattr(job, section), key), f"{file}: '{section}.{key}'")
    return job


def _explain(file: object, e: Any) -> str:
    where = ".".join(str(part) for part in e["loc"])
    if e["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(e["loc"][-1]), _known_keys(e["loc"][:-1]), n=1)
        known = ", ".join(_known_keys(e["loc"][:-1]))
        return f"{file}: unknown key '{where}'" + (
            f", did you mean '{near[0]}'?" if near else f" (known here: {known})"
        )
    if e["type"] == "missing":
        return f"{file}: '{where}' is missing"
    return f"{file}: '{where}': {e['msg']} (found {reprlib.repr(e.get('input'))})"


def _known_keys(path: tuple) -> list[str]:
    model: Any = Job
    for part in path:
        model = model.model_fields[part].annotation
    return list(model.model_fields)


def job_to_toml(job: Job) -> str:
    """The job with every default written out and every key explained by a comment."""
    lines: list[str] = []
    for name in Job.model_fields:
        section = getattr(job, name)
        lines.append(f"[{name}]")
        for key, info in type(section).model_fields.items():
            value = getattr(section, key)
            lines.append(f"# {info.description}")
            lines.append(f"{key} = {_toml(value)}" if value is not None else f"# {key} =")
        lines.append("")
    return "\n".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(key)} = {_toml(v)}" for key, v in value.items()) + "}"
    return repr(value)
