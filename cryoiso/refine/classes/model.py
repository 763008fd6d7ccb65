"""What a classification is asked to do, and its state between two iterations."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from cryoiso.core.config import ClassifySection
from cryoiso.core.identity import MARK, Identity, digest_of, of_map, of_particles
from cryoiso.core.protocols import RefineRequest
from cryoiso.core.records import ClassIterationRecord
from cryoiso.core.types import HALVES, DensityMap, Particles
from cryoiso.refine.identity import of_request
from cryoiso.refine.junk import JunkPrior
from cryoiso.refine.schedule import ScheduleState

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Shaped

ONLY_WHEN = ("max_iterations", "min_change", "enable", "select")
"""Settings that say when a classification ends, and what a run does with it; it may go on with others."""
Maps = list[dict[int, np.ndarray]]
"""Class -> half -> (D, D, D) float32."""


@dataclass(frozen=True)
class ClassRequest:
    """What a classification is asked to do."""

    base: RefineRequest
    """Images, symmetry, folder, settings of the engine; its reference says which grid the maps are on."""
    settings: ClassifySection
    maps: tuple[DensityMap, ...] = ()
    """First reference of every class; empty: back-projections of random subsets of the particles."""
    raw: Particles | None = None
    """The particles without auxiliary ones, with every column of their file; None: those of ``base``."""

    def particles(self) -> Particles:
        """The particles that are classified, without auxiliary ones."""
        return self.base.source.particles if self.raw is None else self.raw

    def identity(self, diameter_A: float) -> Identity:
        """Everything that decides what comes out, but for the number of iterations."""
        settings = {k: v for k, v in self.settings.model_dump().items() if k not in ONLY_WHEN}
        base, particles = of_request(self.base, diameter_A), self.base.source.particles
        if particles.rotation is not None:  # given poses, or the first references
            base["particles"] = of_particles(particles, poses=True)
        intensities = [particles.signal_scale, particles.noise_level]
        if self.settings.align != "global" and any(values is not None for values in intensities):
            order = np.argsort(particles.uid, kind="stable")
            base["intensities"] = MARK + digest_of(*("none" if v is None else v[order] for v in intensities))
        return {**base, "classify": settings, "maps": [of_map(class_map) for class_map in self.maps]}


@dataclass
class ClassModel:
    """Everything an iteration starts from; a checkpoint is exactly this."""

    state: ScheduleState
    references: Maps
    sigma2: Float[np.ndarray, "groups shells"]
    """(G, S) noise variance by optics group and shell."""
    occupancy: Float[np.ndarray, " classes"]
    """(K,) prior probability of each class, of images that show a particle; sums to 1."""
    rotation: Float[np.ndarray, "n 3 3"]
    """(N, 3, 3)."""
    shift_A: Float[np.ndarray, "n 2"]
    """(N, 2) RELION origins."""
    posterior: Float[np.ndarray, "n classes"]
    """(N, K) of each class, if the image shows a particle."""
    particle: Float[np.ndarray, " n"]
    """(N,) posterior probability that the image shows a particle."""
    columns: dict[str, Shaped[np.ndarray, " n"]] = field(default_factory=dict)
    """Other results per particle, by STAR name."""
    total_weight: Maps = field(default_factory=list)
    """What the images' own shares in the references follow from, see ``leverage``; an empty class has none, and there
    is none at all where the references were not made of the images."""
    half_maps: Maps = field(default_factory=list)
    """Unregularised maps of the last iteration."""
    maps: list[np.ndarray] = field(default_factory=list)
    """(K) maps of both half-sets together, every coefficient weighted by how well it was measured."""
    views: dict[int, Float[np.ndarray, " cells"]] = field(default_factory=dict)
    """Half -> weight of every cell of views, see ``refine.view_density``; empty where poses are given."""
    junk: JunkPrior | None = None
    history: list[ClassIterationRecord] = field(default_factory=list)

    @property
    def classes(self) -> int:
        return len(self.occupancy)

    def assigned(self, junk: bool) -> Int[np.ndarray, " n"]:
        """(N,) int64: the most likely class of each particle, from 1; junk is the one after the last.

        Args:
            junk: whether there is such a class.
        """
        return assigned_classes(self.posterior, self.particle if junk else None)

    def share(self) -> Float[np.ndarray, "n classes"]:
        """(N, K) posterior of each class, of all that the image may be."""
        share: np.ndarray = self.posterior * self.particle[:, None]
        return share

    def of_rows(self, rows: Bool[np.ndarray, " n"]) -> ClassModel:
        """The same model with some of its particles."""
        each = {name: getattr(self, name)[rows] for name in ("rotation", "shift_A", "posterior", "particle")}
        return replace(self, **each, columns={name: values[rows] for name, values in self.columns.items()})

    def arrays(self) -> dict[str, np.ndarray]:
        """By name, for a checkpoint."""
        names = ("sigma2", "occupancy", "rotation", "shift_A", "posterior", "particle")
        arrays = {name: getattr(self, name) for name in names}
        for h in HALVES:
            arrays[f"references{h}"] = np.stack([references[h] for references in self.references])
            arrays[f"half{h}"] = np.stack([references[h] for references in self.half_maps])
            arrays |= {
                f"total{h} {k}": references[h] for k, references in enumerate(self.total_weight) if h in references
            }
        arrays |= {"maps": np.stack(self.maps), **{f"views{h}": v for h, v in self.views.items()}}
        arrays |= {f"column {name}": values for name, values in self.columns.items()}
        if self.junk is not None:
            arrays |= {"junk share": self.junk.share, "junk amplitude": self.junk.amplitude}
        return arrays

    @classmethod
    def of_arrays(
        cls, arrays: dict[str, np.ndarray], state: ScheduleState, history: list[ClassIterationRecord], rows: np.ndarray
    ) -> ClassModel:
        """The model of a checkpoint.

        Args:
            rows: of each present particle among those of the checkpoint.

        Raises:
            KeyError: an array is missing.
        """
        each = {name: arrays[name][rows] for name in ("rotation", "shift_A", "posterior", "particle")}
        stacks = [{h: arrays[f"{name}{h}"] for h in HALVES} for name in ("references", "half")]
        references, half_maps = ([{h: s[h][k] for h in HALVES} for k in range(len(s[1]))] for s in stacks)
        junk = JunkPrior(arrays["junk share"], arrays["junk amplitude"]) if "junk share" in arrays else None
        columns = {k.removeprefix("column "): v[rows] for k, v in arrays.items() if k.startswith("column ")}
        total = [{h: arrays[f"total{h} {k}"] for h in HALVES if f"total{h} {k}" in arrays} for k in
                   range(len(references))]  # fmt: skip
        views = {h: arrays[f"views{h}"] for h in HALVES if f"views{h}" in arrays}
        return cls(
            state, references, arrays["sigma2"], arrays["occupancy"], **each, columns=columns,
            total_weight=total, half_maps=half_maps, maps=list(arrays["maps"]), views=views, junk=junk,
            history=history,
        )  # fmt: skip


def assigned_classes(
    posterior: Float[np.ndarray, "n classes"], particle: Float[np.ndarray, " n"] | None
) -> Int[np.ndarray, " n"]:
    """(N,) int64 from 1: the class with the largest posterior (N, K), or K + 1 where (N,) ``particle``, the probability
    of showing a particle at all, makes junk more likely."""
    all_posteriors = posterior
    if particle is not None:
        all_posteriors = np.column_stack([posterior * particle[:, None], 1 - particle])
    first: np.ndarray = all_posteriors.argmax(1) + 1
    return first
