"""The inputs of one job, each read once for all stages (on rank 0, for all)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cryoiso.core import products
from cryoiso.core.config import Job
from cryoiso.core.errors import InputError
from cryoiso.core.types import DensityMap, Particles
from cryoiso.io import ingest, read_job_particles, read_particle_file
from cryoiso.io.models import is_model
from cryoiso.io.mrc import read_map
from cryoiso.io.shards import ShardSource
from cryoiso.io.sources import SubsetSource
from cryoiso.parallel.abort import on_root
from cryoiso.parallel.context import Context
from cryoiso.pipeline.inputs.grids import read_mask, require_grid
from cryoiso.pipeline.inputs.half_sets import assign_halves
from cryoiso.pipeline.inputs.particle_tables import applied_to, bare, with_poses_of
from cryoiso.pipeline.inputs.reference import Reference, model_choice, prepare_reference
from cryoiso.pipeline.records.journal import Journal
from cryoiso.pipeline.records.run_folder import RunFolder
from cryoiso.pipeline.scratch_copies import Scratch
from cryoiso.pipeline.workflow import CO_REFINEMENTS

COARSE_BOX_PX = 128
"""of the grid on which a model's diameter is measured for plans: the density of a large box takes a minute"""


@dataclass(frozen=True)
class Sample:
    """What an engine must be told of the particle, the same on every rank."""

    pixel_size_A: float
    """of the maps, see ``Inputs.grid``"""
    diameter_A: float
    mask: DensityMap | None
    """the user's solvent mask"""


class Inputs:
    """What a job names, read when it is first wanted. The methods are for rank 0, unless they are collective.

    All that changes while a run goes on is here: what has been read already, and where images are read from.
    """

    def __init__(self, job: Job, folder: RunFolder, comm: Context, particles: Particles | None = None) -> None:
        """Reads nothing yet.

        Args:
            folder: in which the stages ``ingest`` and ``reference`` leave shards and diameter.
            particles: those of the job's shards, with poses and half-sets; None: read from the job's file.
        """
        self.job, self.folder, self.comm = job, folder, comm
        self.scratch: Scratch | None = None
        """copies of the images on the nodes' own disks, see ``using_scratch``"""
        self.originals: bool | None = None
        """whether RELION needs no copy of the images; None until ``pipeline.planning.job_size`` has looked at some"""
        self._plan: ingest.IngestPlan | None = None
        self._particles = particles
        self._reference: Reference | None = None
        self._selected: SelectedInputs | None = None

    def selected(self) -> Inputs:
        """The same for the stages after a classification; the inputs themselves in a job without one."""
        if not self.job.classify.enable:
            return self
        if self._selected is None:
            self._selected = SelectedInputs(self)
        return self._selected

    @property
    def shards(self) -> Path:
        """Where the shards are: the job's particles themselves may be a folder of shards."""
        particles_path = Path(self.job.particles.file)
        return particles_path if particles_path.is_dir() else self.folder.stage("ingest")

    def particles(self) -> Particles:
        """The source's particles with half-sets, every column of the source and the boxes of the stacks."""
        if self._particles is None:
            if self.shards != self.folder.stage("ingest"):
                particles = ShardSource(self.shards).particles
                self._particles = assign_halves(particles, self.job.run.seed, self.job.particles.file)
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
            self._reference = self._prepared_reference(*self.grid(), self.job.reference.lowpass_A)
        return self._reference

    def _prepared_reference(self, box_px: int, pixel_size_A: float, lowpass_A: float) -> Reference:
        section = self.job.reference
        return prepare_reference(
            Path(section.file), box_px, pixel_size_A, lowpass_A,
            map_pixel_size_A=section.pixel_size_A, resample=section.resample, symmetry=self.job.sample.symmetry,
            fit=Path(section.fit) if section.fit else None, fit_resolution_A=section.fit_resolution_A,
            model=model_choice(section),
        )  # fmt: skip

    def expected_diameter_A(self) -> float:
        """The particle's diameter for plans: the density of a model is made on a coarser grid than the particles'."""
        box_px, pixel_A = self.grid()
        ready = self._reference is not None or self.job.reference.fit or not is_model(self.job.reference.file)
        if self.job.sample.diameter_A or ready or box_px <= COARSE_BOX_PX:
            return self.job.sample.diameter_A or self.reference().diameter_A
        coarse_A = pixel_A * box_px / COARSE_BOX_PX
        lowpass_A = self.job.reference.lowpass_A and max(self.job.reference.lowpass_A, 2.5 * coarse_A)
        return self._prepared_reference(COARSE_BOX_PX, coarse_A, lowpass_A).diameter_A

    def diameter_A(self) -> float:
        """The particle's diameter: the job's, else as measured by the reference stage."""
        if self.job.sample.diameter_A:
            return self.job.sample.diameter_A
        measured = self.folder.stage("reference") / products.facts("reference")
        return float(json.loads(measured.read_text())["diameter_A"])

    def sample(self) -> Sample:
        """What all ranks need of it, in one broadcast. Collective."""
        return on_root(self.comm, lambda: Sample(self.grid()[1], self.diameter_A(), self.mask()))

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
        density = read_map(self.job.truth.map)
        require_grid(density, box, pixel, self.job.truth.map, "the particles")
        return density.data

    def source(self, *, once: bool = False) -> Any:
        """The shards with the source's particles; rank 0 also has the table they came from. Collective.

        Args:
            once: the images will be read but once or twice, which is not worth a copy on scratch.
        """
        source = ShardSource(self.shards)
        particles = on_root(self.comm, lambda: bare(self.particles()))
        if not np.array_equal(particles.uid, source.particles.uid):
            raise InputError(
                "the shards are of other particles",
                file=self.shards,
                hint="Start a new run.",
                code="run-particles-differ",
            )
        if applied_to(particles) != applied_to(source.particles):
            raise InputError(
                "the shards hold images of another kind than the particle file says", file=self.shards,
                expected="the same rlnCtfDataAreCtfPremultiplied and rlnCtfDataArePhaseFlipped", hint="Ingest again.",
                code="run-particles-differ",
            )  # fmt: skip
        source.particles = self.particles() if self.comm.rank == 0 else particles
        if self.scratch is not None:
            self.scratch.attach(source, once=once)
        return source


class SelectedShards(SubsetSource):
    """The images of the selected classes among all shards."""

    def __init__(self, shards: ShardSource, rows: np.ndarray) -> None:
        """
        Args:
            rows: of the selected particles.
        """
        super().__init__(shards, rows)
        self.index = shards.index


class SelectedInputs(Inputs):
    """The inputs of the stages after a classification: the particles of the selected classes alone."""

    def __init__(self, all_inputs: Inputs) -> None:
        self._whole = all_inputs
        super().__init__(all_inputs.job, all_inputs.folder, all_inputs.comm)
        self._rows: np.ndarray | None = None

    @property
    def scratch(self) -> Scratch | None:
        """Copies of the images on the nodes' own disks."""
        return self._whole.scratch

    @scratch.setter
    def scratch(self, value: Scratch | None) -> None:
        if value is not None:
            raise ValueError("scratch belongs to the whole inputs")

    def plan(self) -> ingest.IngestPlan:
        return self._whole.plan()

    def reference(self) -> Reference:
        return self._whole.reference()

    def grid(self) -> tuple[int, float]:
        return self._whole.grid()

    def rows(self) -> np.ndarray:
        """(n,) of the selected particles among all.

        Raises:
            InputError: the classification is not of these particles.
        """
        if self._rows is None:
            file = self.folder.stage("classify") / products.SELECTED
            uids = read_particle_file(file, self.job.particles.project).uid
            self._rows = np.flatnonzero(np.isin(self._whole.particles().uid, uids))
            if not np.array_equal(self._whole.particles().uid[self._rows], uids):
                raise InputError("the selected particles are not those of this run", file=file,
                                 hint="Start a new run.", code="run-particles-differ")  # fmt: skip
        return self._rows

    def particles(self) -> Particles:
        if self._particles is None:
            self._particles = self._whole.particles().take(self.rows())
        return self._particles

    def source(self, *, once: bool = False) -> Any:
        """Collective."""
        return SelectedShards(self._whole.source(once=once), on_root(self.comm, self.rows))


@contextmanager
def using_scratch(inputs: Inputs, journal: Journal | None = None, *, everything: bool = False) -> Iterator[None]:
    """While the block runs, the images of a job are read from scratch, if it says so.

    A training draws images from everywhere, and auxiliary particles or a selection of classes shift the shares of the
    ranks: then every node copies everything.

    Args:
        journal: of the run, on rank 0: has the hashes of the shards.
    """
    section = inputs.job.run
    if not section.scratch:
        yield
        return
    everything = everything or section.workflow in CO_REFINEMENTS or inputs.job.classify.enable
    scratch = Scratch(section.scratch, inputs.comm, inputs.folder.path, everything, journal)
    inputs.scratch = scratch
    try:
        yield
    finally:
        inputs.scratch = None
        scratch.close()
