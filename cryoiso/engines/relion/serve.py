"""What the waiting ranks do when RELION calls: maps from its arrays, the correction, the references it reads back."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cryoiso.core.errors import CryoisoError
from cryoiso.core.protocols import HalfMaps, ReferenceCorrection
from cryoiso.core.types import HALVES
from cryoiso.engines.relion import external
from cryoiso.engines.relion.external import ReconstructionTask
from cryoiso.engines.relion.tau2 import ratio, with_uneven_tau2
from cryoiso.io.mrc import write_map
from cryoiso.metrics.fsc_curve import resolution_at
from cryoiso.parallel.abort import agree
from cryoiso.parallel.context import Context
from cryoiso.parallel.partition import root_of_half

logger = logging.getLogger("cryoiso")
KINDS = ("maps", "references")


@dataclass(frozen=True)
class Setting:
    """What stays the same over the iterations of a refinement; the same on every rank."""

    correction: ReferenceCorrection | None
    folder: Path
    """of the correction"""
    pixel_size_A: float
    dimensions: int
    """of the particles: 2, or 3 for subtomograms"""
    iterative: bool
    """how to divide, see ``external``"""
    mask: np.ndarray | None = None
    initial: dict[int, np.ndarray] | None = None
    tau2: str = "relion"
    """whose signal power regularises: "relion" or "uneven" (``tau2``)"""


def serve(
    tasks: dict[int | None, ReconstructionTask], step_deg: float, setting: Setting, comm: Context
) -> dict[str, Any] | None:
    """Writes what RELION waits for, and removes the arrays that it left for us (collective).

    Args:
        tasks: of both halves, by half; or the joined reconstruction at the end, under None, which is not corrected.
        step_deg: angular sampling of the iteration.

    Returns:
        what the correction says of itself, for the iteration's record; None for the joined reconstruction.

    Raises:
        CryoisoError: an array cannot be read, the correction failed, or its result cannot be used; on all ranks.
    """
    began = time.monotonic()
    if None in tasks:
        joined = tasks[None]
        maps = on_one(comm, 0, lambda: maps_of(joined, setting, comm, ("references",)))
        on_one(comm, 0, lambda: write_result(joined, maps["references"], setting))
        return None
    maps = _both_halves({half: tasks[half] for half in HALVES}, setting, comm)
    state = half_maps({half: tasks[half] for half in HALVES}, maps, step_deg, setting)
    references, facts = corrected(state, setting.correction, comm)
    facts |= regularisation({half: tasks[half] for half in HALVES}, maps)
    for half in HALVES:
        on_one(
            comm, root_of_half(half, comm.size), lambda half=half: write_result(tasks[half], references[half], setting)
        )
    if comm.rank == 0 and setting.correction is not None and facts.get("applied", True):
        # told, not kept: files that are compared bit by bit hold no timings
        logger.info("RELION waited %.1f s for the correction", time.monotonic() - began)
    _give_back_memory()
    return facts


def _both_halves(
    tasks: dict[int, ReconstructionTask], setting: Setting, comm: Context
) -> dict[int, dict[str, np.ndarray]]:
    """Half -> what ``maps_of`` makes, each half's on one rank and sent to all (collective)."""
    by_half: dict[int, dict[str, np.ndarray]] = {}
    error: CryoisoError | None = None
    for half, task in tasks.items():
        if comm.rank == root_of_half(half, comm.size) and error is None:
            try:
                by_half[half] = maps_of(task, setting, comm, KINDS)
            except CryoisoError as caught:
                error = caught
    agree(comm, error)
    for half in HALVES:
        root = root_of_half(half, comm.size)
        own_maps = by_half.get(half, {})
        names = [*KINDS, "tau2"] if setting.tau2 == "uneven" else KINDS
        by_half[half] = {name: comm.bcast(own_maps.get(name), root) for name in names}
    return by_half


def regularisation(tasks: dict[int, ReconstructionTask], by_half: dict[int, dict[str, np.ndarray]]) -> dict[str, Any]:
    """What the record says of a signal power other than RELION's; nothing where it is RELION's."""
    ours = {str(half): ratio(tasks[half], by_half[half]["tau2"]) for half in tasks if "tau2" in by_half[half]}
    return {"tau2": "uneven", "tau2_over_relion": ours} if ours else {}


def half_maps(
    tasks: dict[int, ReconstructionTask], by_half: dict[int, dict[str, np.ndarray]], step_deg: float, setting: Setting
) -> HalfMaps:
    """What a correction is told, from the maps of both halves by kind."""
    first = tasks[1]
    return HalfMaps(
        iteration=first.name.iteration or 0,
        maps={half: by_half[half]["maps"] for half in HALVES},
        references={half: by_half[half]["references"] for half in HALVES},
        pixel_size_A=setting.pixel_size_A,
        fsc=first.fsc,
        resolution_A=resolution_at(first.fsc, 0.143, first.box_px, setting.pixel_size_A),
        step_deg=step_deg,
        folder=setting.folder,
        mask=setting.mask,
        initial=setting.initial,
    )


def maps_of(task: ReconstructionTask, setting: Setting, comm: Context, kinds: tuple[str, ...]) -> dict[str, np.ndarray]:
    """kind -> (D, D, D) float32: "maps" without, "references" with the prior; "tau2" -> (D//2+1,) its power, where it
    is not RELION's."""
    device = _device(task, comm.device())
    arrays = external.read_arrays(task, device)
    if setting.tau2 == "uneven" and "references" in kinds:
        task = with_uneven_tau2(task, arrays)
    maps = {
        kind: external.reconstruct(
            task, arrays, regularised=kind == "references", iterative=setting.iterative, dimensions=setting.dimensions
        )
        .cpu()
        .numpy()
        for kind in kinds
    }
    return {**maps, "tau2": task.tau2} if setting.tau2 == "uneven" and "references" in kinds else maps


def _device(task: ReconstructionTask, device: str) -> str:
    """The CPU where the arrays, in double precision and several at once, would not fit onto the GPU."""
    if not device.startswith("cuda"):
        return device
    import torch

    need = 12 * 8 * round(task.padding * task.box_px) ** 3
    return device if torch.cuda.mem_get_info(device)[0] > need else "cpu"


def corrected(
    state: HalfMaps, correction: ReferenceCorrection | None, comm: Context
) -> tuple[dict[int, np.ndarray], dict[str, Any]]:
    if correction is None:
        return state.references, {"applied": False, "why_not": "no correction was asked for"}
    if not correction.wants(state):
        why_not = correction.why_not(state)
        if comm.rank == 0:
            logger.info("iteration %d: references not corrected: %s", state.iteration, why_not)
        return state.references, {"applied": False, "why_not": why_not}
    corrected_maps, facts = correction(state, comm)
    for half in HALVES:
        half_map = np.asarray(corrected_maps[half])
        if half_map.shape != state.references[half].shape or not np.isfinite(half_map).all():
            raise CryoisoError(
                f"the correction's reference of half {half} in iteration {state.iteration} cannot be used: shape "
                f"{half_map.shape}, {int((~np.isfinite(half_map)).sum())} voxels not finite",
                code="correction-unusable",
            )
    return corrected_maps, dict(facts)


def write_result(task: ReconstructionTask, volume: np.ndarray, setting: Setting) -> None:
    """What RELION reads back; its arrays go."""
    write_map(task.result, volume, setting.pixel_size_A)
    for array in task.arrays:
        array.unlink(missing_ok=True)  # RELION leaves them: gigabytes an iteration


def on_one(comm: Context, rank: int, function: Any) -> Any:
    """Calls a function on one rank; its CryoisoError is raised on all of them. The result stays there (collective)."""
    result: Any = None
    error: CryoisoError | None = None
    if comm.rank == rank:
        try:
            result = function()
        except CryoisoError as caught:
            error = caught
    agree(comm, error)
    return result


def _give_back_memory() -> None:
    """RELION may need the GPU now."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
