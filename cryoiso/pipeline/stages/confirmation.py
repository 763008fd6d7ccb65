"""Whether a round needs auxiliary particles: not where the raw ones confirm nothing of the homologue.

Their weight is then zero from the second iteration of the co-refinement on, and in the first one they steer nothing:
it has the bits of a refinement of the raw particles alone. So nothing is trained or generated for it.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from cryoiso.core import products
from cryoiso.core.records import IterationRecord
from cryoiso.parallel.abort import on_root
from cryoiso.pipeline.context import RunContext
from cryoiso.pipeline.job_inputs import Inputs
from cryoiso.pipeline.stages.requests import round_request
from cryoiso.pipeline.workflow import CO_REFINEMENTS, starts_a_program

logger = logging.getLogger("cryoiso")


def measured_by_refine(run: RunContext) -> bool:
    """Whether the first iteration of the stage ``refine`` is that of the first co-refinement, so that what it finds of
    the homologue counts for both."""
    job, control = run.job, run.control
    return (
        _decides(run)
        and job.refine.engine == "native"
        and job.auxiliary.poses == "refine"
        and job.refine.local_deg is None
        and not job.micelle.enable
        and not job.classify.enable
        and (control is None or control.half_references is None)
    )


def _decides(run: RunContext) -> bool:
    """Whether the weight is measured, and raw particles do not share their noise spectra with auxiliary ones."""
    job = run.job
    section = job.auxiliary
    return job.run.workflow in CO_REFINEMENTS and section.weight == "measured" and section.noise_group == "own"


def homologue_found(run: RunContext, inputs: Inputs, round_: int) -> IterationRecord | None:
    """What an iteration of the raw particles finds of the homologue before a round; None where that decides nothing,
    or where the round before has confirmed it (collective).

    In the first round the answer is in the record of the stage ``refine``, if that is the same refinement; else one
    native iteration is made.
    """
    if not _decides(run) or on_root(run.comm, _confirmed_before, run, round_):
        return None
    record = on_root(run.comm, _in_refine, run) if round_ == 1 else None
    if record is None:
        record = _asked(run, inputs, round_)
    return {"homologue": record["homologue"], "homologue_precision": record["homologue_precision"]}


def _confirmed_before(run: RunContext, round_: int) -> bool:
    """Whether the round before has confirmed the homologue (reads a file)."""
    facts = _facts(run, f"corefine-{round_ - 1}", "corefine") if round_ > 1 else {}
    return bool(facts.get("homologue", {}).get("confirmed"))


def _in_refine(run: RunContext) -> IterationRecord | None:
    """What the stage ``refine`` found, if its first iteration is that of the first co-refinement (reads a file)."""
    iterations: list[IterationRecord] = _facts(run, "refine", "refine").get("iterations") or [IterationRecord()]
    return iterations[0] if measured_by_refine(run) and "homologue" in iterations[0] else None


def _facts(run: RunContext, stage: str, kind: str) -> Any:
    path = run.folder.stage(stage) / products.facts(kind)
    facts: Any = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return facts


def _asked(run: RunContext, inputs: Inputs, round_: int) -> IterationRecord:
    """One native iteration of the raw particles, as the co-refinement would make its first."""
    from cryoiso.methods.auxiliary.corefine import without_views
    from cryoiso.methods.auxiliary.reference_check import homologue_evidence

    if run.comm.rank == 0:
        logger.info("round %d: one iteration of the raw particles asks how far they confirm the homologue", round_)
    source = without_views(inputs.source(once=starts_a_program(run.job)))
    stage = f"train-{round_}"
    request = round_request(run, inputs.sample(), source, round_, stage, run.folder.stage(stage), resume=False)
    evidence = homologue_evidence(request, run.comm)
    shared: IterationRecord = run.comm.bcast(evidence)
    return shared
