"""The expectation of an iteration: posteriors of all images against the references, and the sums that they enter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from cryoiso.core.log import logger
from cryoiso.core.types import HALVES
from cryoiso.physics.backproject import SliceAccumulator
from cryoiso.physics.projection import FourierVolume
from cryoiso.refine.identity import of_iteration
from cryoiso.refine.image_mask import ImageMask
from cryoiso.refine.intensity import ImageTerms, Intensity
from cryoiso.refine.junk import JunkSearch
from cryoiso.refine.likelihood import whiten
from cryoiso.refine.maximise import NoiseSums, accumulate
from cryoiso.refine.model import Model, best_of
from cryoiso.refine.noise import weight_scale
from cryoiso.refine.search import Searcher, SearchPlan
from cryoiso.refine.search_cache import SearchCache
from cryoiso.refine.sums import gathered, reduced
from cryoiso.refine.view_density import ViewCounts, prior_of

if TYPE_CHECKING:
    from jaxtyping import Float

    from cryoiso.refine.batches import Batch
    from cryoiso.refine.refinement_setup import RefinementSetup


class Expectation:
    """Posteriors of one iteration; on each rank those of its own batches until they are gathered.

    Attributes:
        sums: half -> sums of the half's images, for the halves of which this rank is root.
        junk: search for images without a particle, with what this iteration found out about them.
    """

    def __init__(self, run: RefinementSetup, model: Model, plan: SearchPlan) -> None:
        """Collective.

        Args:
            plan: of the search; the same for all images.
        """
        self.run, self.model, self.plan = run, model, plan
        self.radius = run.insertion_radius(model.state)
        self.scale = weight_scale(model.sigma2 / model.intensity.largest_weight())
        self.noise = NoiseSums.empty(*model.sigma2.shape)
        self.images = ImageTerms(run.settings.scale, model.sigma2)
        self.junk = JunkSearch(run.cones if run.settings.junk else None, model.junk, plan, model.intensity)
        self.sums = run.auxiliaries.sums()
        self.views = {half: ViewCounts.empty() for half in HALVES}
        self.cache = search_cache(run, model, plan)
        self.mask = ImageMask.of_iteration(run.request, run.particles, model, run.centre_px, run.diameter)
        self._results: list[tuple[np.ndarray, np.ndarray]] = []

    def search_half(self, half: int, kinds: tuple[bool, ...]) -> None:
        """Search all images of a half and reduce their sums (collective).

        Args:
            kinds: whether particles are auxiliary ones, for all kinds that are searched; their sums are separate.
        """
        run, model = self.run, self.model
        reference = torch.as_tensor(model.references[half], device=run.device)
        volume = FourierVolume.from_volume(reference, run.settings.padding, model.state.radius_px)
        searcher = Searcher(self.plan, volume, complete=self.junk.cones is not None)
        prior = prior_of(model.views, half, run.request.symmetry, run.settings, run.device)
        self.images.own = run.shares.of(model, half)
        for auxiliary in kinds:
            searcher.views = None if auxiliary else prior  # auxiliaries are made even
            self.junk.begin(None if auxiliary else model.references[half], run.pixel, volume)
            accumulator = SliceAccumulator.empty(run.box, self.radius, run.settings.padding, run.device)
            batches = run.batches(half, auxiliary, self.radius, model.state.iteration, self.cache)
            for batch in map(model.intensity.of, batches):
                self._search_batch(batch, searcher, accumulator, None if auxiliary else self.views[half])
            self.sums.put(half, auxiliary, reduced(accumulator, half, run.operations, run.comm))

    def _search_batch(
        self, batch: Batch, searcher: Searcher, accumulator: SliceAccumulator, views: ViewCounts | None
    ) -> None:
        """Posterior of a batch, from the cache if it is there, and its share in the sums."""
        run, model = self.run, self.model
        scored = batch if self.mask is None else self.mask.of(batch)
        white, near = whiten(scored, model.sigma2), run.prior_poses(batch.rows, model.state.iteration)
        posterior = self.cache.get(batch.rows, run.device)
        if posterior is None:
            posterior = searcher.search(scored, white, near)
            self.cache.put(batch.rows, posterior)
        posterior = self.junk.weighed(scored, white, posterior, near)
        unmasked = white if scored is batch else whiten(batch, model.sigma2)
        accumulate(
            batch, unmasked, posterior, searcher.volume, accumulator, self.noise, self.scale, self.images, scored
        )
        if views is not None:
            views.add(posterior.rotation, posterior.weight, run.cells)
        self._results.append((batch.rows, best_of(posterior)))

    def poses(self) -> tuple[Float[np.ndarray, "n 3 3"], Float[np.ndarray, "n 2"], dict[str, np.ndarray]]:
        """Rotation (N, 3, 3), shift of the content in pixels (N, 2) and results by STAR name of all particles, on every
        rank (collective)."""
        rotation, shift_px, columns = gathered(self._results, len(self.run.particles), self.run.comm)
        return rotation, shift_px, columns | self.junk.columns(self.run.raw, self.run.comm)

    def total_noise(self) -> NoiseSums:
        """Sums for the noise spectra over all images (collective)."""
        comm = self.run.comm
        return NoiseSums(comm.sum_all(self.noise.power), comm.sum_all(self.noise.count))

    def view_counts(self) -> dict[int, np.ndarray]:
        """Half -> (P,) weight of every cell of views over all of the half's raw images (collective)."""
        return {half: self.run.comm.sum_all(self.views[half].counts) for half in HALVES}

    def intensity(self) -> Intensity:
        """Scale and noise level of every image (collective)."""
        run = self.run
        return self.images.estimate(self.model.intensity, run.particles, run.raw, run.comm)


def search_cache(run: RefinementSetup, model: Model, plan: SearchPlan) -> SearchCache:
    """Store for the search results of an iteration (collective)."""
    if run.request.folder is None:
        return SearchCache(None)
    identity = of_iteration(run.request, run.identity, model, plan, run.centre_px)
    cache = SearchCache.of(run.request.folder / "checkpoint", identity, run.comm)
    if len(cache) and run.comm.rank == 0:
        batches = len(run.reader.plan(HALVES))
        logger.info("iteration %d: %d of %d batches were searched before the interruption",
                    model.state.iteration + 1, len(cache), batches)  # fmt: skip
    return cache
