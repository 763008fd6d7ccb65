"""What a stage works on, and the reading that several stages share (on rank 0, for all)."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cryoiso.core.config import Job
from cryoiso.core.errors import InputError
from cryoiso.core.types import DensityMap, Particles
from cryoiso.io import ingest, read_job_particles, read_particle_file
from cryoiso.io.atomic import write_text
from cryoiso.io.mrc import read_map, read_raw_map
from cryoiso.io.shards import ShardSource
from cryoiso.parallel.abort import on_root
from cryoiso.parallel.context import Context
from cryoiso.physics.masks import sphere_mask
from cryoiso.pipeline.inputs.half_sets import assign_halves
from cryoiso.pipeline.inputs.reference import PIXEL_TOLERANCE, Reference, prepare_reference
from cryoiso.pipeline.inputs.standard_frame import require_mask_symmetry
from cryoiso.pipeline.records.journal import Journal
from cryoiso.pipeline.records.run_folder import RunFolder

if TYPE_CHECKING:
    from cryoiso.pipeline.scratch_copies import Scratch

logger = logging.getLogger("cryoiso")


@dataclass
class Work:
    """A job, its folder, its ranks, and what has been read of it already."""

    job: Job
    folder: RunFolder
    comm: Context
    journal: Journal | None = None
    """on rank 0 of a run"""
    manifest: dict[str, Any] | None = None
    """on rank 0 of a run"""
    report: Callable[[Path], object] | None = None
    """makes the report of a run folder"""
    resume: bool = False
    """the stage was interrupted and may go on from what its folder holds"""
    scratch: Scratch | None = None
    """copies of the images on the nodes' own disks"""
    timing: dict[str, Any] | None = None
    """what the stages of this process took, see ``pipeline.planning.timing``"""
    originals: bool | None = None
    """whether RELION needs no copy of the images; None until ``pipeline.planning.job_size`` has looked at a sample"""
    _plan: ingest.IngestPlan | None = None
    _particles: Particles | None = None
    _reference: Reference | None = None

    def note_checkpoint(self, stage: str, **facts: Any) -> None:
        if self.journal is not None:
            self.journal.append("checkpoint", stage=stage, **facts)

    @property
    def shards(self) -> Path:
        """Where the shards are: the job's particles themselves may be a folder of shards."""
        given = Path(self.job.particles.file)
        return given if given.is_dir() else self.folder.stage("ingest")

    def particles(self) -> Particles:
        """The source's particles with half-sets, every column of the source and the boxes of the stacks."""
        if self._particles is None:
            if self.shards != self.folder.stage("ingest"):
                found = ShardSource(self.shards).particles
                self._particles = assign_halves(found, self.job.run.seed, self.job.particles.file)
            else:
                self._particles = self.plan().particles
        return self._particles

    def plan(self) -> ingest.IngestPlan:
        """What ``io.ingest`` makes of the particle file: reads it, and the headers of its stacks."""
        if self._plan is None:
            section = self.job.particles
            particles = read_job_particles(section, symmetry=self.job.sample.symmetry)
            particles = assign_halves(particles, self.job.run.seed, section.file)
            self._plan = ingest.plan(particles, section, section.file)
        return self._plan

    def grid(self) -> tuple[int, float]:
        """Box and pixel size in Å of the maps: those of the first particle."""
        particles = self.particles()
        group = particles.first_group
        return group.box_px, group.pixel_size_A

    def reference(self) -> Reference:
        """The reference on the particles' grid."""
        if self._reference is None:
            section = self.job.reference
            self._reference = prepare_reference(
                Path(section.file), *self.grid(), section.lowpass_A,
                map_pixel_size_A=section.pixel_size_A, resample=section.resample, symmetry=self.job.sample.symmetry,
                fit=Path(section.fit) if section.fit else None, fit_resolution_A=section.fit_resolution_A,
            )  # fmt: skip
        return self._reference

    def diameter_A(self) -> float:
        """The particle's diameter: the job's, else as measured by the reference stage."""
        if self.job.sample.diameter_A:
            return self.job.sample.diameter_A
        return float(json.loads((self.folder.stage("reference") / "reference.json").read_text())["diameter_A"])

    def mask(self) -> DensityMap | None:
        """The user's solvent mask, if there is one."""
        name = self.job.sample.mask
        return read_mask(Path(name), *self.grid(), self.job.sample.symmetry) if name else None

    def truth(self) -> Particles | None:
        """The particles with their true poses, in the order of the source, where the job names them."""
        file = self.job.truth.particles
        if not file:
            return None
        symmetry = self.job.sample.symmetry
        truth = read_particle_file(file, self.job.particles.project, ("pose",), symmetry=symmetry)
        return with_poses_of(self.particles(), truth, file, self.job.particles.file)

    def truth_map(self) -> np.ndarray | None:
        """The true map, on the particles' grid, where the job names it.

        Raises:
            InputError: it is on another grid.
        """
        if not self.job.truth.map:
            return None
        box, pixel = self.grid()
        found = read_map(self.job.truth.map)
        require_grid(found, box, pixel, self.job.truth.map, "the particles")
        return found.data

    def source(self, *, once: bool = False) -> ShardSource:
        """The shards with the source's particles; rank 0 also has the table they came from. Collective.

        Args:
            once: the images will be read but once or twice, which is not worth a copy on scratch.
        """
        source = ShardSource(self.shards)
        particles = on_root(self.comm, lambda: bare(self.particles()))
        if not np.array_equal(particles.uid, source.particles.uid):
            raise InputError("the shards are of other particles", file=self.shards, hint="Start a new run.")
        if applied_to(particles) != applied_to(source.particles):
            raise InputError(
                "the shards hold images of another kind than the particle file says", file=self.shards,
                expected="the same rlnCtfDataAreCtfPremultiplied and rlnCtfDataArePhaseFlipped", hint="Ingest again.",
            )  # fmt: skip
        source.particles = self.particles() if self.comm.rank == 0 else particles
        if self.scratch is not None:
            self.scratch.attach(self, source, once=once)
        return source


def applied_to(particles: Particles) -> list[str]:
    """What was done to the images, by optics group in the order of first appearance."""
    _, first = np.unique(particles.optics, return_index=True)
    return [particles.groups[particles.optics[row]].ctf_applied for row in np.sort(first).tolist()]


def bare(particles: Particles) -> Particles:
    """Without the text of the source, but for the sign of each image: what ranks other than 0 need."""
    table = particles.table
    signs = table[["cryoisoSign"]] if table is not None and "cryoisoSign" in table else None
    return replace(particles, table=signs, optics_table=None)


def with_poses_of(particles: Particles, posed: Particles, file: object, source: object) -> Particles:
    """The particles with the poses that another file has for the same uids.

    Raises:
        InputError: ``posed`` (of ``file``) lacks a particle, or has no poses.
    """
    order = np.argsort(posed.uid, kind="stable")
    place = np.searchsorted(posed.uid[order], particles.uid)
    rows = order[np.minimum(place, len(order) - 1)]
    missing = np.flatnonzero(posed.uid[rows] != particles.uid)
    if len(missing):
        raise InputError(
            f"{len(missing)} of the particles are not in this file", file=file, expected="the image names of "
            f"{source}", hint=f"The first that is missing stands in row {int(missing[0]) + 1} there.",
        )  # fmt: skip
    rotation, shift_A = posed.require_poses(file)
    return particles.with_poses(rotation[rows], shift_A[rows])


def require_grid(found: DensityMap, box_px: int, pixel_size_A: float, file: object, other: str) -> None:
    """Stops at a map that is not on the grid of something else.

    Raises:
        InputError: another box, or a pixel size that differs by more than 1 %.
    """
    if found.box_px != box_px or abs(found.pixel_size_A / pixel_size_A - 1) > PIXEL_TOLERANCE:
        raise InputError(
            f"the map is on another grid than {other}", file=file, expected=f"{box_px} px of {pixel_size_A:g} Å",
            found=f"{found.box_px} px of {found.pixel_size_A:g} Å",
        )  # fmt: skip


def read_mask(path: Path, box_px: int, pixel_size_A: float, symmetry: str = "C1") -> DensityMap:
    """A solvent mask on a given grid, which its box decides; another pixel size in its header is said.

    Raises:
        InputError: another box, values outside 0..1, nothing inside, the solvent inside instead of the particle, or a
            mask without the symmetry.
    """
    mask = read_map(path, pixel_size_A)
    if mask.box_px != box_px:
        raise InputError("the mask has another box than the particles", file=path, expected=box_px, found=mask.box_px)
    low, high = float(mask.data.min()), float(mask.data.max())
    if low < -1e-3 or not 0 < high <= 1 + 1e-3:
        raise InputError("the mask is not between 0 and 1", file=path, found=f"{low:g} to {high:g}")
    if high < 0.5:
        raise InputError(f"the mask reaches no more than {high:g}", file=path, expected="1 inside the particle")
    sphere = sphere_mask(box_px, box_px / 2 - 1).numpy() > 0.5
    corners, inside = float(mask.data[~sphere].mean()), float(mask.data[sphere].mean())
    if corners > 0.5 and inside < corners - 0.05:
        raise InputError(
            "the mask is inverted", file=path, expected="the particle inside",
            found=f"{corners:.2f} in the corners of the box, {inside:.2f} within its sphere", hint="Give 1 - mask.",
        )  # fmt: skip
    header_A = read_raw_map(path)[1].voxel_A[0]
    unset = header_A <= 0 or header_A == 1.0  # what programs write that do not know it
    if not unset and abs(header_A / pixel_size_A - 1) > PIXEL_TOLERANCE:
        logger.warning(
            "%s has a pixel size of %g Å in its header, the maps have %g Å: it is used voxel by voxel",
            path, header_A, pixel_size_A,
        )  # fmt: skip
    require_mask_symmetry(mask.data, symmetry, path)
    return mask


def write_json(path: Path, facts: dict[str, Any]) -> None:
    """A JSON file, atomically."""
    write_text(path, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
