"""What all controls of a run share: its particles, maps and numbers, and the subset that the controls work on."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cryoiso.core import products
from cryoiso.core.config import Job
from cryoiso.core.errors import InputError
from cryoiso.core.rng import shuffle_keys
from cryoiso.core.sections.audit import AuditSection
from cryoiso.core.types import DensityMap, Particles
from cryoiso.io import read_particle_file
from cryoiso.io.mrc import read_map, write_map
from cryoiso.methods.audit import extent
from cryoiso.methods.audit.frame import in_frame_of
from cryoiso.methods.audit.likeness import Band
from cryoiso.methods.audit.omega import scale_between
from cryoiso.parallel.context import Context
from cryoiso.physics.filters import lowpass
from cryoiso.physics.masks import soft_mask_from_map
from cryoiso.physics.symmetry import normalise_name, point_group
from cryoiso.pipeline.context import RunContext
from cryoiso.pipeline.inputs.half_sets import assign_halves
from cryoiso.pipeline.job_inputs import Inputs
from cryoiso.pipeline.records.hashing import sha256_of
from cryoiso.pipeline.stages.rounds import final_poses


@dataclass(frozen=True)
class Bench:
    """A run that is audited. Arrays are on rank 0 only."""

    run: RunContext
    folder: Path
    """of the controls"""
    total: int
    """particles of the run"""
    rows: np.ndarray
    """(n,) rows of the subset"""
    pixel_size_A: float
    diameter_A: float
    resolution_A: float
    """of the run's half-maps, FSC 0.143"""
    grey_scale: float
    """factor from the reference to the images, as the run's map has it"""
    particles: Particles = field(repr=False)
    """the subset as the run read it, with poses only where the source has them"""
    posed: Particles = field(repr=False)
    """the subset with the run's final poses"""
    reference: np.ndarray = field(repr=False)
    """(D, D, D) as given, on the particles' grid"""
    inside: np.ndarray = field(repr=False)
    """(D, D, D) bool: within the reference's mask"""

    @property
    def job(self) -> Job:
        return self.run.job

    @property
    def comm(self) -> Context:
        return self.run.comm

    @property
    def box_px(self) -> int:
        return int(self.reference.shape[0])

    @property
    def operations(self) -> np.ndarray:
        """(g, 3, 3) of the point group."""
        return point_group(self.job.sample.symmetry)

    @property
    def seed(self) -> int:
        return self.job.run.seed

    @property
    def is_whole(self) -> bool:
        """Whether the subset is the whole set, so that the run itself is the one with nothing changed."""
        return len(self.rows) == self.total

    @property
    def beyond(self) -> Band:
        """Shells from where the initial reference ended to the run's resolution."""
        return Band.beyond(self.job.reference.lowpass_A, self.resolution_A, self.box_px, self.pixel_size_A)

    @property
    def all_shells(self) -> Band:
        """All shells to the run's resolution."""
        return Band.up_to(self.resolution_A, self.box_px, self.pixel_size_A)

    @property
    def solvent(self) -> np.ndarray:
        """(D, D, D) bool: outside the reference's mask, within the sphere of the particle's diameter."""
        axis = np.arange(self.box_px) - self.box_px // 2
        r2 = (axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None, :] ** 2) * self.pixel_size_A**2
        solvent: np.ndarray = ~self.inside & (r2 <= (0.55 * self.diameter_A) ** 2)
        return solvent

    @property
    def block_px(self) -> int:
        """Edge of the blocks of a bootstrap: half a period of the finest detail that controls compare."""
        return max(2, round(self.smoothing_A / (2 * self.pixel_size_A)))

    @property
    def smoothing_A(self) -> float:
        """Resolution at which densities of regions are compared: noise beyond it would drown them."""
        return max(self.resolution_A, 2.5 * self.pixel_size_A)

    def smooth(self, volume: np.ndarray) -> np.ndarray:
        """A map at that resolution, (D, D, D) float64."""
        return np.asarray(lowpass(np.asarray(volume, np.float64), self.pixel_size_A, self.smoothing_A), np.float64)

    def aligned(self, volume: np.ndarray, target: np.ndarray) -> np.ndarray:
        """A map in the frame of another one of the same molecule, (D, D, D)."""
        return in_frame_of(
            volume, target, self.pixel_size_A, self.smoothing_A, normalise_name(self.job.sample.symmetry)
        )

    def write_reference(self, control: str, name: str, data: np.ndarray) -> Path:
        """A changed reference in the folder of a control."""
        path = self.folder / control / f"{name}.mrc"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_map(path, np.asarray(data, np.float32), self.pixel_size_A)
        return path

    def fewer(self, n: int) -> Bench:
        """The bench with a random part of its particles (on rank 0)."""
        few = subset_rows(self.particles, n, self.seed)
        return replace(self, rows=self.rows[few], particles=self.particles.take(few), posed=self.posed.take(few))


def subset_rows(particles: Particles, n: int, seed: int) -> np.ndarray:
    """(n,) rows of a random subset in the order of the set, half of them from each half-set."""
    if n >= len(particles):
        return np.arange(len(particles))
    order = np.argsort(shuffle_keys(seed, "audit", particles.uid), kind="stable")
    half = np.asarray(particles.half)[order]
    parts = [order[half == h][: max(1, n // 2)] for h in (1, 2)]
    return np.sort(np.concatenate(parts))


def prepare(run: RunContext, inputs: Inputs) -> Bench:
    """Reads what the controls of a finished run need (rank 0).

    Raises:
        InputError: the run's map has nothing in common with its reference, so that no grey scale is known.
    """
    particles = inputs.particles()
    rows = subset_rows(particles, extent.particles_of(run.job, len(particles)), run.job.run.seed)
    reference_folder, reconstruct_folder = run.folder.stage("reference"), run.folder.stage("reconstruct")
    reference, initial = (
        read_map(reference_folder / name) for name in (products.REFERENCE, products.LOWPASSED_REFERENCE)
    )
    numbers = json.loads((run.folder.stage("diagnose") / products.facts("diagnose")).read_text(encoding="utf-8"))
    final = read_particle_file(final_poses(run), run.job.particles.project, ("pose",))
    return Bench(
        run, run.folder.audit, len(particles), rows, reference.pixel_size_A, inputs.diameter_A(),
        float(numbers["resolution_0143_A"]),
        _grey_scale(read_map(reconstruct_folder / products.MAP), initial, run.job.reference.lowpass_A,
        reconstruct_folder),
        particles.take(rows), particles.with_poses(*final.require_poses()).take(rows), reference.data,
        inside_of(reference, read_map(reconstruct_folder / products.MASK).data > 0.5),
    )  # fmt: skip


def inside_of(density: DensityMap, otherwise: np.ndarray) -> np.ndarray:
    """Within the mask of a density, (D, D, D) bool; ``otherwise`` where none can be made."""
    try:
        inside: np.ndarray = np.asarray(soft_mask_from_map(density.data, density.pixel_size_A)) > 0.5
    except InputError:
        return otherwise
    return inside


def _grey_scale(reconstruction: DensityMap, initial: DensityMap, lowpass_A: float, file: Path) -> float:
    """Least-squares factor from the initial reference to the run's map, which is on the images' grey scale."""
    coarse = np.asarray(lowpass(reconstruction.data, reconstruction.pixel_size_A, lowpass_A), np.float64)
    where = initial.data > 0.1 * float(initial.data.max())
    factor = scale_between(coarse, np.asarray(initial.data, np.float64), where)
    if not factor > 0:
        raise InputError(
            "the run's map has nothing in common with its initial reference, so that the grey scale of noise images "
            "beside that reference is not known",
            file=file / products.MAP, hint="Look at both maps: one may be inverted.", code="map-without-density",
        )  # fmt: skip
    return factor


def with_new_halves(particles: Particles, seed: int) -> Particles:
    """The particles in other half-sets."""
    return assign_halves(replace(particles, half=None), seed)


def facts_of(bench: Bench) -> dict[str, Any]:
    """What audit.json says of the whole."""
    return {
        "particles": len(bench.rows), "of": bench.total, "workflow": bench.job.run.workflow,
        "symmetry": bench.job.sample.symmetry, "resolution_A": bench.resolution_A, "seed": bench.seed,
        "initial_reference_A": bench.job.reference.lowpass_A, "grey_scale": bench.grey_scale,
        "settings": _settings(bench.job.audit),
    }  # fmt: skip


def _settings(section: AuditSection) -> dict[str, Any]:
    """What the controls were asked for beside their names; files by their content."""
    files = {key: getattr(section, key) for key in ("other_reference", "background")}
    return {
        "regions": section.regions, "region_share": section.region_share,
        **{key: sha256_of(Path(name)) for key, name in files.items() if name},
    }  # fmt: skip


def absent(run: RunContext) -> Bench:
    """The bench of ranks other than 0: job, ranks and folder."""
    none, nan = np.zeros(0), float("nan")
    nobody: Any = None
    return Bench(run, run.folder.audit, 0, none, nan, nan, nan, nan, nobody, nobody, none, none)
