"""The embedded refinement engine: checkpoints and files around ``refine.iterate``."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from cryoiso import __version__
from cryoiso.core import products
from cryoiso.core.errors import InputError
from cryoiso.core.identity import HINT, rows_by_uid
from cryoiso.core.log import logger
from cryoiso.core.protocols import Communicator, RefineRequest, RefineResult
from cryoiso.core.records import RefineRecord, without_times
from cryoiso.core.types import HALVES, DensityMap
from cryoiso.io import checkpoint
from cryoiso.io.atomic import write_text
from cryoiso.io.mrc import write_map
from cryoiso.io.star.write import write_particles
from cryoiso.parallel.abort import on_root
from cryoiso.parallel.context import Context
from cryoiso.refine import schedule
from cryoiso.refine.initial_model import initial_model
from cryoiso.refine.intensity import Intensity, intensity_facts
from cryoiso.refine.iterate import Refinement
from cryoiso.refine.junk import JUNK_COLUMN, JunkPrior, junk_facts, too_much_junk
from cryoiso.refine.model import Model
from cryoiso.refine.noise import empty_facts
from cryoiso.refine.offsets import check_poses
from cryoiso.refine.schedule import ScheduleState
from cryoiso.refine.search_cache import clear
from cryoiso.refine.view_density import density_facts


class NativeEngine:
    """Gold-standard maximum-likelihood refinement on all ranks; needs no other program."""

    name = "native"

    def refine(self, request: RefineRequest, comm: Communicator | None = None) -> RefineResult:
        """Refines until nothing improves, a checkpoint after every iteration (collective).

        Writes into ``request.folder``: particles.star, half1.mrc, half2.mrc (unregularised, untouched), refine.json,
        timing.json, checkpoint/ and, for the correction if there is one, correction/.

        Raises:
            InputError: a half-set is empty, box and pixel size of references and particles differ, a local search
                has no poses to stay near, or the checkpoint to resume from is of another refinement.
            Interrupted: stopped by a signal; the last iteration's checkpoint is there, and what the next one had found.
        """
        comm = comm if comm is not None else Context()
        _check(request)
        device = comm.device()
        run = Refinement(
            request, comm, device, request.diameter_A or 0.9 * request.source.box_px * request.reference.pixel_size_A
        )
        file = request.folder / "checkpoint" / "state.npz"
        model = _resume(file, run) if request.resume else None
        if not request.resume and comm.rank == 0:  # else a later resumption would find those of an earlier job
            clear(file.parent)
            checkpoint.remove(file)
        if request.correction is not None:
            if comm.rank == 0:
                _make_room(request.folder / "correction", model is None)
            comm.barrier()
        model = model or initial_model(run, request.lowpass_A)
        while not model.state.done:
            model = run.step(model)
            if comm.rank == 0:
                _save(file, model, run)  # what was kept of this iteration goes when the next one looks for its own
                if request.on_checkpoint:
                    request.on_checkpoint(model.history[-1])
        result = _result(request, model)
        if comm.rank == 0:
            clear(file.parent)
            _write(request, run, model, result)
        comm.barrier()
        return result


def _check(request: RefineRequest) -> None:
    source, reference = request.source, request.reference
    if reference.box_px != source.box_px:
        raise InputError(
            "the reference's box differs from the particles'",
            expected=f"{source.box_px} px",
            found=f"{reference.box_px} px",
            hint="Use 'cryoiso reference' to bring it to the particles' grid.",
            code="box-mismatch",
        )
    if request.half_references is not None:
        _check_half_references(request.half_references, reference)
    if request.local_deg is not None:
        if not 0 < request.local_deg <= 90:
            raise InputError(
                "not an angle for a local search",
                expected="0 to 90 degrees",
                found=request.local_deg,
                code="option-out-of-range",
            )
        source.particles.require_poses()
    check_poses(source.particles, source.box_px)
    half = source.particles.half
    for h in HALVES:
        if half is None or not (half == h).any():
            raise InputError(
                f"half-set {h} is empty",
                hint="Both half-sets need particles: check rlnRandomSubset.",
                code="half-set-empty",
            )


def _check_half_references(half_references: dict[int, DensityMap], reference: DensityMap) -> None:
    if set(half_references) != set(HALVES):
        raise InputError(
            "each half-set needs a reference of its own",
            expected=HALVES,
            found=tuple(half_references),
            code="arrays-do-not-fit",
        )
    for h, own in half_references.items():
        if own.box_px != reference.box_px or abs(own.pixel_size_A / reference.pixel_size_A - 1) > 0.01:
            raise InputError(
                f"the reference of half-set {h} is on another grid than the common one",
                expected=f"{reference.box_px} px of {reference.pixel_size_A:g} Å",
                found=f"{own.box_px} px of {own.pixel_size_A:g} Å",
                code="grid-mismatch",
            )


def _make_room(folder: Path, afresh: bool) -> None:
    """The folder of the correction, without what another refinement left there."""
    if afresh:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)


def _save(file: Path, model: Model, run: Refinement) -> None:
    arrays = {"sigma2": model.sigma2, "rotation": model.rotation, "shift_A": model.shift_A}
    arrays |= {**model.intensity.arrays(), "uid": run.particles.uid}
    arrays |= {f"reference{h}": model.references[h] for h in HALVES}
    arrays |= {f"half{h}": model.half_maps[h] for h in HALVES}
    arrays |= {f"views{h}": model.views[h] for h in HALVES}
    arrays |= {f"total{h}": total for h, total in model.total_weight.items()}
    arrays |= {f"column {name}": values for name, values in model.columns.items()}
    if model.junk is not None:
        arrays |= {"junk share": model.junk.share, "junk amplitude": model.junk.amplitude}
    values = {"state": asdict(model.state), "history": without_times(model.history), "cryoiso": __version__}
    checkpoint.save(file, arrays, values, run.identity)


def _resume(file: Path, run: Refinement) -> Model | None:
    """The checkpointed model, read by rank 0 and given to all; None where there is none (collective)."""
    identity = run.identity

    def read() -> Model | None:
        saved = checkpoint.load_same(file, identity, "refinement")
        return None if saved is None else _restored(file, *saved, run)

    model = on_root(cast(Context, run.comm), read)
    if model is not None and run.comm.rank == 0:
        logger.info("refinement goes on after iteration %d", model.state.iteration)
    return model


def _restored(file: Path, arrays: dict[str, np.ndarray], values: dict[str, Any], run: Refinement) -> Model:
    """The model of a checkpoint, its rows in the order of the particles as they are given now.

    Raises:
        InputError: of another version, or its last iteration cannot be gone on from.
    """
    if values.get("cryoiso") != __version__:
        logger.warning("%s was written by cryoiso %s, this is %s", file, values.get("cryoiso"), __version__)
    try:
        rows = rows_by_uid(arrays["uid"], run.particles.uid)
        state = ScheduleState(**values["state"])
        model = Model(
            replace(state, done=schedule.is_done(state.stalled, state.iteration, run.settings)),
            {h: arrays[f"reference{h}"] for h in HALVES},
            arrays["sigma2"],
            Intensity.of_arrays(arrays, rows),
            arrays["rotation"][rows],
            arrays["shift_A"][rows],
            {k.removeprefix("column "): v[rows] for k, v in arrays.items() if k.startswith("column ")},
            {h: arrays[f"half{h}"] for h in HALVES},
            {h: arrays[f"views{h}"] for h in HALVES},
            {h: arrays[f"total{h}"] for h in HALVES if f"total{h}" in arrays},
            JunkPrior(arrays["junk share"], arrays["junk amplitude"]) if "junk share" in arrays else None,
            values["history"],
        )
    except (KeyError, TypeError) as error:
        raise InputError(
            f"the checkpoint is of another version ({error})", file=file, hint=HINT, code="version-mismatch"
        ) from None
    if not np.array_equal(rows, np.arange(len(rows))):
        logger.info("the rows of the particle file are in another order than those of %s; matched by uid", file)
    if state.done and not model.state.done and run.request.correction is not None:
        raise InputError(
            "the checkpoint is of a refinement that had reached max_iterations: its last references were not corrected",
            file=file, expected=f"max_iterations = {state.iteration}", found=run.settings.max_iterations, hint=HINT,
            code="checkpoint-not-continuable",
        )  # fmt: skip
    return model


def _result(request: RefineRequest, model: Model) -> RefineResult:
    particles = request.source.particles.with_poses(model.rotation, model.shift_A).with_results(**model.columns)
    if request.settings.scale != "none" or (model.intensity.scale != 1).any() or (model.intensity.noise != 1).any():
        particles = particles.with_intensity(model.intensity.scale, model.intensity.noise)
    maps = {h: request.folder / products.half_map(h) for h in HALVES}
    return RefineResult(particles, maps, model.history, float(model.history[-1]["resolution_A"]))


def _write(request: RefineRequest, run: Refinement, model: Model, result: RefineResult) -> None:
    for half, path in result.half_maps.items():
        write_map(path, model.half_maps[half], run.pixel)
    write_particles(request.folder / products.PARTICLES, result.particles)
    summary: RefineRecord = {
        "engine": "native",
        "symmetry": request.symmetry,
        "diameter_A": run.diameter,
        "resolution_A": result.resolution_A,
        "particles": len(result.particles),
        "iterations": without_times(result.iterations),
        "noise_variance": [[None if np.isinf(v) else round(v, 6) for v in row] for row in model.sigma2.tolist()],
    }
    if model.views:
        summary["view_density"] = density_facts(model.views, request.symmetry, run.settings)
    if request.settings.scale != "none":
        facts = intensity_facts(model.intensity, result.particles, model.rotation, run.raw, request.symmetry)
        summary["intensity"] = {"scale": request.settings.scale, **facts}
    if JUNK_COLUMN in model.columns:
        some, junk = run.raw, model.columns[JUNK_COLUMN]
        summary["junk"] = junk_facts(run.cones, model.rotation[some], junk[some], model.junk)
        if warning := too_much_junk(summary["junk"], int(np.count_nonzero(some))):
            logger.warning(warning)
    if empty := empty_facts(model.sigma2, result.particles.groups, run.box):
        summary["empty_shells"] = empty
    if request.local_deg is not None:
        summary["local_deg"] = request.local_deg
    if request.correction is not None:
        summary["correction"] = request.correction.facts()
    write_text(request.folder / products.facts("refine"), json.dumps(summary, indent=1) + "\n")
    seconds = {"seconds": [record.get("seconds") for record in result.iterations]}
    write_text(request.folder / products.TIMING, json.dumps(seconds, indent=1) + "\n")
