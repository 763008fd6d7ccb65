"""3D classification with the embedded engine: checkpoints and files around ``refine.classes``."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from cryoiso import __version__
from cryoiso.core import products
from cryoiso.core.errors import InputError
from cryoiso.core.identity import HINT, Identity, rows_by_uid
from cryoiso.core.log import logger
from cryoiso.core.protocols import Communicator
from cryoiso.core.records import without_times
from cryoiso.core.types import HALVES, Particles
from cryoiso.io import checkpoint
from cryoiso.io.atomic import write_text
from cryoiso.io.mrc import write_map
from cryoiso.io.star.write import write_particles
from cryoiso.metrics.view_cones import cone_facts
from cryoiso.parallel.abort import on_root
from cryoiso.parallel.context import Context
from cryoiso.refine.classes.initial import initial_classes
from cryoiso.refine.classes.iterate import Classification, is_done
from cryoiso.refine.classes.model import ClassModel, ClassRequest
from cryoiso.refine.junk import JUNK_COLUMN, junk_facts
from cryoiso.refine.noise import empty_facts
from cryoiso.refine.offsets import check_poses
from cryoiso.refine.schedule import ScheduleState

CLASS_COLUMN = "cryoisoClassProbability"


def classify(request: ClassRequest, comm: Communicator) -> ClassModel:
    """Sorts particles into classes until hardly any changes, a checkpoint after every iteration (collective).

    Writes into the request's folder: particles.star, for each class class001.mrc, class001_half1.mrc and
    class001_half2.mrc (unregularised, untouched), classify.json, timing.json and checkpoint/.

    Raises:
        InputError: a half-set is empty or too small, maps and particles are on different grids, poses are needed and
            missing, a map does not match the images, or the checkpoint to resume from is of another classification.
        Interrupted: stopped by a signal; the last iteration's checkpoint is there.
    """
    check_classes(request)
    base = request.base
    diameter = base.diameter_A or 0.9 * base.source.box_px * base.reference.pixel_size_A
    task = Classification(request, comm, comm.device(), diameter)
    identity = comm.bcast(request.identity(diameter) if comm.rank == 0 else None)
    file = base.folder / "checkpoint" / "state.npz"
    model = _resume(file, task, identity) if base.resume else None
    if not base.resume and comm.rank == 0:
        checkpoint.remove(file)
    model = model or initial_classes(task)
    while not model.state.done:
        model = task.step(model)
        if comm.rank == 0:
            values = {"state": asdict(model.state), "history": without_times(model.history), "cryoiso": __version__}
            checkpoint.save(file, {**model.arrays(), "uid": task.particles.uid}, values, identity)
            if base.on_checkpoint:
                base.on_checkpoint({"iteration": model.state.iteration})
    if comm.rank == 0:
        _write(request, task, model)
    comm.barrier()
    return model


def check_classes(request: ClassRequest) -> None:
    """Finds what is wrong with a request before anything is written.

    Raises:
        InputError: see ``classify``.
    """
    base, settings, particles = request.base, request.settings, request.base.source.particles
    check_poses(particles, base.source.box_px)
    if settings.align != "global" or not request.maps:
        particles.require_poses()
    if request.maps and len(request.maps) != settings.classes:
        raise InputError(
            "every class needs a map", expected=settings.classes, found=len(request.maps), code="arrays-do-not-fit"
        )
    for number, class_map in enumerate((base.reference, *request.maps)):
        if (
            class_map.box_px != base.source.box_px
            or abs(class_map.pixel_size_A / base.reference.pixel_size_A - 1) > 0.01
        ):
            raise InputError(
                f"map {number} is on another grid than the particles",
                expected=f"{base.source.box_px} px of {base.reference.pixel_size_A:g} Å",
                found=f"{class_map.box_px} px of {class_map.pixel_size_A:g} Å",
                code="grid-mismatch",
            )
    for h in HALVES:
        count = 0 if particles.half is None else int((particles.half == h).sum())
        if count < 2 * settings.classes:
            raise InputError(
                f"half-set {h} is too small for {settings.classes} classes",
                expected=f"{2 * settings.classes} particles or more", found=count,
                code="particles-too-few",
            )  # fmt: skip


def _resume(file: Path, task: Classification, identity: Identity) -> ClassModel | None:
    """The checkpointed model, read by rank 0 and given to all; None where there is none (collective)."""

    def read() -> ClassModel | None:
        saved = checkpoint.load_same(file, identity, "classification")
        return None if saved is None else _restored(file, *saved, task)

    model = on_root(cast(Context, task.comm), read)
    if model is not None and task.comm.rank == 0:
        logger.info("classification goes on after iteration %d", model.state.iteration)
    return model


def _restored(file: Path, arrays: dict[str, np.ndarray], values: dict[str, Any], task: Classification) -> ClassModel:
    if values.get("cryoiso") != __version__:
        logger.warning("%s was written by cryoiso %s, this is %s", file, values.get("cryoiso"), __version__)
    try:
        rows = rows_by_uid(arrays["uid"], task.particles.uid)
        state = ScheduleState(**values["state"])
        done = is_done(state.stalled, state.iteration, task.settings.max_iterations)
        return ClassModel.of_arrays(arrays, replace(state, done=done), values["history"], rows)
    except (KeyError, TypeError) as error:
        raise InputError(
            f"the checkpoint is of another version ({error})", file=file, hint=HINT, code="version-mismatch"
        ) from None


def classified(request: ClassRequest, model: ClassModel) -> Particles:
    """The particles with class numbers and probabilities, and with poses where these were searched.

    Args:
        model: of these particles, without auxiliary ones.
    """
    particles, junk = request.particles(), request.settings.junk
    if request.settings.align != "none":
        particles = particles.with_poses(model.rotation, model.shift_A)
    number = model.assigned(junk)
    share = np.column_stack([model.posterior * model.particle[:, None], 1 - model.particle])
    columns = {
        **model.columns,
        "rlnClassNumber": number,
        CLASS_COLUMN: share[np.arange(len(number)), number - 1],
        **({JUNK_COLUMN: 1 - model.particle} if junk else {}),
    }
    return particles.with_results(**columns)


def _write(request: ClassRequest, task: Classification, model: ClassModel) -> None:
    folder, pixel = request.base.folder, task.run.pixel
    for k in range(model.classes):
        write_map(folder / products.class_map(k + 1), model.maps[k], pixel)
        for half in HALVES:
            write_map(folder / products.class_half_map(k + 1, half), model.half_maps[k][half], pixel)
    remove_further_classes(folder, model.classes)
    own = model if request.base.auxiliary is None else model.of_rows(task.run.raw)
    write_particles(folder / products.PARTICLES, classified(request, own))
    write_text(folder / products.facts("classify"), json.dumps(summary(request, task, own), indent=1) + "\n")
    seconds = {"seconds": [record.get("seconds") for record in model.history]}
    write_text(folder / products.TIMING, json.dumps(seconds, indent=1) + "\n")


def remove_further_classes(folder: Path, classes: int) -> None:
    """Removes the maps of an earlier classification into more classes, which would look like some of this one's."""
    number = classes + 1
    while (folder / products.class_map(number)).exists():
        (folder / products.class_map(number)).unlink()
        for half in HALVES:
            (folder / products.class_half_map(number, half)).unlink(missing_ok=True)
        number += 1


def summary(request: ClassRequest, task: Classification, model: ClassModel) -> dict[str, Any]:
    """Contents of classify.json.

    Args:
        model: of the particles without auxiliary ones.
    """
    half = task.particles.half[task.run.raw] if task.particles.half is not None else np.zeros(len(model.rotation))
    settings, junk, last = request.settings, request.settings.junk, model.history[-1]
    share = model.share()
    counts = np.bincount(model.assigned(junk), minlength=model.classes + 2)[1:]
    classes = [
        {
            "number": k + 1, "occupancy": round(float(share[:, k].mean()), 6), "particles": int(counts[k]),
            "resolution_A": last["resolution_A"][k],
            "half_set_weights": [round(float(share[half == h, k].sum()), 3) for h in HALVES],
        }
        for k in range(model.classes)
    ]  # fmt: skip
    names, cones = [str(k + 1) for k in range(model.classes)], task.run.cones
    facts: dict[str, Any] = {
        "engine": "native", "symmetry": request.base.symmetry, "diameter_A": task.run.diameter,
        "align": settings.align, "particles": len(model.rotation), "classes": classes,
        "cones": cone_facts(cones, cones.index(model.rotation[:, 2]), names, share),
        "settled": model.state.stalled > 0, "iterations": without_times(model.history),
    }  # fmt: skip
    if settings.align == "local":
        facts["local_deg"] = settings.local_deg
    if junk:
        facts["junk"] = {
            "number": model.classes + 1,
            **junk_facts(cones, model.rotation, 1 - model.particle, model.junk),
        }
    if request.base.auxiliary is not None:
        facts["auxiliary"] = int(request.base.auxiliary.sum())
    if empty := empty_facts(model.sigma2, task.particles.groups, task.run.box):
        facts["empty_shells"] = empty
    return facts
