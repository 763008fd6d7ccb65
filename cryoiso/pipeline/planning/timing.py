"""What a run measures of itself for the next one's plan: ``timing.json`` in the run folder."""

from __future__ import annotations

import json
import logging
from datetime import date
from pathlib import Path
from typing import Any

from cryoiso.core import products
from cryoiso.core.errors import CryoisoError
from cryoiso.io.atomic import write_json
from cryoiso.parallel.launcher import thread_count
from cryoiso.pipeline.context import RunContext
from cryoiso.pipeline.job_inputs import Inputs
from cryoiso.pipeline.planning.job_size import Problem, problem_of
from cryoiso.pipeline.planning.rates import CPU, Rates, built_in, kind_of_device, of_stages, tells_rates
from cryoiso.pipeline.planning.workload import Assumed, stages
from cryoiso.pipeline.records.environment import computes_on
from cryoiso.pipeline.workflow import kind_of

logger = logging.getLogger("cryoiso")


def note_timing(
    run: RunContext, inputs: Inputs, stage: str, seconds: float, cpu_seconds: float, *, resumed: bool
) -> None:
    """Keeps what a stage that has just ended took (rank 0)."""
    took = {"seconds": round(seconds, 3), "cpu_seconds": round(cpu_seconds, 3), "resumed": resumed}
    try:
        _note(run, inputs, stage, took)
    except Exception:  # numbers for a later plan must never end a run
        logger.debug("no timing of %s", stage, exc_info=True)


def _note(run: RunContext, inputs: Inputs, stage: str, took: dict[str, Any]) -> None:
    device, problem = run.comm.device(), problem_of(inputs)
    timing = run.timing
    if not timing:
        timing.update(_so_far(run, device) or _new(run, problem, device))
    if stage == "refine":
        timing["iterations"], timing["nyquist_share"] = _course(run, problem)
    assumed = Assumed(timing["iterations"] or Assumed().iterations, timing["nyquist_share"] or Assumed().nyquist_share)
    work = {} if _was_skipped(run, stage) else stages(problem, run.comm.size, assumed, device)[stage]
    timing["stages"][stage] = {"kind": kind_of(stage), **took, "work": work}


def _so_far(run: RunContext, device: str) -> dict[str, Any] | None:
    """What this run has timed, if on such a device and as many ranks: times of others say nothing of this one."""
    timing = run.timing or _read(run.folder.path / products.TIMING)
    if timing is None or (kind_of_device(timing["device"]), timing["ranks"]) != (kind_of_device(device), run.comm.size):
        return None
    return timing


def _was_skipped(run: RunContext, stage: str) -> bool:
    """Whether a round left the stage out, or refined without the auxiliary particles that the plan reckons with."""
    facts = _read(run.folder.stage(stage) / products.facts(kind_of(stage))) if run.folder.has(stage) else None
    return bool(facts and (facts.get("skipped") or facts.get("auxiliary") == 0))


def save_timing(run: RunContext) -> None:
    """Writes timing.json, when this process leaves the run."""
    if run.timing:
        try:
            write_json(run.folder.path / products.TIMING, run.timing)
        except (OSError, CryoisoError):
            logger.debug("no timing of this run", exc_info=True)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record


def _new(run: RunContext, p: Problem, device: str) -> dict[str, Any]:
    return {
        "schema": 1,
        "date": date.today().isoformat(),
        "hardware": computes_on(device),
        "device": device,
        "ranks": run.comm.size,
        "hosts": len(run.comm.nodes),
        "threads": thread_count(),
        "problem": {"particles": p.particles, "box_px": p.box_px, "symmetry": p.job.sample.symmetry,
                    "workflow": p.job.run.workflow},
        "iterations": None,
        "nyquist_share": None,
        "kernels": built_in(device).kernels,
        "stages": {},
    }  # fmt: skip


def _course(run: RunContext, p: Problem) -> tuple[int | None, float | None]:
    """Iterations of the first refinement, and the resolution of its search as a share of Nyquist's."""
    record = _read(run.folder.stage("refine") / products.facts("refine")) or {}
    records = record.get("iterations") or []
    if not records or "search_resolution_A" not in records[-1]:
        return None, None
    return len(records), min(1.0, 2 * p.pixel_size_A / records[-1]["search_resolution_A"])


def predicted_stages(run: RunContext, inputs: Inputs) -> dict[str, float | None]:
    """Stage -> seconds (rank 0); empty if there is no plan of this run, None for a stage that no rate is known of.

    On CPUs by the built-in rates, on GPUs by those and what this run's own stages took so far.
    """
    try:
        rates = _rates_so_far(run)
        predicted = stages(problem_of(inputs), run.comm.size, Assumed(), run.comm.device())
    except Exception:
        logger.debug("no plan of this run", exc_info=True)
        return {}
    return {name: rates.seconds(kind_of(name), units) for name, units in predicted.items()}


def _rates_so_far(run: RunContext) -> Rates:
    device = run.comm.device()
    if device == CPU:
        return built_in(device)
    noted = (_so_far(run, device) or {}).get("stages", {})
    timed = [(facts["work"], facts["seconds"]) for facts in noted.values() if tells_rates(facts, "seconds")]
    return of_stages(device, built_in(device).kernels, timed)
