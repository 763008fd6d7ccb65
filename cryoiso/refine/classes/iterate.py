"""The classification loop: posterior over classes and poses, two half-maps of every class, until no particle moves.

It goes through the parts of a refinement (batches, search, back-projection, reduction, signal power), with K
references instead of one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch

from cryoiso.core.errors import InputError
from cryoiso.core.log import logger
from cryoiso.core.protocols import Communicator
from cryoiso.core.records import ClassIterationRecord
from cryoiso.core.types import HALVES
from cryoiso.physics.backproject import SliceAccumulator
from cryoiso.physics.fourier_sums import FourierSums
from cryoiso.physics.projection import FourierVolume
from cryoiso.refine.batches import Batch
from cryoiso.refine.classes.expectation import (
    NAMES,
    POSE,
    ClassExpectation,
    ClassPosterior,
    at_given_poses,
    best_poses,
    weighted,
    width,
)
from cryoiso.refine.classes.maximise import (
    LEAST_PARTICLES,
    ClassMaps,
    ClassSums,
    make_maps,
    reduce_classes,
    share_out,
)
from cryoiso.refine.classes.model import ClassModel, ClassRequest, assigned_classes
from cryoiso.refine.intensity import Intensity
from cryoiso.refine.iterate import Refinement
from cryoiso.refine.junk import FACTS, JunkJudge, JunkPrior, learned
from cryoiso.refine.leverage import Leverage, noise_change, own_response
from cryoiso.refine.likelihood import Whitened, whiten
from cryoiso.refine.maximise import NoiseSums, accumulate_mixture
from cryoiso.refine.noise import weight_scale
from cryoiso.refine.rows import gathered_rows
from cryoiso.refine.schedule import ScheduleState
from cryoiso.refine.search import PriorPoses, Searcher, SearchPlan
from cryoiso.refine.search_cache import SearchCache
from cryoiso.refine.view_density import ViewCounts, prior_of


class Classification:
    """One classification on all ranks; ``step`` is one iteration."""

    def __init__(self, request: ClassRequest, comm: Communicator, device: str, diameter_A: float) -> None:
        self.request, self.settings, self.comm = request, request.settings, comm
        self.run = Refinement(request.base, comm, device, diameter_A)
        self.particles = self.run.particles
        self.searched = self.settings.align != "none"
        if not self.searched:
            self.particles.require_poses()
        self._half = np.asarray(self.particles.half)
        keeps_poses = self.settings.align != "global"  # intensities belong to the poses of the file
        self.intensity = Intensity.of_particles(self.particles) if keeps_poses else Intensity.ones(len(self.particles))

    def prior_poses(self, rows: np.ndarray) -> PriorPoses | None:
        """Poses of these particles, or what a search of them starts from."""
        return self.run.prior_poses(rows) if self.searched else self.at_given_poses(rows)

    def at_given_poses(self, rows: np.ndarray) -> PriorPoses:
        """Poses that these particles come with."""
        rotation = self.particles.require_poses()[0][rows]
        tensors = (
            torch.as_tensor(values, dtype=torch.float32, device=self.run.device)
            for values in (rotation, self.run.centre_px[rows])
        )
        return PriorPoses(*tensors)

    def step(self, model: ClassModel) -> ClassModel:
        """One iteration: posterior and sums of each half, reduction, new references (collective)."""
        started, run, state = time.monotonic(), self.run, model.state
        run.heed_empty(model.sigma2)
        noise = NoiseSums.empty(*model.sigma2.shape)
        plan = run.plan(state) if self.searched else None
        results: list[tuple[np.ndarray, np.ndarray]] = []
        sums: list[dict[int, FourierSums]] = [{} for _ in range(model.classes)]
        views = {half: ViewCounts.empty() for half in HALVES}
        for half in HALVES:
            expect = self._expectation(model, half, plan)

            def posterior(
                batch: Batch, white: Whitened, expect: ClassExpectation = expect, half: int = half
            ) -> ClassPosterior:
                raw = bool(self.run.raw[batch.rows[0]])
                result = (
                    expect(batch, white, self.prior_poses(batch.rows)) if raw else self._evenly(batch, model.classes)
                )
                results.append((batch.rows, result.table))
                for part in result.parts if self.searched and raw else ():
                    views[half].add(part.rotation, part.weight, run.cells)
                return result

            self.add_half(half, posterior, expect.volumes, model, noise, sums)
        table = gathered_rows(results, len(self.particles), width(model.classes), self.comm)
        noise = NoiseSums(self.comm.sum_all(noise.power), self.comm.sum_all(noise.count))
        counts = {half: self.comm.sum_all(views[half].counts) for half in HALVES} if self.searched else {}
        return self._maximise(model, sums, noise, counts, table, plan, time.monotonic() - started)

    def _evenly(self, batch: Batch, classes: int) -> ClassPosterior:
        """Auxiliary particles, which are of no class: at the poses that they were made with, shared by all."""
        n, share = len(batch), np.full((len(batch), classes), 1 / classes)
        part = at_given_poses(self.at_given_poses(batch.rows), torch.zeros(n, device=self.run.device))
        facts = np.zeros((n, len(FACTS)))
        table = np.column_stack(
            [best_poses([part], np.zeros(n, np.int64)), np.zeros(n), share[:, 0], np.ones(n), share, facts]
        )
        return ClassPosterior(tuple(weighted([part] * classes, share)), table)

    def _expectation(self, model: ClassModel, half: int, plan: SearchPlan | None) -> ClassExpectation:
        run, radius = self.run, model.state.radius_px
        volumes = [
            FourierVolume.from_volume(torch.as_tensor(reference[half], device=run.device), run.settings.padding, radius)
            for reference in model.references
        ]
        searchers = judge = None
        if plan is not None:
            prior = prior_of(model.views, half, run.request.symmetry, run.settings, run.device)
            searchers = [Searcher(plan, volume, prior, complete=self.settings.junk) for volume in volumes]
        if self.settings.junk:
            mean = sum(p * reference[half] for p, reference in zip(model.occupancy, model.references, strict=True))
            judge = JunkJudge.of(mean, run.pixel, volumes[0], self.run.cones, model.junk, plan)
        return ClassExpectation(volumes, model.occupancy, searchers, self._leverage(model, half), judge)

    def _leverage(self, model: ClassModel, half: int) -> list[Leverage | None] | None:
        if not model.total_weight:
            return None
        run, share = self.run, model.share()
        return [
            Leverage.of(total_weight[half], share[:, k], run.box, run.settings.padding, run.device)
            if total_weight
            else None
            for k, total_weight in enumerate(model.total_weight)
        ]

    def add_half(
        self, half: int, posterior: Callable[[Batch, Whitened], ClassPosterior], volumes: list[FourierVolume],
        model: ClassModel, noise: NoiseSums, sums: ClassSums,
    ) -> None:  # fmt: skip
        """Sums of a half-set over this rank's batches, then over all ranks (collective).

        Args:
            posterior: (batch, whitened batch) -> ClassPosterior.
        """
        run = self.run
        radius = run.insertion_radius(model.state) if self.searched else run.limit  # then one view an image
        accumulators = [
            SliceAccumulator.empty(run.box, radius, run.settings.padding, run.device) for _ in range(model.classes)
        ]
        scale = self._weight_scale(model)
        for auxiliary in (False,) if run.raw.all() else (False, True):
            batches = run.batches(half, auxiliary, radius, model.state.iteration, SearchCache(None))
            for batch in map(self.intensity.of, batches):
                white = whiten(batch, model.sigma2)
                parts = posterior(batch, white).parts
                accumulate_mixture(batch, white, list(zip(parts, volumes, accumulators, strict=True)), noise, scale)
        reduce_classes(run, accumulators, half, sums)

    def make_maps(
        self, sums: ClassSums, weight: np.ndarray, model: ClassModel, sigma2: np.ndarray, share_to_A: float
    ) -> ClassMaps:
        """Maps of every class from the sums of an iteration (collective).

        Args:
            model: of that iteration; ``sigma2`` (G, S): noise spectra of the next one.
        """
        kappa = self.kappa * self._weight_scale(model)
        change = noise_change(model.sigma2, sigma2)
        return make_maps(self.run, sums, weight, model.state, share_to_A, kappa, change)

    def _weight_scale(self, model: ClassModel) -> float:
        return weight_scale(model.sigma2 / self.intensity.largest_weight())

    @cached_property
    def kappa(self) -> float:
        """See ``leverage.own_response``."""
        run = self.run
        mask = run.sphere if run.request.mask is None else run.sphere * run.request.mask.data
        return own_response(run.box, run.limit, run.settings.padding, mask, run.request.seed)

    def weights(self, posterior: np.ndarray, particle: np.ndarray, raw: bool = False) -> np.ndarray:
        """(K, 2) posterior weight of each class in each half-set, of all particles or of the raw ones alone."""
        share = posterior * particle[:, None]
        counted = self.run.raw if raw else np.ones(len(share), bool)
        return np.stack([share[counted & (self._half == half)].sum(0) for half in HALVES], 1)

    def _maximise(
        self, model: ClassModel, sums: ClassSums, noise: NoiseSums, counts: dict[int, np.ndarray], table: np.ndarray,
        plan: SearchPlan | None, seconds: float,
    ) -> ClassModel:  # fmt: skip
        k, raw = model.classes, self.run.raw
        particle = table[:, POSE + NAMES.index("particle")]
        posterior = table[:, POSE + len(NAMES) : POSE + len(NAMES) + k]
        weight = self.weights(posterior, particle)
        occupancy = self._occupancy(self.weights(posterior, particle, raw=True))
        sigma2 = noise.spectra(model.sigma2)
        class_maps = self.make_maps(sums, weight, model, sigma2, self.run.settings.join_halves_A)
        rotation, shift_A = self._poses(model, table)
        junk = self._learn_junk(table, rotation)
        changed = self._changed(model, posterior, particle)
        state = self._advance(model.state, class_maps, changed, shift_A)
        columns = {name: table[:, POSE + i].copy() for i, name in enumerate(NAMES) if name != "particle"}
        record: ClassIterationRecord = {
            "iteration": state.iteration,
            "resolution_A": [None if r is None else round(r, 4) for r in class_maps.resolution_A],
            "changed": changed,
            "occupancy": [round(float(v), 6) for v in occupancy * particle[raw].mean()],
            "search_resolution_A": self.run.box * self.run.pixel / model.state.radius_px,
            "log_likelihood": float(columns["rlnLogLikeliContribution"][raw].sum()),
            "class_probability_mean": float(posterior[raw].max(1).mean()),
            "seconds": seconds,
        }  # fmt: skip
        if self.settings.junk:
            record["junk"] = round(float(1 - particle[raw].mean()), 6)
        if plan is not None:
            record["step_deg"] = plan.levels[-1].cell_deg / 2
        if self.comm.rank == 0:
            _report(record)
        return ClassModel(
            state, class_maps.references, sigma2, occupancy, rotation, shift_A, posterior.copy(),
            particle.copy(), columns, share_out(self.run, class_maps, state.radius_px), class_maps.half_maps,
            class_maps.maps, counts, junk, [*model.history, record],
        )  # fmt: skip

    def _occupancy(self, weight: np.ndarray) -> np.ndarray:
        """(K,) share of each class, of both half-sets; 0 where one half-set has too few particles for a map."""
        total = np.where(weight.min(1) < LEAST_PARTICLES, 0.0, weight.sum(1))
        if not total.sum() > 0:
            raise InputError(
                "no class has particles in both half-sets", expected=f"{2 * LEAST_PARTICLES:g} particles or more",
                found=f"{weight.sum():.3g} that are no junk", hint="Give more particles or fewer classes.",
                code="particles-too-few",
            )  # fmt: skip
        occupancy: np.ndarray = total / total.sum()
        return occupancy

    def _poses(self, model: ClassModel, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not self.searched:
            return model.rotation, model.shift_A
        pixel = self.particles.group_values("pixel_size_A")[:, None]
        return table[:, :9].reshape(-1, 3, 3).copy(), -table[:, 9:POSE] * pixel

    def _learn_junk(self, table: np.ndarray, rotation: np.ndarray) -> JunkPrior | None:
        if not self.settings.junk:
            return None
        raw, cones = self.run.raw, self.run.cones
        return learned(table[raw, -len(FACTS) :], cones.index(rotation[raw][:, 2]), len(cones))

    def _changed(self, model: ClassModel, posterior: np.ndarray, particle: np.ndarray) -> float:
        """Share of the particles whose most likely class is another one than before; 1 in the first iteration."""
        if not model.history:
            return 1.0
        now = assigned_classes(posterior, particle if self.settings.junk else None)
        return float((model.assigned(self.settings.junk) != now)[self.run.raw].mean())

    def _advance(
        self, state: ScheduleState, class_maps: ClassMaps, changed: float, shift_A: np.ndarray
    ) -> ScheduleState:
        """The next iteration's state. It is the last where hardly any particle changed class and no class got finer."""
        run = self.run
        shift_px = (-shift_A / self.particles.group_values("pixel_size_A")[:, None] - run.centre_px)[run.raw]
        spread_px = float(np.sqrt(np.mean(np.square(shift_px)) + 1e-12)) if self.searched else state.shift_sd_px
        better, settled = class_maps.shell > state.best_shell, changed < self.settings.min_change
        stalled = 0 if better or not settled else state.stalled + 1
        return ScheduleState(
            iteration=state.iteration + 1,
            radius_px=int(np.clip(round(1.15 * class_maps.shell) + 2, 3, run.limit)),
            shift_sd_px=float(np.clip(spread_px, 0.3, run.box / 10)),
            best_shell=max(class_maps.shell, state.best_shell),
            stalled=stalled,
            done=is_done(stalled, state.iteration + 1, self.settings.max_iterations),
        )


def is_done(stalled: int, iteration: int, max_iterations: int) -> bool:
    """Whether no iteration is to follow."""
    return stalled > 0 or iteration >= max_iterations


def _report(record: ClassIterationRecord) -> None:
    shares = ", ".join(
        f"{100 * share:.1f} % at {'-' if resolution is None else f'{resolution:.1f}'} Å"
        for share, resolution in zip(record["occupancy"], record["resolution_A"], strict=True)
    )
    junk = f", junk {100 * record['junk']:.1f} %" if "junk" in record else ""
    logger.info("iteration %d: %.1f %% changed class; classes %s%s", record["iteration"], 100 * record["changed"],
                shares, junk)  # fmt: skip
