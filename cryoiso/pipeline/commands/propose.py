"""What ``cryoiso init`` proposes for a job, from the particle file, some images and the reference: with its evidence.

Nothing is set: a proposal is a comment in the job file. Where the evidence is weak, it says so and proposes nothing.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cryoiso.core.config import Job
from cryoiso.core.errors import CryoisoError
from cryoiso.core.types import Particles
from cryoiso.io.stack import StackReader, number_of_file
from cryoiso.metrics.image_extent import ParticleExtent, RadialVariance
from cryoiso.physics.symmetry import point_group
from cryoiso.pipeline.commands.reference_facts import DALTON_A3, ReferenceFacts, facts_of_reference
from cryoiso.pipeline.inputs.reference import LARGEST_RATIO, PIXEL_TOLERANCE, model_choice

logger = logging.getLogger("cryoiso")

BOX_OVER_DIAMETER = 1.5
"""Room for what the CTF spreads, and for a background around the particle."""
COARSEST_A, FINEST_A = 4.0, 1.0
"""Pixel sizes beyond which a sentence is due: nothing finer than 8 Å; or slow for a first run."""
FIRST_LOOK_PX = 128
SEEN_NARROWER, NARROWER = 1.8, 0.9
"""Reference's diameter over that of the signal in the images: 1.03 to 1.50 for even views, see `RadialVariance`."""
ROUND, GAIN = 0.25, 1.3
"""Below this share of directional power a finer low-pass is considered, and proposed if it raises it so much. At 30 Å:
0.14 apoferritin (1.2 times as much at 20 Å), 0.18 PfCRT (1.5 times), 0.39 to 0.68 for seven others."""
Kind = Literal["proposed", "note", "warning"]


@dataclass(frozen=True)
class JobProposal:
    """About one key of the job file."""

    key: str
    """SECTION.KEY"""
    kind: Kind
    words: str
    value: Any = None
    """proposed, if any"""

    @property
    def line(self) -> str:
        """As a comment in the job file."""
        value = "" if self.value is None else f"{json.dumps(self.value)}: "
        mark = {"note": "", "proposed": "proposed ", "warning": "warning: "}[self.kind]
        return f"{mark}{value}{self.words}"


@dataclass
class Proposals:
    """All proposals for a job."""

    found: list[JobProposal] = field(default_factory=list)
    extent: ParticleExtent | None = None
    reference: ReferenceFacts | None = None

    def add(self, key: str, kind: Kind, words: str, value: Any = None) -> None:
        """Adds one."""
        self.found.append(JobProposal(key, kind, words, value))

    def notes(self) -> dict[str, list[str]]:
        """SECTION.KEY -> comments for the job file."""
        notes: dict[str, list[str]] = {}
        for proposal in self.found:
            notes.setdefault(proposal.key, []).append(proposal.line)
        return notes

    def facts(self) -> dict[str, Any]:
        """Plain values for a file."""
        return {
            "proposals": [vars(proposal) for proposal in self.found],
            "images": None if self.extent is None else self.extent.facts(),
            "reference": None if self.reference is None else self.reference.facts(),
        }  # fmt: skip


def propose(particles: Particles, job: Job, images: int, named: bool, file: object = None) -> Proposals:
    """Looks at the particle file, at some images and at the reference.

    Args:
        job: with paths that can be opened.
        images: number of images that are looked at; 0: none.
        named: whether the job names a reference that should be there.
        file: of the particles, for messages.

    Raises:
        InputError: the reference cannot be read. Images that cannot be read are a warning among the proposals.
    """
    proposals = Proposals()
    group = int(np.bincount(particles.optics, minlength=len(particles.groups)).argmax())
    pixel_A, box_px = particles.groups[group].pixel_size_A, particles.groups[group].box_px
    if images:
        box_px = _look_at_images(proposals, particles, group, images, file) or box_px
    if named:
        choice = model_choice(job.reference)
        proposals.reference = facts_of_reference(Path(job.reference.file), choice, job.reference.pixel_size_A)
        _about_symmetry(proposals, proposals.reference, job.sample.symmetry)
        _about_lowpass(proposals, proposals.reference)
        if proposals.reference.kind == "map":
            _about_map(proposals, proposals.reference, box_px, pixel_A)
        _about_model_parts(proposals, proposals.reference)
    _about_diameter(proposals)
    _about_grid(proposals, box_px, pixel_A)
    _about_mask(proposals, box_px, pixel_A)
    return proposals


def _look_at_images(proposals: Proposals, particles: Particles, group: int, images: int, file: object) -> int:
    """Measures the width of the signal; returns the box of the stacks, 0 where they cannot be read."""
    rows = np.flatnonzero(np.isin(particles.optics, _groups_alike(particles, group)))
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(images, len(rows))).round().astype(np.int64))]
    pixel_A = particles.groups[group].pixel_size_A
    variance: RadialVariance | None = None
    headers: set[float] = set()
    try:
        with StackReader() as reader:
            stacks = particles.stack[rows]
            numbers = number_of_file(stacks)
            for number in np.unique(numbers).tolist():
                rows_of_stack = rows[numbers == number]
                path = str(particles.stack[rows_of_stack[0]])
                read = reader.read(path, particles.index[rows_of_stack], file=file, rows=rows_of_stack)
                headers.add(round(float(reader.header(path).voxel_A[0]), 4))
                if variance is None:
                    variance = RadialVariance(read.shape[-1], pixel_A)
                if read.shape[1:] == (variance.box_px, variance.box_px):
                    variance.add(read)
    except CryoisoError as error:
        proposals.add("particles.file", "warning", f"the images were not looked at: {error}")
        return 0
    assert variance is not None
    proposals.extent = variance.extent()
    said = sorted(h for h in headers if h > 0 and h != 1.0 and abs(h / pixel_A - 1) > PIXEL_TOLERANCE)
    boxes = particles.groups[group].box_px, variance.box_px
    if boxes[0] and boxes[0] != boxes[1]:
        proposals.add(
            "particles.file", "warning",
            f"the images have {boxes[1]} px, the particle file says {boxes[0]} px. If they were binned or cropped "
            "after it was written, its pixel size may be wrong as well",
        )  # fmt: skip
    if said:
        proposals.add(
            "particles.file", "warning",
            f"the headers of the stacks say {', '.join(f'{h:g}' for h in said)} Å per pixel, the particle file "
            f"{pixel_A:g} Å. The particle file counts; if the images were binned after it was written, it is wrong",
        )  # fmt: skip
    return variance.box_px


def _groups_alike(particles: Particles, group: int) -> list[int]:
    """Optics groups with the box and the pixel size of one of them: their images can be looked at together."""
    like = particles.groups[group]
    return [
        number for number, other in enumerate(particles.groups)
        if other.box_px == like.box_px and abs(other.pixel_size_A / like.pixel_size_A - 1) <= PIXEL_TOLERANCE
    ]  # fmt: skip


def _about_symmetry(proposals: Proposals, reference: ReferenceFacts, named_symmetry: str) -> None:
    key, evidence = "sample.symmetry", reference.symmetry_words
    if not reference.symmetry:
        proposals.add(key, "note", evidence)
        return
    nearly = f"; {reference.nearly} only nearly, do not impose it without a reason" if reference.nearly else ""
    text = f"{evidence[:1].lower()}{evidence[1:].rstrip('.')}{nearly if reference.kind == 'model' else ''}"
    if named_symmetry.upper() == reference.symmetry.upper():
        proposals.add(key, "note", f"the reference has it: {text}")
    elif named_symmetry.upper() in ("C1", "AUTO"):
        if reference.symmetry == "C1":
            proposals.add(key, "note", text)
            return
        proposals.add(
            key, "proposed", f"the reference has it: {text}. The particles may have less",
            reference.symmetry,
        )  # fmt: skip
    else:
        lower = len(point_group(named_symmetry)) < len(point_group(reference.symmetry))
        proposals.add(
            key, "note" if lower else "warning", f"the reference has {reference.symmetry}, not {named_symmetry}: {text}"
        )


def _about_lowpass(proposals: Proposals, reference: ReferenceFacts) -> None:
    shares = reference.directional
    if 30.0 not in shares:
        return
    text = f"at 30 Å {100 * shares[30.0]:.0f} % of the reference's power depends on the direction"
    if shares[30.0] >= ROUND:
        proposals.add("reference.lowpass_A", "note", f"{text}, enough to tell views apart")
        return
    finer = next((k for k, share in shares.items() if k < 30 and share >= GAIN * shares[30.0]), None)
    if finer is None:
        proposals.add(
            "reference.lowpass_A", "warning",
            f"{text}: it is nearly round, views are hard to tell apart, and a finer filter changes little",
        )  # fmt: skip
        return
    proposals.add(
        "reference.lowpass_A", "proposed",
        f"{text}, at {finer:g} Å {100 * shares[finer]:.0f} %: views are easier to tell apart. The finer the filter, "
        "the more of the reference can stay in the result", finer,
    )  # fmt: skip


def _about_map(proposals: Proposals, reference: ReferenceFacts, box_px: int, pixel_A: float) -> None:
    """Whether a map's grid is the particles'."""
    assert reference.box_px is not None and reference.voxel_A is not None
    cube = len(set(reference.box_px)) == 1
    voxel = float(np.mean(reference.voxel_A))
    same_pixel = max(abs(v / pixel_A - 1) for v in reference.voxel_A) <= PIXEL_TOLERANCE
    same_box = cube and reference.box_px[0] == box_px
    if (same_pixel and same_box) or not box_px:
        return
    has = f"{' x '.join(str(n) for n in (reference.box_px[:1] if cube else reference.box_px))} px of {voxel:g} Å"
    text = f"the map has {has}, the particles {box_px} px of {pixel_A:g} Å"
    ratio = max(reference.box_px) * voxel / (box_px * pixel_A)
    if same_box:
        proposals.add(
            "reference.pixel_size_A", "warning",
            f"{text}: the same box with another pixel size. If the map is of these particles, its header is wrong, and "
            f"this key is {pixel_A:g}; if not, set resample = true",
        )  # fmt: skip
    elif 1 / LARGEST_RATIO <= ratio <= LARGEST_RATIO:
        proposals.add("reference.resample", "proposed", text, True)
    else:
        proposals.add(
            "reference.pixel_size_A", "warning",
            f"{text}: the map is {ratio:.2g} times as wide. One of the pixel sizes is wrong, or it is another sample",
        )  # fmt: skip


def _about_model_parts(proposals: Proposals, reference: ReferenceFacts) -> None:
    facts = (reference.source or {}).get("model", {})
    if facts.get("b_column") != "confidence":
        return
    from cryoiso.io.confidence import words_of

    text = f"a predicted model ({facts['evidence']})"
    text += f": {words_of(facts)}" if "min_confidence" in facts else ""
    proposals.add("reference.confidence", "note", text)


def _about_diameter(proposals: Proposals) -> None:
    key, reference, extent = "sample.diameter_A", proposals.reference, proposals.extent
    if reference is not None:
        proposals.add(
            key, "note", f"{reference.diameter_A:.0f} Å in the reference, with a margin of 10 Å on either side"
        )
    if extent is None:
        return
    if extent.diameter_A is None:
        proposals.add(key, "note", f"not estimated from the images: {extent.reason}")
        return
    seen, bounds = extent.diameter_A, extent.particle_A
    assert bounds is not None
    proposals.add(
        key, "note",
        f"the signal in {extent.images} images is {seen:.0f} Å wide (standard deviation {extent.spread_A:.1f} Å): a "
        f"particle that is seen evenly measures {bounds[0]:.0f} to {bounds[1]:.0f} Å; one that is mostly seen along "
        "its longest direction is longer",
    )  # fmt: skip
    if reference is None:
        return
    ratio = reference.diameter_A / seen
    if ratio < NARROWER:
        proposals.add(
            key, "warning", f"the reference is narrower ({reference.diameter_A:.0f} Å) than what the images show: a "
            "part of the particle is missing in it, a pixel size is wrong, or it is another sample",
        )  # fmt: skip
    elif ratio > SEEN_NARROWER:
        proposals.add(
            key, "warning", f"the reference is {ratio:.1f} times as wide as what the images show (1.0 to 1.55 with "
            "even views): most views are along its longest direction, a pixel size is wrong, or it is another sample",
        )  # fmt: skip


def _about_grid(proposals: Proposals, box_px: int, pixel_A: float) -> None:
    """Box and pixel size of the particles."""
    if not box_px:
        return
    key, edge_A = "particles.file", box_px * pixel_A
    text = f"box of {edge_A:.0f} Å ({box_px} px of {pixel_A:g} Å)"
    bounds = None if proposals.extent is None else proposals.extent.particle_A
    if proposals.reference is not None:
        low = high = proposals.reference.diameter_A
        text += f", {edge_A / low:.2f} times the reference's diameter"
    elif bounds is not None:
        low, high = bounds
        text += f", {edge_A / high:.2f} to {edge_A / low:.2f} times the diameter, as the images show it"
    else:
        low = high = 0.0
        text += "; the diameter is not known"
    least = int(np.ceil(BOX_OVER_DIAMETER * low / pixel_A / 2)) * 2
    if edge_A < 1.05 * low:
        proposals.add(key, "warning", f"{text}: the particle does not fit; extract it in a box of {least} px or more")
    elif edge_A < BOX_OVER_DIAMETER * low:
        proposals.add(
            key, "warning", f"{text}: less than {BOX_OVER_DIAMETER:g} times leaves little room for what the CTF "
            f"spreads and for a background; {least} px would do",
        )  # fmt: skip
    else:
        proposals.add(key, "note", text + (": enough" if edge_A >= BOX_OVER_DIAMETER * high > 0 else ""))
    if pixel_A > COARSEST_A:
        proposals.add(key, "warning", f"pixels of {pixel_A:g} Å hold nothing finer than {2 * pixel_A:.1f} Å")
    elif box_px > 2 * FIRST_LOOK_PX or (pixel_A < FINEST_A and box_px > FIRST_LOOK_PX):
        binned_A = edge_A / FIRST_LOOK_PX
        proposals.add(
            key, "note", f"for a first look, bin the images to {FIRST_LOOK_PX} px of {binned_A:.3g} Å (finest detail "
            f"{2 * binned_A:.1f} Å)",
        )  # fmt: skip


def _about_mask(proposals: Proposals, box_px: int, pixel_A: float) -> None:
    reference = proposals.reference
    if reference is None or reference.mass_kDa is None:
        return
    volume = 1000 * reference.mass_kDa * DALTON_A3
    text = f"empty: computed from the half-maps. The model has {reference.mass_kDa:g} kDa, about {volume:,.0f} Å^3"
    if box_px:
        text += f" or {100 * volume / (np.pi / 6 * (box_px * pixel_A) ** 3):.1f} % of the sphere in the box"
    proposals.add("sample.mask", "note", text)
