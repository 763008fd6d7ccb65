"""Where layers meet without importing each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np

from cryoiso.core.records import IterationRecord
from cryoiso.core.types import DensityMap, Particles

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Shaped


@runtime_checkable
class ImageSource(Protocol):
    """Particle images with their metadata: HDF5 shards, a stack with its STAR file, or the simulator."""

    particles: Particles
    box_px: int

    def read(self, rows: Shaped[np.ndarray, " n"]) -> Float[np.ndarray, "n box box"]:
        """Images of these rows of ``particles``: (n, D, D) float32, protein white, normalised."""
        ...


class Communicator(Protocol):
    """Ranks as the rest of the program sees them; the serial one does nothing."""

    rank: int
    size: int

    def barrier(self) -> None: ...
    def device(self) -> str:
        """The torch device of this rank."""
        ...

    def bcast(self, value: Any, root: int = 0) -> Any: ...
    def allgather(self, value: Any) -> list[Any]: ...
    def sum_to(self, array: np.ndarray, root: int) -> np.ndarray | None:
        """Element-wise sum over ranks, in slabs; the result on ``root``, None elsewhere. May reuse ``array``."""
        ...

    def sum_all(self, array: np.ndarray) -> np.ndarray:
        """Element-wise sum over ranks, on every rank. May reuse ``array``."""
        ...

    def concat_all(self, rows: np.ndarray) -> np.ndarray:
        """The rows of all ranks, (sum of n, ...), in rank order, on every rank; the same type and row shape
        everywhere."""
        ...

    def max_all(self, value: float) -> float: ...
    def stop_requested(self) -> bool:
        """True on every rank as soon as any rank was told to stop (collective)."""
        ...


@dataclass(frozen=True)
class HalfMaps:
    """What a refinement knows at the end of an iteration, offered to a correction of its next references."""

    iteration: int
    """Number of the iteration that has just ended, from 1."""
    maps: dict[int, Float[np.ndarray, "box box box"]]
    """Half -> (D, D, D) float32 map without regularisation, on the engine's grey scale."""
    references: dict[int, Float[np.ndarray, "box box box"]]
    """Half -> (D, D, D) float32 regularised map: what the engine would search with next."""
    pixel_size_A: float
    fsc: Float[np.ndarray, " box//2+1"]
    """(D//2+1,) of the two maps as the engine measured it, before any correction."""
    resolution_A: float
    """Where that curve drops below 0.143."""
    step_deg: float
    """Angular sampling of the iteration that has just ended, HEALPix-like (order 3 = 7.5)."""
    folder: Path
    """For files of the correction; exists on every rank's file system."""
    mask: Float[np.ndarray, "box box box"] | None = None
    """(D, D, D) solvent mask in [0, 1]; None: none was given."""
    initial: dict[int, Float[np.ndarray, "box box box"]] | None = None
    """Half -> reference that the refinement began with, on any grey scale; for keeping its low resolution."""


class ReferenceCorrection(Protocol):
    """What may change references between two iterations of any engine (anisotropy correction in the loop)."""

    def wants(self, state: HalfMaps) -> bool:
        """Whether it changes anything this time; the same on every rank."""
        ...

    def why_not(self, state: HalfMaps) -> str:
        """Why ``wants`` says no, for log and record; empty if it says yes."""
        ...

    def facts(self) -> dict[str, Any]:
        """Its settings as plain values, for the engine's summary; ``halves_share_a_network`` among them. Where they do
        not decide all that it makes, it also has a method ``identity()`` with everything that does."""
        ...

    def __call__(self, state: HalfMaps, comm: Communicator) -> tuple[dict[int, np.ndarray], dict[str, Any]]:
        """Half -> next reference (D, D, D) float32 on the grey scale of ``state.references``, and a few numbers for
        the record of the iteration; the same on every rank. Collective.

        The same state gives the same bits, also after a resume: what it carries from one iteration to the next lies in
        ``state.folder`` under the iteration's number.
        """
        ...


@dataclass(frozen=True)
class RefineRequest:
    """What an engine is asked to do."""

    source: ImageSource
    reference: DensityMap
    symmetry: str
    folder: Path
    settings: Any
    """cryoiso.core.config.RefineSection"""
    seed: int = 0
    diameter_A: float | None = None
    mask: DensityMap | None = None
    resume: bool = False
    lowpass_A: float = 30.0
    """The reference is low-passed to this resolution before the first iteration."""
    on_checkpoint: Callable[[IterationRecord], None] | None = None
    """Called on rank 0 after each checkpoint with that iteration's record."""
    local_deg: float | None = None
    """Search only within this angle of the poses of ``source.particles``, and shifts only near theirs; None: all."""
    half_references: dict[int, DensityMap] | None = None
    """Half -> its own first reference, on the grid and grey scale of ``reference``; None: ``reference`` for both."""
    correction: ReferenceCorrection | None = None
    """Called after every iteration; None: references stay as the engine makes them."""
    auxiliary: Bool[np.ndarray, " n"] | None = None
    """(N,) bool: particles that are in the references but steer nothing, no part of any half-map; None: none."""
    auxiliary_weight: float | Literal["measured"] = 1.0
    """Factor on the weight that these particles have in the references; measured: what the raw particles of the first
    iteration confirm of ``homologue``."""
    homologue: DensityMap | None = None
    """The map that auxiliary particles come from, with nothing of the images in it; None: ``reference``."""
    judged: bool = False
    """Whether the caller has made sure that the images match the reference, of a larger set that they are part of;
    otherwise the native engine does."""
    grey_scale: float | None = None
    """Factor that brings the references to the images' grey scale, for controls with images that must not match: where
    it is given, the native engine neither measures it nor refuses such images. None: measured."""
    program: Any = None
    """cryoiso.core.config.RelionSection for engines that start somebody's program."""


@dataclass(frozen=True)
class RefineResult:
    """What an engine gives back (the same on every rank)."""

    particles: Particles
    half_maps: dict[int, Path]
    iterations: list[IterationRecord] = field(default_factory=list)
    resolution_A: float = float("nan")


class Engine(Protocol):
    """Somebody's refinement behind one call; all ranks call it together."""

    name: str

    def refine(self, request: RefineRequest, comm: Communicator | None = None) -> RefineResult:
        """Result of the request.

        Args:
            comm: the ranks that share the work; None: this process alone.
        """
        ...


Progress = Callable[[int, int], None]
"""Called as progress(done, total) by long loops."""
