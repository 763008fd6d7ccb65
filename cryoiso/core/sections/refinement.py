"""Refinement: search, references, density of views, final reconstruction, and RELION as the engine."""

from __future__ import annotations

import tomllib
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from cryoiso.core.sections.base import AutoOrPositive, Section


class RefineSection(Section):
    """Refinement of poses."""

    engine: Literal["native", "relion", "cryosparc", "command", "files"] = Field(
        "native",
        description="refinement engine; native: the built-in one; relion: RELION's relion_refine_mpi; cryosparc: a "
        "cryoSPARC that you are logged in to, see [cryosparc]; command: any program, see [command]; files: by hand in "
        "another program, from files and back",
    )
    max_iterations: int = Field(25, ge=1, description="largest number of iterations; a converged refinement stops")
    healpix_order: int = Field(
        2, ge=1, le=5, description="HEALPix order of the global search grid; 1: 30, 2: 15, 3: 7.5 degrees"
    )
    local_deg: float | None = Field(
        None,
        gt=0,
        le=90,
        description="search only within this angle of the particles' given poses (default: all views)",
    )
    relax_symmetry: str = Field(
        "",
        description="point group that the particle has only nearly: a local search in C1 that looks near all copies of "
        "each given pose (native engine)",
    )
    shift_range_A: float | None = Field(None, gt=0, description="largest shift searched (default: a tenth of the box)")
    shift_step_A: float | None = Field(
        None, gt=0, description="coarsest step of the shift search (default: from the resolution)"
    )
    finest_step_deg: AutoOrPositive = Field(
        "auto",
        description="finest angular step of the search, above 0; auto: from resolution and diameter, below 0.5 degrees "
        "only while the posteriors are narrower",
    )
    padding: int = Field(2, ge=1, le=4, description="Fourier padding of references and reconstructions")
    join_halves_A: float = Field(
        40.0, ge=0, description="half-sets share information coarser than this, to stay in one frame"
    )
    solvent_mask: bool = Field(True, description="set the solvent of the references to zero")
    regularisation: Literal["uneven", "mean-weight"] = Field(
        "uneven",
        description="estimate of the references' signal power (tau²) from the FSC; uneven: with the noise of unevenly "
        "sampled directions; mean-weight: with the mean weight of each shell, as in RELION",
    )
    weighted_fsc: bool = Field(
        True, description="take search radius and convergence from an FSC weighted by the sampling of each direction"
    )
    scale: Literal["none", "group", "particle"] = Field(
        "none",
        description="estimate the scale of the signal and the noise level of the images; group: one of each per "
        "micrograph (rlnMicrographName, else optics group); particle: per image, near its micrograph's",
    )
    image_mask: Literal["none", "zero", "noise"] = Field(
        "none",
        description="what replaces the images outside a circle around the particle where they are scored (they are "
        "back-projected whole); zero: nothing; noise: random noise of the same spectrum (native engine)",
    )
    view_density: bool = Field(
        True, description="estimate the density of views from the posteriors and use it as a prior of the search"
    )
    view_axis_odds: float = Field(
        4.0,
        ge=1,
        description="largest factor by which that prior favours one axis over another, whichever end it is seen from; "
        "1: no preference",
    )
    view_polarity_floor: float = Field(
        0.1,
        gt=0,
        le=1,
        description="share of even views in the prior on the end from which an axis is seen; 1: no preference",
    )
    view_kernel_deg: float = Field(
        10.0, ge=3, le=60, description="standard deviation of the kernel that smooths the density of views"
    )
    junk: bool = Field(
        False,
        description="weight particles by their probability of showing a particle at all, judged within viewing cones "
        "(native engine)",
    )
    stalled_iterations: int = Field(
        1, ge=1, le=10, description="iterations without better resolution until the refinement counts as converged"
    )
    max_resolution_A: float | None = Field(
        None, gt=0, description="finest information used in the refinement (default: no limit)"
    )


class ReconstructSection(Section):
    """Final reconstruction."""

    padding: int = Field(2, ge=1, le=4, description="Fourier padding of the final reconstruction")


class RelionSection(Section):
    """RELION as the refinement engine."""

    program: str = Field("relion_refine_mpi", description="RELION's refinement program, a name or a path")
    launcher: str = Field(
        "auto",
        description="command that starts it under MPI, with {ranks} for the number of processes; auto: mpirun -n "
        "{ranks} (of RELION's own MPI) for relion_refine_mpi",
    )
    ranks: int = Field(3, ge=3, description="MPI processes of RELION: one leader and an even number of followers")
    threads: int = Field(1, ge=1, description="threads per process (--j)")
    images: Literal["auto", "original", "export"] = Field(
        "auto",
        description="images that RELION reads; original: the original stacks; export: stacks written from the shards; "
        "auto: the original stacks if no image was changed or added",
    )
    offset_range_px: float | None = Field(None, gt=0, description="shift search range (default: from shift_range_A)")
    offset_step_px: float = Field(1.0, gt=0, description="shift search step")
    auto_local_order: int = Field(4, ge=2, le=6, description="HEALPix order at which RELION starts local searches")
    tau2: Literal["relion", "uneven"] = Field(
        "relion",
        description="estimate of the references' signal power; relion: RELION's own, with the mean weight of each "
        "shell; uneven: with the noise of unevenly sampled directions (by external reconstruction in every iteration)",
    )
    extra: str = Field("", description="further arguments of relion_refine, as on a command line")
    timeout_min: float = Field(
        0.0, ge=0, description="stop with an error if RELION writes nothing for this time; 0: no time limit"
    )


class CommandSection(Section):
    """Any program as the refinement engine."""

    run: str = Field(
        "",
        description="command line that refines poses, without a shell; {particles}, {reference}, {out_particles} and "
        "others are replaced; with {half} it runs once per half-set",
    )
    go_on: str = Field(
        "", description="command line that continues an interrupted run in its folder (default: it starts again)"
    )
    name: str = Field("", description="name and version of the program, for the report")
    out_particles: str = Field(
        "particles_out.star", description="file with the poses that it writes, in its folder; RELION's or cisTEM's STAR"
    )
    out_half: str = Field(
        "half{half}.mrc",
        description="unregularised half-maps that it writes, in its folder; empty: reconstruct them from its poses",
    )
    images: Literal["auto", "original", "export"] = Field(
        "auto",
        description="images that it reads; original: the original stacks; export: stacks written from the shards; "
        "auto: the original stacks if no image was changed or added",
    )
    rounds: int = Field(
        1, ge=1, description="how often it runs; each round starts from the half-maps of the one before"
    )
    site_launcher: bool = Field(
        False, description="leave the batch system's variables to it, for a command that starts with srun or the like"
    )
    timeout_min: float = Field(
        0.0, ge=0, description="stop with an error if it writes nothing for this time; 0: no time limit"
    )
    limit_min: float = Field(0.0, ge=0, description="stop with an error if it runs longer; 0: no time limit")


def _table(value: Any) -> Any:
    """A table, also as the text of one, from a command line."""
    if not isinstance(value, str):
        return value
    try:
        return tomllib.loads(f"table = {value}")["table"]
    except tomllib.TOMLDecodeError:
        raise PydanticCustomError("table", "Input should be a table, {{name = value, ...}}") from None


class CryosparcSection(Section):
    """cryoSPARC as the refinement engine. Its address and login are those of cryosparc-tools, never of a job file."""

    project: str = Field("", description="uid of the project, e.g. P3")
    workspace: str = Field("", description="uid of the workspace in it, e.g. W1")
    lane: str = Field("", description="scheduler lane of the refinement (default: on the master itself)")
    job: Literal["homogeneous", "non-uniform", "local"] = Field(
        "homogeneous", description="kind of refinement; local wherever refine.local_deg is set"
    )
    params: Annotated[dict[str, bool | int | float | str], BeforeValidator(_table)] = Field(
        {}, description="further parameters of the refinement, by cryoSPARC's names, e.g. {refine_scale_min = true}"
    )
    images: Literal["auto", "original", "export"] = Field(
        "auto",
        description="images that it gets; original: the original stacks; export: stacks written from the shards; "
        "auto: the original stacks if no image was changed or added",
    )
    upload: bool = Field(
        True,
        description="copy images into the project; false: cryoSPARC reads them at the paths that this program has",
    )
    half_maps: Literal["cryosparc", "reconstruct"] = Field(
        "cryosparc", description="half-maps; cryosparc: its own; reconstruct: reconstructed from its poses"
    )
    on_stop: Literal["leave", "kill"] = Field(
        "leave", description="its job when this program is stopped by a signal; leave: it goes on, for a resume"
    )
    poll_s: float = Field(10.0, gt=0, description="time between two looks at its job")
    retry_min: float = Field(
        60.0, ge=0, description="how long a cryoSPARC that does not answer is waited for; its job goes on meanwhile"
    )
