"""Micelle recovery on all ranks: pass over the images, conjugate gradients, checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cryoiso.core.errors import InputError, Interrupted
from cryoiso.core.identity import Identity, of_images, of_particles, sketch_of
from cryoiso.core.protocols import ImageSource
from cryoiso.core.types import HALVES, DensityMap, Particles
from cryoiso.io import checkpoint
from cryoiso.methods.micelle.image_sums import MicelleSums, SumPass
from cryoiso.methods.micelle.normal_equations import NormalEquations, SolutionGrid
from cryoiso.methods.micelle.protein import ProteinMask
from cryoiso.methods.micelle.solve import CgState, start, step
from cryoiso.parallel.abort import agree, on_root
from cryoiso.parallel.context import Context
from cryoiso.parallel.partition import root_of_half
from cryoiso.physics.symmetry import point_group
from cryoiso.refine.batches import BatchReader

if TYPE_CHECKING:
    from jaxtyping import Float

logger = logging.getLogger("cryoiso")
FINEST_OF_LOWPASS = 0.5
"""Data are used up to half the low-pass: what is finer hardly touches the micelle."""
PARTIAL_ITERATIONS = 5
"""Iterations on the sums so far where the pass over the images was interrupted: enough for a map to look at."""
LEAST_SIGNIFICANCE = 5.0
"""Grey scale of the homologue over its standard error, below which it is not in the images."""


@dataclass(frozen=True)
class MicelleSettings:
    """What a user may choose."""

    symmetry: str = "C1"
    lowpass_A: float = 20.0
    """Resolution of the micelle; 0: no filter, all frequencies of the images."""
    diameter_A: float | None = None
    """Sphere that holds the micelle (default: what the box holds)."""
    prior_sd: float = 1.0
    """Prior standard deviation of the micelle's voxels, over the root mean square of the homologue in its mask."""
    max_iterations: int = 50
    tolerance: float = 1e-3
    """Relative residual at which it ends."""


@dataclass(frozen=True)
class HalfMicelle:
    """What one half-set says."""

    micelle: Float[np.ndarray, "box box box"]
    """(D, D, D) float32 (1 - M) V_M, zero inside the mask."""
    grey_scale: float
    """g: factor on the homologue."""
    grey_scale_error: float
    noise_variance: float
    """Of an image's coefficient."""
    prior_sd: float
    """tau, in the units of the images."""
    converged: bool
    history: list[dict[str, Any]]

    def facts(self) -> dict[str, Any]:
        """What a report says about it."""
        return {
            "grey_scale": self.grey_scale, "grey_scale_error": self.grey_scale_error,
            "noise_variance": self.noise_variance, "prior_sd": self.prior_sd, "converged": self.converged,
            "iterations": len(self.history) - 1,
            "history": [{k: v for k, v in record.items() if k != "product"} for record in self.history],
        }  # fmt: skip


@dataclass(frozen=True)
class Recovery:
    """Both half-sets' micelles, never mixed."""

    halves: dict[int, HalfMicelle]
    """on every rank"""
    stopped: str = ""
    """Why it is not finished; empty if it is."""
    grid: dict[str, float] = field(default_factory=dict)


def recover_micelle_halves(
    source: ImageSource,
    particles: Particles,
    homologue: DensityMap,
    mask: ProteinMask,
    comm: Context | None,
    settings: MicelleSettings,
    *,
    device: str = "cpu",
    checkpoint_file: Path | None = None,
    resume: bool = False,
    on_iteration: Callable[[int, dict[str, Any]], None] | None = None,
) -> Recovery:
    """The density outside a protein, of each half-set by itself (collective).

    min over g, V_M of sum_i |C_i P_i (g M V_homo + (1 - M) V_M) - x_i|^2 / sigma^2 + |V_M|^2 / tau^2, with V_M
    low-passed. One pass over the images, then conjugate gradients on volumes: half 1 on one rank, half 2 on another.
    The result has the same bits on any number of ranks.

    Args:
        source: images, row for row those of ``particles``, normalised.
        particles: with poses and half-set numbers.
        homologue: protein, in the frame of the poses, on the images' grid, on any grey scale.
        mask: of the protein, see ``protein.protein_mask``.
        comm: the ranks that share the work; None: this process alone.
        checkpoint_file: where a stop signal leaves its checkpoint.
        resume: go on from there, if it is there.
        on_iteration: called on the half's root as on_iteration(half, record).

    Returns:
        Recovery, the same on every rank. Where a signal stopped it, ``stopped`` says so and the micelles are those of
        the last iteration (or of five iterations on the images read so far).

    Raises:
        InputError: no poses, an empty half-set, a homologue that is not in the images, a checkpoint of another job.
        Interrupted: stopped by a signal before any image of either half was read.
    """
    comm = comm if comm is not None else Context()
    run = _Recovery(source, particles, homologue, mask, comm, settings, device, on_iteration)
    saved = run.load(checkpoint_file) if resume and checkpoint_file else {}
    if not resume and checkpoint_file:  # else a later resumption would find that of an earlier job
        on_root(comm, checkpoint.remove, checkpoint_file)
    before = {h: MicelleSums.of_arrays(saved, h) if f"grid{h}" in saved else MicelleSums() for h in HALVES}
    sums, is_complete = run.images.run(before)
    if not all(len(s.done) for s in sums.values()):
        raise Interrupted("stopped by a signal before there was anything to keep")
    equations, error = run.equations(sums)
    agree(comm, error if is_complete else None)
    states = {h: run.state(h, equations[h], saved if is_complete else {}) for h in equations}
    finished = run.solve(
        equations, states, settings.max_iterations if is_complete else PARTIAL_ITERATIONS, listen=is_complete
    )
    stopped = "" if is_complete and finished else "solving" if is_complete else "reading images"
    if checkpoint_file:
        if stopped:
            run.save(checkpoint_file, sums, states if is_complete else {})
        else:
            on_root(comm, checkpoint.remove, checkpoint_file)
    halves = {h: comm.bcast(run.result(h, equations, states), root_of_half(h, comm.size)) for h in HALVES}
    return Recovery(halves, stopped, run.grid_facts())


class _Recovery:
    """The parts of :func:`recover_micelle_halves`."""

    def __init__(
        self,
        source: ImageSource,
        particles: Particles,
        homologue: DensityMap,
        mask: ProteinMask,
        comm: Context,
        settings: MicelleSettings,
        device: str,
        on_iteration: Callable[[int, dict[str, Any]], None] | None,
    ) -> None:
        self.comm, self.settings, self.device, self.particles = comm, settings, device, particles
        self.source = source
        self.on_iteration = on_iteration or (lambda half, record: None)
        half = particles.half if particles.half is not None else np.zeros(len(particles), np.int8)
        for h in HALVES:
            if not (half == h).any():
                raise InputError(
                    f"half-set {h} is empty",
                    hint="Both half-sets need particles: check rlnRandomSubset.",
                    code="half-set-empty",
                )
        pixel = homologue.pixel_size_A
        finest = max(2 * pixel, FINEST_OF_LOWPASS * settings.lowpass_A)
        self.grid = SolutionGrid.of(source.box_px, pixel, finest)
        self.protein = np.asarray(mask.data * homologue.data, np.float32)
        self.mask = mask
        reader = BatchReader(source, particles, pixel, device, with_dc=True, memory_bytes=0)
        self.images = SumPass(
            reader, point_group(settings.symmetry), self.grid.radius_px, self.grid.padding, comm
        )  # fmt: skip

    def grid_facts(self) -> dict[str, float]:
        g = self.grid
        return {
            "box_px": g.size_px,
            "voxel_A": g.voxel_A,
            "finest_A": g.box_px * g.pixel_size_A / g.radius_px,
            "padding": g.padding,
        }

    def equations(self, sums: dict[int, MicelleSums]) -> tuple[dict[int, NormalEquations], InputError | None]:
        """The normal equations of the halves that this rank is root of."""
        result: dict[int, NormalEquations] = {}
        protein, outside = self.grid.coarse(self.protein), self.grid.outside(self.mask.data, self.settings.diameter_A)
        inside = self.grid.coarse(self.mask.data) > 0.5
        error = None
        for half, half_sums in sums.items():
            if half_sums.grid is None:
                continue
            system = NormalEquations(
                self.images.finished(half_sums, self.device), self.grid, protein, outside, self.settings.lowpass_A
            )  # fmt: skip
            grey = system.zero().grey
            noise = max(half_sums.mean_power - self._explained(system, half_sums), 1e-12 * half_sums.mean_power)
            system.set_prior(noise, self.settings.prior_sd * abs(grey) * float(np.sqrt((protein[inside] ** 2).mean())))
            significance = grey * np.sqrt(system.homologue_power / noise)
            if not significance > LEAST_SIGNIFICANCE:
                error = InputError(
                    "the homologue is not in the images",
                    expected=f"a grey scale at least {LEAST_SIGNIFICANCE:g} times its error above zero",
                    found=f"{significance:.1f} times in half-set {half}",
                    hint="It must lie in the frame of the poses, with the right hand, protein white in map and images.",
                    code="homologue-not-in-images",
                )
            result[half] = system
        return result, error

    @staticmethod
    def _explained(system: NormalEquations, sums: MicelleSums) -> float:
        """Part of an image's mean power that the homologue alone explains."""
        return system.rhs.grey**2 / system.homologue_power / max(float(sums.count.sum()), 1.0)

    def state(self, half: int, equations: NormalEquations, saved: dict[str, np.ndarray]) -> CgState:
        if f"numbers{half}" in saved:
            return CgState.of_arrays(saved, half, self.device)
        return start(equations)

    def solve(
        self, equations: dict[int, NormalEquations], states: dict[int, CgState], most: int, *, listen: bool
    ) -> bool:
        """Iterates until all halves have converged or used up their iterations; in step, so that all can stop.

        Returns:
            False if a signal stopped it.
        """
        while self.comm.max_all(float(any(self._goes_on(s, most) for s in states.values()))):
            if listen and self.comm.stop_requested():
                return False
            for half, state in states.items():
                if self._goes_on(state, most):
                    states[half] = step(equations[half], state)
                    record = states[half].history[-1]
                    self.on_iteration(half, record)
                    logger.debug("half %d, iteration %d: residual %.2e", half, states[half].iteration,
                                 record["residual"])  # fmt: skip
        return True

    def _goes_on(self, state: CgState, most: int) -> bool:
        return state.iteration < most and state.relative_residual > self.settings.tolerance

    def result(self, half: int, equations: dict[int, NormalEquations], states: dict[int, CgState]) -> Any:
        """The half's micelle on the images' grid; None where this rank is not its root."""
        if half not in states:
            return None
        system, state = equations[half], states[half]
        smooth = self.grid.fine(system.smooth(state.z.u).cpu().numpy())
        outside = self.grid.outside(self.mask.data, self.settings.diameter_A, self.grid.box_px)
        pass_band = float(system.lowpass.square().mean())
        tau = float(np.sqrt(system.noise * pass_band / system.precision)) if system.precision else float("inf")
        return HalfMicelle(
            (outside * smooth).astype(np.float32), state.z.grey, float(np.sqrt(system.noise / system.homologue_power)),
            system.noise, tau, state.relative_residual <= self.settings.tolerance, state.history,
        )  # fmt: skip

    # --- checkpoints

    def _identity(self) -> Identity:
        """What a checkpoint must agree in to be gone on with."""
        s = self.settings
        return {
            "particles": of_particles(self.particles, poses=True, ordered=True),
            "images": of_images(self.source),
            "grid": [self.grid.box_px, self.grid.radius_px, self.grid.size_px, self.grid.padding],
            "symmetry": s.symmetry, "lowpass_A": s.lowpass_A, "diameter_A": s.diameter_A, "prior_sd": s.prior_sd,
            "protein": sketch_of(self.protein), "mask": sketch_of(self.mask.data),
        }  # fmt: skip

    def load(self, file: Path) -> dict[str, np.ndarray]:
        """The checkpoint's arrays on every rank; empty where there is none."""

        def read() -> dict[str, np.ndarray]:
            saved = checkpoint.load_same(file, self._identity(), "micelle recovery")
            return {} if saved is None else saved[0]

        return on_root(self.comm, read)

    def save(self, file: Path, sums: dict[int, MicelleSums], states: dict[int, CgState]) -> None:
        """Brings all to rank 0, which writes it."""
        arrays: dict[str, np.ndarray] = {}
        for half in HALVES:
            half_arrays = sums[half].arrays(half) if sums[half].grid is not None else {}
            half_arrays |= states[half].arrays(half) if half in states else {}
            arrays |= self.comm.bcast(half_arrays, root_of_half(half, self.comm.size))
        on_root(self.comm, lambda: checkpoint.save(file, arrays, {}, self._identity()))
