"""Auxiliary particles, anisotropy correction, realignment, micelle, and classes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from cryoiso.core.sections.base import MeasuredOrWeight, Section


class AuxiliarySection(Section):
    """Auxiliary particles: generators, images, and the rounds of co-refinement."""

    preset: Literal["auto", "paper", "small"] = Field(
        "auto", description="size of the generator; paper: for GPUs; small: for CPUs; auto: by the device"
    )
    generators: Literal["per-half", "shared", "white-noise", "coloured-noise"] = Field(
        "per-half",
        description="per-half: one network per half-set, so that the half-sets stay independent; shared: one network "
        "for both; white-noise, coloured-noise: no network, but projections with white noise or with noise of the "
        "particles' spectrum",
    )
    steps: int | None = Field(
        None, ge=1, description="training steps (default: paper 20,000, small 120, or 300 with annealing)"
    )
    batch: int | None = Field(
        None, ge=1, description="images per training step, summed over ranks (default: paper 8, small 16)"
    )
    learning_rate: float | None = Field(
        None, gt=0, description="learning rate of Adam (default: paper 0.0001, small 0.008, or 0.003 with annealing)"
    )
    likelihood_sd: float | None = Field(
        None,
        gt=0,
        description="standard deviation of the likelihood in units of the images' noise (default: by preset)",
    )
    kl_anneal_fraction: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of the training over which the weight of the KL term rises from 0 to 1 (default: paper 0.5, "
        "small 0)",
    )
    condition_lowpass_A: float = Field(
        10.0, ge=0, description="low-pass filter of the reference projections that condition the generator; 0: none"
    )
    poses: Literal["refine", "given"] = Field(
        "refine",
        description="poses at the start of the first round; refine: from a refinement; given: from the particle file",
    )
    ratio: float = Field(1.0, gt=0, le=20, description="auxiliary particles per raw particle")
    temperature: float = Field(
        0.5, ge=0, le=2, description="factor on the noise of auxiliary particles; below 1 they guide the raw ones more"
    )
    noise_group: Literal["own", "raw"] = Field(
        "own",
        description="own: auxiliary particles have their own optics groups and noise spectra; raw: they share those of "
        "the raw particles, as published (meant for temperature 1)",
    )
    weight: MeasuredOrWeight = Field(
        "measured",
        description="weight of auxiliary particles in the references (native engine); measured: by shell, at most what "
        "the raw particles alone confirm of the homologue, and none where they do not; a number: factor on their own "
        "weight (1: as published). They never count for resolution, signal power or convergence",
    )
    rounds: int = Field(2, ge=1, le=9, description="largest number of rounds of training, generation and co-refinement")
    settle_deg: float = Field(
        1.0, ge=0, description="stop the rounds once three quarters of the particles rotate by less than this"
    )
    balance: bool = Field(
        False,
        description="end with a local refinement of a subset with balanced views, as published, and make the maps from "
        "that subset; false: the maps are made from all raw particles",
    )
    balance_cap: float = Field(
        3.0, gt=0, description="most particles per direction, in multiples of the median of all occupied directions"
    )
    balance_keep: float = Field(
        0.25, ge=0, le=1, description="least share of particles kept in that subset; the cap rises until it is reached"
    )
    local_deg: float = Field(10.0, gt=0, le=90, description="angular range of that local refinement")
    post_command: str = Field(
        "",
        description="command run on each half-map between rounds; {input}, {output}, {half}, {round} and {pixel_size} "
        "are replaced",
    )
    export: bool = Field(False, description="also write the auxiliary particles as MRCS stacks with a STAR file")

    @property
    def has_network(self) -> bool:
        """Whether a network makes the images."""
        return self.generators in ("per-half", "shared")


class CorrectSection(Section):
    """Anisotropy correction of maps."""

    mode: Literal["paired", "independent"] = Field(
        "paired",
        description="paired: one network for both half-maps, as published (the FSC of its outputs is no resolution); "
        "independent: one network per half-map, trained on that half-map alone",
    )
    preset: Literal["auto", "paper", "small"] = Field(
        "auto", description="size of network and training; paper: for GPUs; small: for CPUs; auto: by the device"
    )
    method: Literal["completion", "published"] = Field(
        "completion",
        description="training of the network; completion: restore rotated copies of the map, filtered like the data; "
        "published: the losses of the publication",
    )
    solvent_steps: int = Field(
        10,
        ge=0,
        description="completion: steps before the network that keep density from falling below the solvent level",
    )
    rounds: int = Field(2, ge=1, description="completion: trainings in a row, each on the map of the previous one")
    epochs: int | None = Field(
        None,
        ge=0,
        description="passes over the sub-maps, summed over rounds (default: paper 30, small 10); 0: solvent constraint "
        "without a network",
    )
    sub_maps: int | None = Field(
        None, ge=1, description="sub-maps per epoch, drawn inside the mask (default: by preset)"
    )
    cube_px: int | None = Field(
        None, ge=16, description="edge length of a sub-map, a multiple of 8 (default: by preset)"
    )
    batch: int | None = Field(
        None, ge=1, description="sub-maps per training step, summed over ranks (default: by preset)"
    )
    learning_rate: float | None = Field(
        None, gt=0, description="learning rate of Adam (default: completion with the small preset 0.001, else 0.0004)"
    )
    alpha: float = Field(1.0, ge=0, description="published: weight of the equivariance loss")
    beta: float = Field(0.5, ge=0, description="published: weight of the noise2noise losses (paired mode only)")
    rotations: Literal["so3", "axes"] = Field(
        "so3",
        description="rotations of the map in training; so3: any; axes: the 24 of the cube's axes, as published",
    )
    cone_deg: float = Field(20.0, gt=0, le=60, description="half angle of the 3DFSC cones that measure the anisotropy")
    resolution_A: float | None = Field(
        None, gt=0, description="finest resolution to correct (default: where the half-map FSC falls below 0.143)"
    )
    keep_measured: bool = Field(
        True, description="take measured Fourier coefficients from the data and only the rest from the network"
    )


class RealignSection(Section):
    """Anisotropy correction of the references between the iterations of a refinement."""

    mode: Literal["independent", "paired"] = Field(
        "independent",
        description="independent: one network per half-set, so that the half-map FSC stays a gold standard; paired: "
        "one network for both, as published, which makes the half-sets dependent",
    )
    source: Literal["maps", "references"] = Field(
        "maps",
        description="input of the correction; maps: unregularised half-maps, as published; references: regularised "
        "references",
    )
    start_step_deg: float = Field(
        7.5, gt=0, description="correct in iterations with this angular sampling or a finer one"
    )
    start_resolution_A: float | None = Field(
        None, gt=0, description="correct only once the resolution is better than this (default: at any resolution)"
    )
    keep_lowres_A: float = Field(
        0.0, ge=0, description="keep the initial reference at resolutions coarser than this in all references; 0: off"
    )
    whitening: bool = Field(True, description="flatten the spectrum from whitening_from_A to the resolution")
    whitening_from_A: float = Field(10.0, gt=0, description="resolution at which the flattening begins")
    fsc_weighting: bool = Field(True, description="weight every shell by the half-map FSC")
    correct: bool = Field(True, description="correct the anisotropy with the network")
    retrain: Literal["warm", "afresh", "never"] = Field(
        "warm",
        description="network of each iteration; warm: train the previous one further; afresh: train a new one; never: "
        "use the first one",
    )
    epochs: int | None = Field(
        None, ge=1, description="passes over the sub-maps per iteration (default: paper 5, small 3)"
    )
    lowpass: bool = Field(
        False,
        description="low-pass filter corrected references at the resolution, as published, instead of keeping the "
        "engine's own reference beyond it",
    )
    match_scale: bool = Field(
        True, description="scale every shell of a corrected reference to the grey scale of the measured directions"
    )


class MicelleSection(Section):
    """Density around a membrane protein."""

    enable: bool = Field(False, description="reconstruct the micelle around the reference before the first round")
    threshold: float | None = Field(
        None, description="protein is where the reference, low-passed at 10 Å, exceeds this density (default: found)"
    )
    lowpass_A: float = Field(20.0, ge=0, description="resolution of the micelle; 0: as fine as the images")


class DiagnoseSection(Section):
    """What is measured of the final maps beside FSC, directions and views."""

    model: str = Field("", description="atomic model of the particle (PDB, mmCIF) for map-model FSC and Q-scores")
    compare_model: str = Field("", description="a second atomic model, compared with the first: RMSD, TM-like score")
    fit_model: Literal["auto", "yes", "no"] = Field(
        "auto",
        description="placement of the model in the map; auto: fitted as a rigid body unless it lies in the density "
        "already; yes: fitted; no: the coordinates of its file",
    )
    q_sigma_A: float = Field(0.6, gt=0, le=2, description="width of the reference Gaussian of the Q-scores")
    local_resolution: Literal["auto", "yes", "no"] = Field(
        "auto",
        description="measure the local resolution; auto: in boxes of up to 400 pixels (less than a minute)",
    )
    local_window_A: float | None = Field(
        None,
        gt=0,
        description="full width at half maximum of the window of the local resolution (default: the largest of 25 Å, "
        "10 pixels and 4 times the resolution)",
    )
    local_threshold: float = Field(0.143, gt=0, lt=1, description="local FSC at which the local resolution is read")


class ClassifySection(Section):
    """Classes of particles."""

    enable: bool = Field(
        False, description="classify the particles after the first refinement, and go on with the selected classes"
    )
    classes: int = Field(2, ge=1, le=64, description="number of classes of particles")
    select: str = Field(
        "largest",
        description="classes that a run goes on with, as numbers with commas between them; largest: the one with most "
        "particles",
    )
    align: Literal["none", "local", "global"] = Field(
        "none",
        description="poses during the classification; none: those of the particle file; local: searched within "
        "local_deg of them; global: searched over all views",
    )
    local_deg: float = Field(10.0, gt=0, le=90, description="range of a local search around the given poses")
    lowpass_A: float = Field(30.0, gt=0, description="low-pass filter of the first references")
    junk: bool = Field(False, description="a further class for images without a particle, judged within viewing cones")
    max_iterations: int = Field(40, ge=1, description="largest number of iterations; a converged classification stops")
    min_change: float = Field(
        0.01,
        gt=0,
        lt=1,
        description="converged if a smaller share of the particles changes class in an iteration",
    )

    @field_validator("select")
    @classmethod
    def _known_classes(cls, value: str, info: ValidationInfo) -> str:
        words, last = [word.strip() for word in value.split(",")], info.data.get("classes", 64)
        if value != "largest" and not all(word.isdecimal() and 0 < int(word) <= last for word in words):
            raise PydanticCustomError("classes", f"Input should be 'largest' or numbers of classes, 1 to {last}")
        return value

    @property
    def selected(self) -> tuple[int, ...]:
        """Numbers of the classes to go on with, from 1; empty: the largest."""
        return () if self.select == "largest" else tuple(sorted({int(word) for word in self.select.split(",")}))
