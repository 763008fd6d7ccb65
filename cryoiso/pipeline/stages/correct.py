"""Anisotropy correction of maps on disk: the last stage of some workflows, and the command ``correct``.

In mode ``independent`` no process that corrects a half-map opens the other one. What needs both, the filter and the
comparison at the end, happens in processes of its own, which never see a network.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cryoiso.core import products
from cryoiso.core.config import CorrectSection
from cryoiso.core.errors import InputError, UsageError
from cryoiso.core.progress import board
from cryoiso.core.types import DensityMap
from cryoiso.io.atomic import make_folder, write_json
from cryoiso.io.mrc import read_map, write_map
from cryoiso.parallel import signals
from cryoiso.parallel.abort import agree, on_root
from cryoiso.parallel.context import Context
from cryoiso.pipeline.context import RunContext
from cryoiso.pipeline.inputs.grids import read_mask
from cryoiso.pipeline.inputs.map_pairs import read_half_maps
from cryoiso.pipeline.job_inputs import Inputs
from cryoiso.pipeline.stages.half_maps import make_mask
from cryoiso.pipeline.stages.isolated_process import apart

logger = logging.getLogger("cryoiso")
NOT_A_RESOLUTION = "agreement of what networks made, not a resolution: deposit and judge the half-maps that went in"
NOTHING_MEASURED = "the half-maps agree at no resolution: there was nothing to correct"
SHARED = "one network saw both half-maps, so that the corrected ones are not independent of each other"
NOT_SEEN = (
    "the half-maps do not agree beyond chance all the way to the resolution of the correction: nothing finer than "
    "inferred_to_A is inferred"
)
FEW_SHELLS = 2
"""Half-maps that part in the first shells have nothing in common but the shape of their box."""


@dataclass(frozen=True)
class CorrectionFiles:
    """Which files are corrected, and how."""

    maps: dict[int, Path]
    """Half -> map; one map alone is {1: map}."""
    out: Path
    section: CorrectSection
    mask: Path | None = None
    fsc_filter: Path | None = None
    """Filter (D, D, D); None: measured, or a missing cone."""
    missing_cone_deg: float | None = None
    axis: tuple[float, float, float] = (0.0, 0.0, 1.0)
    pixel_size_A: float | None = None
    warm: Path | None = None
    """Folder of an earlier correction, whose networks are trained on."""
    seed: int = 1
    device: str = "auto"
    of_a_pair: bool = False
    """Whether a single map here is one of two half-maps."""

    @property
    def mode(self) -> Literal["paired", "independent", "single"]:
        return "single" if len(self.maps) == 1 and not self.of_a_pair else self.section.mode

    @property
    def alone(self) -> bool:
        """Whether every half is corrected by processes that know nothing of the other."""
        return self.mode == "independent"


def correct(run: RunContext, inputs: Inputs, *, resume: bool) -> None:
    """The stage: corrects the half-maps of the stage ``reconstruct``."""
    maps, job = run.folder.stage("reconstruct"), run.job
    correct_files(
        CorrectionFiles({h: maps / products.half_map(h) for h in (1, 2)}, run.folder.stage("correct"), job.correct,
             maps / products.MASK, seed=job.run.seed, device=job.run.device),
        run.comm, resume=resume,
    )  # fmt: skip


def correct_files(task: CorrectionFiles, comm: Context, *, resume: bool = False) -> None:
    """Corrects maps into a folder (collective).

    Writes corrected_half1.mrc, corrected_half2.mrc and their mean corrected_map.mrc (of one map only the last),
    filter.mrc, measured.mrc, measured_fourier.mrc, network*.npz and correct.json.

    Raises:
        UsageError: options that do not go together.
        InputError: maps, mask and filter that do not belong together.
        Interrupted: stopped by a signal; the same command with resume goes on.
    """
    comm.device_preference = task.device
    comm.install_signal_handlers()
    on_root(comm, _begin, task)
    limit_A = on_root(comm, lambda: (apart if task.alone else _here)(_write_filter, task))
    _correct_maps(task, limit_A, comm, resume)


def _here(function: Any, *args: Any) -> Any:
    return function(*args)


def _begin(task: CorrectionFiles) -> None:
    if len(task.maps) == 1 and task.fsc_filter is None and task.missing_cone_deg is None:
        raise UsageError(
            "a single map needs --missing-cone or --filter; otherwise give both half-maps",
            code="option-missing",
        )
    if task.fsc_filter is not None and task.missing_cone_deg is not None:
        raise UsageError("--missing-cone and --filter exclude each other", code="options-conflict")
    for path in (*task.maps.values(), task.mask, task.fsc_filter):
        if path is not None and not path.is_file():
            raise InputError("no such file", file=path, code="file-not-found")
    make_folder(task.out)


def _write_filter(task: CorrectionFiles) -> float | None:
    """Writes filter.mrc, and mask.mrc where none was given; returns the resolution up to which is corrected."""
    from cryoiso.methods.anisotropy.filter import checked, missing_cone, nothing_beyond, seen_shells
    from cryoiso.metrics.directional_fsc import fsc3d
    from cryoiso.metrics.fsc_curve import fsc, resolution_at

    if len(task.maps) == 2:
        half_map1, half_map2, _ = read_half_maps(task.maps[1], task.maps[2], task.pixel_size_A)
        known = {1: half_map1, 2: half_map2}
    else:
        known = {half: read_map(path, task.pixel_size_A) for half, path in task.maps.items()}
    first = known[min(known)]
    box, pixel = first.box_px, first.pixel_size_A
    mean = replace(first, data=_mean([density.data for density in known.values()]))
    mask = make_mask(mean) if task.mask is None else read_mask(task.mask, box, pixel).data
    write_map(task.out / products.MASK, np.asarray(mask, np.float32), pixel)
    limit_A = task.section.resolution_A
    curve = fsc(known[1].data, known[2].data, mask) if len(known) == 2 else None
    if limit_A is None and curve is not None:
        limit_A = resolution_at(curve, 0.143, box, pixel)
        if limit_A >= box * pixel / FEW_SHELLS:
            logger.warning("%s; are these the two half-maps of one particle, in one frame?", NOTHING_MEASURED)
    if task.fsc_filter is not None:
        fsc_filter = checked(read_map(task.fsc_filter, pixel).data, box, task.fsc_filter)
    elif task.missing_cone_deg is not None:
        fsc_filter = missing_cone(box, task.missing_cone_deg, task.axis)
    else:
        last = box // 2 if limit_A is None else min(box // 2, int(np.ceil(box * pixel / limit_A)) + 1)
        measured = fsc3d(known[1].data, known[2].data, mask, cone_deg=task.section.cone_deg, max_shell=last)
        fsc_filter = checked(np.clip(measured, 0, 1), box)
    if curve is not None and (seen := seen_shells(curve, float(np.mean(mask)))) < len(curve) - 1:
        fsc_filter = nothing_beyond(fsc_filter, seen)
        if limit_A is not None and _is_short(seen, box * pixel / limit_A):
            up_to = f"{box * pixel / seen:.1f} Å" if seen else "no resolution"
            logger.warning("the half-maps agree beyond chance up to %s only: nothing finer is inferred", up_to)
    write_map(task.out / products.FILTER, np.asarray(fsc_filter, np.float32), pixel)
    return limit_A


def _is_short(seen_shell: int, last_shell: float) -> bool:
    """Whether the half-maps' agreement ends before the correction does; one shell is the edge of its band."""
    return last_shell > seen_shell + 1


def _correct_maps(task: CorrectionFiles, limit_A: float | None, comm: Context, resume: bool) -> None:
    """Trains, applies, writes (collective)."""
    if task.alone and comm.size == 1:
        facts = {}
        for number, half in enumerate(task.maps):
            board.expect(number, len(task.maps))  # lines of the other process are not seen here
            half_task = replace(task, maps={half: task.maps[half]}, of_a_pair=True)
            facts[half] = apart(_correct_alone, half_task, limit_A, resume, stop=lambda: bool(signals.stop_signal()))
        on_root(comm, _finish, task, facts)
        return
    corrected = _corrected(task, _read_mine(task, comm), limit_A, comm, resume)
    on_root(comm, _write_parts, task, corrected)
    on_root(comm, _finish, task, {0: (corrected.facts, corrected.history)})


def _correct_alone(task: CorrectionFiles, limit_A: float | None, resume: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """One half in a process that was told of no other."""
    comm = Context()
    comm.device_preference = task.device
    corrected = _corrected(task, _read_mine(task, comm), limit_A, comm, resume)
    _write_parts(task, corrected)
    return corrected.facts, corrected.history


def _read_mine(task: CorrectionFiles, comm: Context) -> dict[int, DensityMap]:
    """The maps that this rank corrects, and no other."""
    from cryoiso.parallel.ddp import ranks_of_half

    error, maps = None, {}
    try:
        for half, path in task.maps.items():
            if not task.alone or comm.rank in ranks_of_half(half, comm.size):
                maps[half] = read_map(path, task.pixel_size_A)
    except InputError as caught:
        error = caught
    agree(comm, error)
    return maps


def _corrected(
    task: CorrectionFiles, maps: dict[int, DensityMap], limit_A: float | None, comm: Context, resume: bool
) -> Any:
    from cryoiso.methods.anisotropy.correct import correct_halves
    from cryoiso.methods.anisotropy.correction_run import network_file
    from cryoiso.methods.anisotropy.settings import agreed, resolve

    settings = replace(agreed(resolve(task.section, comm.device()), comm), mode=task.mode)
    board.expect(0, 1, lines=settings.rounds if task.warm is None else 1)
    fsc_filter, mask = (on_root(comm, read_map, task.out / name).data for name in (products.FILTER, products.MASK))
    warm = None
    if task.warm is not None:
        labels = [str(half) for half in task.maps] if task.alone else ["both"]
        warm = {label: network_file(task.warm, label) for label in labels}
    return correct_halves(
        maps, fsc_filter, mask, settings, comm, task.out, seed=task.seed, resume=resume, warm=warm, resolution_A=limit_A
    )


def _write_parts(task: CorrectionFiles, corrected: Any) -> None:
    pixel = read_map(task.out / products.FILTER).pixel_size_A
    for half in corrected.maps:
        write_map(_corrected_part(task, half), corrected.maps[half], pixel)
        write_map(_inferred_part(task, half), corrected.inferred[half], pixel)


def _corrected_part(task: CorrectionFiles, half: int) -> Path:
    return task.out / (products.CORRECTED_MAP if task.mode == "single" else products.corrected_half(half))


def _inferred_part(task: CorrectionFiles, half: int) -> Path:
    """What the network added to it; removed at the end."""
    return task.out / ("inferred_map.mrc" if task.mode == "single" else f"inferred_half{half}.mrc")


def _finish(task: CorrectionFiles, parts: dict[int, tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """The mean map, what of it was measured, and the numbers."""
    from cryoiso.methods.anisotropy.inferred import measured_share, measured_share_fourier

    def mean_of(part: Callable[[CorrectionFiles, int], Path]) -> DensityMap:
        half_maps = [read_map(part(task, half)) for half in task.maps]
        return replace(half_maps[0], data=_mean([density.data for density in half_maps]))

    corrected, inferred = mean_of(_corrected_part), mean_of(_inferred_part)
    pixel, first = corrected.pixel_size_A, next(iter(parts.values()))[0]
    limit_A = first["resolution_A"] or 2 * pixel
    measured = corrected.data - inferred.data
    width_px = max(1.0, limit_A / pixel / 2)
    share = measured_share(measured, inferred.data, width_px)
    write_map(task.out / products.CORRECTED_MAP, corrected.data, pixel)
    write_map(task.out / products.MEASURED, share, pixel)
    write_map(task.out / products.MEASURED_FOURIER, measured_share_fourier(measured, inferred.data), pixel)
    for half in task.maps:
        _inferred_part(task, half).unlink(missing_ok=True)
    curves = {} if len(task.maps) == 1 else (apart if task.alone else _here)(_curves, task)
    write_json(task.out / products.facts("correct"), _facts(task, parts, share, limit_A, curves))
    for folder in task.out.glob("training_*"):  # the checkpoints have done their duty
        shutil.rmtree(folder)


def _facts(
    task: CorrectionFiles, parts: dict[int, Any], share: np.ndarray, limit_A: float, curves: dict[str, Any]
) -> Any:
    mask = read_map(task.out / products.MASK)
    fsc_filter = read_map(task.out / products.FILTER)
    inside, length_A = share[mask.data > 0.5], mask.box_px * mask.pixel_size_A
    networks = {label: network for facts, _ in parts.values() for label, network in facts["networks"].items()}
    history = {label: records for _, records in parts.values() for label, records in records.items()}
    return {
        "mode": task.mode,
        "maps": {str(half): _shown(path, task.out) for half, path in task.maps.items()},
        "box_px": mask.box_px,
        "pixel_size_A": mask.pixel_size_A,
        "resolution_A": limit_A,
        "keep_measured": task.section.keep_measured,
        "filter_mean": _mean_within(fsc_filter, limit_A),
        "measured_share_mean": float(inside.mean()) if inside.size else None,
        "settings": next(iter(parts.values()))[0]["settings"],
        "networks": networks,
        "training": {
            label: {key: [record.get(key) for record in records] for key in _columns(records)}
            for label, records in sorted(history.items())
        },
        **curves,
        "notes": [
            NOT_A_RESOLUTION,
            *([SHARED] if task.mode == "paired" else []),
            *([NOT_SEEN] if curves and _is_short(curves["inferred_to_shell"], length_A / limit_A) else []),
            *([NOTHING_MEASURED] if limit_A >= length_A / FEW_SHELLS else []),
        ],
    }


def _shown(path: Path, out: Path) -> str:
    """A map's name; that of another stage of the same run relative, so that it does not tell where the run lies."""
    beside = path.is_absolute() and path.parent.parent == out.parent and path.parent.name[:3].rstrip("_").isdecimal()
    return f"../{path.parent.name}/{path.name}" if beside else str(path)


def _mean(maps: list[np.ndarray]) -> np.ndarray:
    return np.asarray(np.mean(maps, axis=0, dtype=np.float64), np.float32)


def _columns(records: list[dict[str, Any]]) -> list[str]:
    return [key for key, value in (records[-1] if records else {}).items() if isinstance(value, int | float)]


def _mean_within(fsc_filter: DensityMap, limit_A: float) -> float:
    from cryoiso.methods.anisotropy.filter import radii

    r = radii(fsc_filter.box_px)
    return float(fsc_filter.data[(r > 0) & (r <= fsc_filter.box_px * fsc_filter.pixel_size_A / limit_A)].mean())


def _curves(task: CorrectionFiles) -> dict[str, Any]:
    """FSC of what went in, and of what came out under a name that nobody takes for a resolution."""
    from cryoiso.methods.anisotropy.filter import seen_shells
    from cryoiso.metrics.fsc_curve import fsc, shell_frequencies

    mask = read_map(task.out / products.MASK).data
    raw = [read_map(path, task.pixel_size_A) for path in task.maps.values()]
    corrected = [read_map(_corrected_part(task, half)) for half in task.maps]
    frequency = shell_frequencies(raw[0].box_px, raw[0].pixel_size_A)
    curves = {
        "frequency_invA": frequency,
        "fsc_half_maps": fsc(raw[0].data, raw[1].data, mask),
        "agreement_of_network_outputs_not_a_resolution": fsc(corrected[0].data, corrected[1].data, mask),
    }
    seen = seen_shells(curves["fsc_half_maps"], float(np.mean(mask)))
    to_A = raw[0].box_px * raw[0].pixel_size_A / seen if seen else None
    rounded = {name: [round(float(v), 6) for v in values] for name, values in curves.items()}
    return {**rounded, "inferred_to_shell": seen, "inferred_to_A": to_A}
