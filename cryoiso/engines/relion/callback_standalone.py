"""The callback where no ranks wait: RELION was started by hand and calls ``cryoiso hook relion`` for each half.

One process is enough to reconstruct its own half. The correction needs both, so the two processes meet through files
beside RELION's: half 2 leaves its maps, half 1 corrects both and writes both results. Files of an earlier, broken-off
job may lie there. So each process draws a token and goes on only when the other one has written that token back, which
nobody can have done before.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from cryoiso.core.errors import CryoisoError, InputError, code_of
from cryoiso.core.protocols import HalfMaps, ReferenceCorrection
from cryoiso.core.types import HALVES
from cryoiso.engines.relion.external import ReconstructionTask, read_task, uses_iterations
from cryoiso.engines.relion.files import SUFFIX
from cryoiso.engines.relion.previous_iteration import (
    PreviousIteration,
    path_of_sampling,
    read_first_references,
    read_previous_iteration,
)
from cryoiso.engines.relion.serve import Setting, corrected, half_maps, maps_of, regularisation, write_result
from cryoiso.io.atomic import atomic_write, write_text
from cryoiso.io.mrc import read_map
from cryoiso.parallel.context import Context

logger = logging.getLogger("cryoiso")
T = TypeVar("T")
LOOK_S = 0.2
WARN_AFTER_S = 120.0


def reconstruct_alone(
    star: Path,
    folder: Path,
    correction: ReferenceCorrection | None,
    *,
    tau2: str = "relion",
    limit_s: float = 12 * 3600.0,
) -> dict[str, Any]:
    """Makes what RELION waits for in this process alone, or in this and that of the other half.

    Args:
        star: RELION's ``..._external_reconstruct.star``.
        folder: where RELION runs.
        correction: of the references; None: RELION's own reconstruction.
        tau2: whose signal power regularises: "relion" or "uneven".
        limit_s: how long to wait for the other half.

    Returns:
        what the correction says of itself, in the process that did it.

    Raises:
        InputError: not RELION's files; or a correction, and RELION refines without half-sets or its sampling is not
            known.
        CryoisoError: the other half's process did not come, or failed.
    """
    task = read_task(star, folder)
    setting, step_deg = _surroundings(task, folder, correction)
    setting = replace(setting, tau2=tau2)
    ranks = Context()
    if correction is None or task.name.half is None:
        maps = maps_of(task, setting, ranks, ("references",))
        write_result(task, maps["references"], setting)
        return {"applied": False, **regularisation({task.name.half or 0: task}, {task.name.half or 0: maps})}
    setting.folder.mkdir(exist_ok=True)
    own = maps_of(task, setting, ranks, ("maps", "references"))
    meeting = _Meeting(task, limit_s)
    try:
        if task.name.half == 2:
            return _leave_to_first(meeting, own)
        return _correct_both(meeting, own, step_deg, setting, ranks)
    except BaseException as error:
        meeting.say("failed", message=str(error) or type(error).__name__, code=code_of(error))
        raise


def _correct_both(
    meeting: _Meeting, own: dict[str, np.ndarray], step_deg: float, setting: Setting, ranks: Context
) -> dict[str, Any]:
    theirs = meeting.wait_for("ready")
    other = read_task(Path(theirs["star"]), Path())
    with np.load(theirs["maps"]) as file:
        maps_of_halves = {1: own, 2: {kind: file[kind] for kind in own}}
    state: HalfMaps = half_maps({1: meeting.task, 2: other}, maps_of_halves, step_deg, setting)
    references, facts = corrected(state, setting.correction, ranks)
    facts |= regularisation({1: meeting.task, 2: other}, maps_of_halves)
    for half, task in ((1, meeting.task), (2, other)):
        write_result(task, references[half], setting)
    meeting.say("done")
    meeting.wait_for("gone")
    meeting.leave()
    return facts


def _leave_to_first(meeting: _Meeting, own: dict[str, np.ndarray]) -> dict[str, Any]:
    maps = meeting.file.with_suffix(".npz")
    with atomic_write(maps) as stream:
        np.savez(stream, **own)  # type: ignore[arg-type]
    meeting.task.result.unlink(missing_ok=True)
    meeting.say("ready", maps=str(maps.absolute()), star=str(meeting.task.star.absolute()))
    meeting.wait_for("done")
    maps.unlink()
    meeting.say("gone")
    if not meeting.task.result.exists():
        raise CryoisoError(
            f"{meeting.task.result}: half 1 reported success, but its result is missing", code="relion-callback-failed"
        )
    return {}


class _Meeting:
    """Two processes that know each other by the tokens in their notes."""

    def __init__(self, task: ReconstructionTask, limit_s: float) -> None:
        self.task = task
        stem = task.star.name.removesuffix(".star").removesuffix(SUFFIX)
        names = {half: stem.replace(f"_half{task.name.half}_", f"_half{half}_") for half in HALVES}
        self.file, self._other = (
            task.star.with_name(f"{names[half]}_cryoiso_meeting.json")
            for half in (task.name.half or 1, 3 - (task.name.half or 1))
        )
        self._token = secrets.token_hex(16)
        self._heard: str | None = None
        self._note: dict[str, Any] = {"stage": "here"}
        self._until = time.monotonic() + limit_s
        self._parent = os.getppid()
        self.say("here")

    def say(self, stage: str, **facts: Any) -> None:
        """A note to the other process; it stands until the next one."""
        self._note = {**self._note, **facts, "stage": stage}
        write_text(self.file, json.dumps({**self._note, "token": self._token, "heard": self._heard}))

    def wait_for(self, stage: str) -> dict[str, Any]:
        """The other's note as soon as it says this and was written to this process.

        Raises:
            CryoisoError: it failed, it did not come in time, or RELION is gone.
        """
        return self._until_found(lambda: self._look(stage), stage)

    def _look(self, stage: str) -> dict[str, Any] | None:
        note: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            note = json.loads(self._other.read_text(encoding="utf-8"))
        if note.get("token") not in (None, self._heard):
            self._heard = str(note["token"])
            self.say(str(self._note["stage"]))
        if note.get("heard") != self._token:
            return None
        if note["stage"] == "failed":
            raise CryoisoError(
                f"the process of the other half failed: {note.get('message', '')}",
                code=str(note.get("code") or "relion-callback-failed"),
            )
        return note if note["stage"] == stage else None

    def _until_found(self, look: Callable[[], T | None], stage: str) -> T:
        began, warned = time.monotonic(), False
        while (note := look()) is None:
            if not (warned or self._heard) and time.monotonic() - began > WARN_AFTER_S:
                warned = True
                logger.warning(
                    "%s: the process of the other half has not begun yet. RELION must reconstruct both halves at the "
                    "same time, without --sequential_halves_recons, and both must see this folder.", self._other,
                )  # fmt: skip
            if time.monotonic() > self._until:
                raise CryoisoError(
                    f"{self._other}: no message '{stage}' from the process of the other half in time",
                    code="relion-callback-failed",
                )
            if os.getppid() != self._parent:
                raise CryoisoError("RELION has ended", code="relion-callback-failed")
            time.sleep(LOOK_S)
        return note

    def leave(self) -> None:
        """Removes the notes of both; the last one to go does so."""
        for file in (self.file, self._other):
            file.unlink(missing_ok=True)


def _surroundings(
    task: ReconstructionTask, folder: Path, correction: ReferenceCorrection | None
) -> tuple[Setting, float]:
    """Setting and angular sampling, from RELION's files of the iteration before.

    Raises:
        InputError: no pixel size, or what a correction needs is not known.
    """
    name = task.name
    before = read_previous_iteration(name)
    pixel = task.pixel_size_A or before.pixel_size_A
    if pixel is None:
        raise InputError(
            "no pixel size found", file=task.star,
            expected=f"{name.of((name.iteration or 1) - 1, 'half1_model.star')} beside it", code="pixel-size-missing",
        )  # fmt: skip
    if correction is not None:
        _require_correctable(task, before)
    setting = Setting(
        correction=correction,
        folder=task.star.parent / "correction",
        pixel_size_A=pixel,
        dimensions=before.dimensions,
        iterative=correction is None and uses_iterations(before.version),
        mask=read_map(folder / before.mask, pixel).data if before.mask and correction is not None else None,
        initial=None if correction is None else read_first_references(name, pixel),
    )
    return setting, 360.0 if before.step_deg is None else before.step_deg


def _require_correctable(task: ReconstructionTask, before: PreviousIteration) -> None:
    """
    Raises:
        InputError: RELION refines without half-sets, or the sampling, on which the correction depends, is not known.
    """
    name = task.name
    if not before.half_sets or (name.class_ or 1) > 1:
        raise InputError(
            "references can be corrected in a refinement with half-sets only", file=task.star,
            expected="relion_refine_mpi with --auto_refine --split_random_halves and one class",
            found=f"class {name.class_ or 1} of a run without half-sets",
            hint="Give 'cryoiso hook relion' no job file to leave the references as they are.",
            code="relion-file-invalid",
        )  # fmt: skip
    if name.half is not None and name.iteration is not None and before.step_deg is None:
        raise InputError(
            "the angular sampling of the iteration before is not known, so that nobody can tell whether to correct",
            file=task.star, expected=path_of_sampling(name),
            hint="Continue a run in its own folder (--o with the same folder).", code="relion-file-invalid",
        )  # fmt: skip
