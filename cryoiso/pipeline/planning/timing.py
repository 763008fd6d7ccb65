"""What a run measures of itself for the next one's plan: ``timing.json`` in the run folder."""

from __future__ import annotations

import json
import logging
from datetime import date
from pathlib import Path
from typing import Any

from cryoiso.core.errors import CryoisoError
from cryoiso.io.atomic import write_json
from cryoiso.parallel.launcher import thread_count
from cryoiso.pipeline.planning.job_size import Problem, problem_of
from cryoiso.pipeline.planning.rates import CPU, Rates, built_in, kind_of_device, of_stages, tells_rates
from cryoiso.pipeline.planning.workload import Assumed, stages
from cryoiso.pipeline.records.environment import computes_on
from cryoiso.pipeline.records.run_folder import TIMING
from cryoiso.pipeline.work import Work
from cryoiso.pipeline.workflow import kind_of

logger = logging.getLogger("cryoiso")


def note_timing(work: Work, stage: str, seconds: float, cpu_seconds: float) -> None:
    """Keeps what a stage that has just ended took (rank 0)."""
    try:
        _note(work, stage, seconds, cpu_seconds)
    except Exception:  # numbers for a later plan must never end a run
        logger.debug("no timing of %s", stage, exc_info=True)


def _note(work: Work, stage: str, seconds: float, cpu_seconds: float) -> None:
    device, problem = work.comm.device(), problem_of(work)
    found = work.timing = _so_far(work, device) or _new(work, problem, device)
    if stage == "refine":
        found["iterations"], found["nyquist_share"] = _course(work, problem)
    assumed = Assumed(found["iterations"] or Assumed().iterations, found["nyquist_share"] or Assumed().nyquist_share)
    found["stages"][stage] = {
        "kind": kind_of(stage),
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu_seconds, 3),
        "resumed": work.resume,
        "work": {} if _was_skipped(work, stage) else stages(problem, work.comm.size, assumed, device)[stage],
    }


def _so_far(work: Work, device: str) -> dict[str, Any] | None:
    """What this run has timed, if on such a device and as many ranks: times of others say nothing of this one."""
    found = work.timing or _read(work.folder.path / TIMING)
    if found is None or (kind_of_device(found["device"]), found["ranks"]) != (kind_of_device(device), work.comm.size):
        return None
    return found


def _was_skipped(work: Work, stage: str) -> bool:
    """Whether a round left the stage out."""
    facts = _read(work.folder.stage(stage) / f"{kind_of(stage)}.json") if work.folder.has(stage) else None
    return bool(facts and facts.get("skipped"))


def save_timing(work: Work) -> None:
    """Writes timing.json, when this process leaves the run."""
    if work.timing is not None:
        try:
            write_json(work.folder.path / TIMING, work.timing)
        except (OSError, CryoisoError):
            logger.debug("no timing of this run", exc_info=True)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _new(work: Work, p: Problem, device: str) -> dict[str, Any]:
    return {
        "schema": 1,
        "date": date.today().isoformat(),
        "hardware": computes_on(device),
        "device": device,
        "ranks": work.comm.size,
        "hosts": len(work.comm.nodes),
        "threads": thread_count(),
        "problem": {"particles": p.particles, "box_px": p.box_px, "symmetry": p.job.sample.symmetry,
                    "workflow": p.job.run.workflow},
        "iterations": None,
        "nyquist_share": None,
        "kernels": built_in(device).kernels,
        "stages": {},
    }  # fmt: skip


def _course(work: Work, p: Problem) -> tuple[int | None, float | None]:
    """Iterations of the first refinement, and the resolution of its search as a share of Nyquist's."""
    found = _read(work.folder.stage("refine") / "refine.json") or {}
    records = found.get("iterations") or []
    if not records or "search_resolution_A" not in records[-1]:
        return None, None
    return len(records), min(1.0, 2 * p.pixel_size_A / records[-1]["search_resolution_A"])


def predicted_stages(work: Work) -> dict[str, float | None]:
    """Stage -> seconds (rank 0); empty if there is no plan of this run, None for a stage that no rate is known of.

    On CPUs by the built-in rates, on GPUs by those and what this run's own stages took so far.
    """
    try:
        rates = _rates_so_far(work)
        found = stages(problem_of(work), work.comm.size, Assumed(), work.comm.device())
    except Exception:
        logger.debug("no plan of this run", exc_info=True)
        return {}
    return {name: rates.seconds(kind_of(name), units) for name, units in found.items()}


def _rates_so_far(work: Work) -> Rates:
    device = work.comm.device()
    if device == CPU:
        return built_in(device)
    noted = (_so_far(work, device) or {}).get("stages", {})
    timed = [(facts["work"], facts["seconds"]) for facts in noted.values() if tells_rates(facts, "seconds")]
    return of_stages(device, built_in(device).kernels, timed)
