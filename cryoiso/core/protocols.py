"""Where layers meet without importing each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from cryoiso.core.types import DensityMap, Particles


@runtime_checkable
class ImageSource(Protocol):
    """Particle images with their metadata: HDF5 shards, a stack with its STAR file, or the simulator."""

    particles: Particles
    box_px: int

    def read(self, rows: np.ndarray) -> np.ndarray:
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

    def max_all(self, value: float) -> float: ...
    def stop_requested(self) -> bool:
        """True on every rank as soon as any rank was told to stop (collective)."""
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
    on_checkpoint: Callable[[dict[str, Any]], None] | None = None
    """Called on rank 0 after each checkpoint with that iteration's record."""
    local_deg: float | None = None
    """Search only within this angle of the poses of ``source.particles``, and shifts only near theirs; None: all."""
    half_references: dict[int, DensityMap] | None = None
    """Half -> its own first reference, on the grid and grey scale of ``reference``; None: ``reference`` for both."""


@dataclass(frozen=True)
class RefineResult:
    """What an engine gives back (the same on every rank)."""

    particles: Particles
    half_maps: dict[int, Path]
    iterations: list[dict[str, Any]] = field(default_factory=list)
    resolution_A: float = float("nan")


class Engine(Protocol):
    """Somebody's refinement behind one call; all ranks call it together."""

    name: str

    def refine(self, request: RefineRequest, comm: Communicator) -> RefineResult: ...


Progress = Callable[[int, int], None]
"""Called as progress(done, total) by long loops."""
