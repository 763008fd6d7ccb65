"""All controls of a run, one after the other, and what they give together: audit.json."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from cryoiso import __version__
from cryoiso.core import products
from cryoiso.io.atomic import write_json
from cryoiso.methods.audit import extent
from cryoiso.methods.audit.record import GRAVITY, ControlRecord, gravest
from cryoiso.parallel.abort import on_root
from cryoiso.pipeline.audit import arms
from cryoiso.pipeline.audit import images as pictures
from cryoiso.pipeline.audit.bench import Bench, absent, facts_of, prepare
from cryoiso.pipeline.audit.controls import added, decoy, leak, null, omitted, other_reference, reference, stability
from cryoiso.pipeline.audit.repeat import Outcome, repeat
from cryoiso.pipeline.context import RunContext
from cryoiso.pipeline.job_inputs import Inputs
from cryoiso.pipeline.preflight import require_auditable, require_background

logger = logging.getLogger("cryoiso")
CONTROLS: dict[str, ModuleType] = {
    module.NAME: module for module in (reference, null, omitted, added, decoy, other_reference, stability, leak)
}
SCHEMA = 1
RECORD = "control.json"


@dataclass
class Pictures:
    """The images of the controls, made when they are first wanted."""

    bench: Bench
    inputs: Inputs
    image_sets: dict[str, pictures.ImageSet] = field(default_factory=dict)

    def of(self, kind: str) -> pictures.ImageSet:
        """Collective."""
        if kind not in self.image_sets:
            maker: Callable[..., pictures.ImageSet] = pictures.real if kind == "real" else pictures.null
            extra = () if kind == "real" else (kind,)
            small = kind == "leak" and self.bench.comm.rank == 0
            bench = self.bench.fewer(extent.LEAK_PARTICLES) if small else self.bench
            self.image_sets[kind] = maker(bench, self.inputs, *extra)
        return self.image_sets[kind]


def audit(run: RunContext, inputs: Inputs) -> dict[str, Any]:
    """Runs the controls of a job on its finished stages and writes audit.json. Collective; the same on every rank.

    What an interrupted attempt left is used again. Nothing outside of the folder of the controls is changed.

    Returns:
        the contents of audit.json.
    """
    comm = run.comm
    on_root(comm, require_auditable, run.job)
    benches: list[Bench] = []
    on_root(comm, lambda: benches.append(prepare(run, inputs)))
    bench = benches[0] if comm.rank == 0 else absent(run)
    on_root(comm, lambda: require_background(run.job.audit.background, bench.box_px, bench.pixel_size_A))
    names = extent.chosen(run.job)
    if comm.rank == 0:
        count = sum(extent.repetitions(run.job, len(bench.rows)).values())
        bench.folder.mkdir(exist_ok=True)
        logger.info(
            "%d controls on %d of %d particles: %d refinements", len(names), len(bench.rows), bench.total, count
        )
    shown, records = Pictures(bench, inputs), []
    unchanged = _unchanged(bench, shown) if extent.need_unchanged(names) else Outcome(run)
    for name in names:
        record = _control(bench, CONTROLS[name], shown, unchanged)
        if comm.rank == 0:
            records.append(record)
            logger.info("%s: %s. %s", record.title, record.verdict, record.sentence)
    return on_root(comm, _finish, bench, records)


def _unchanged(bench: Bench, shown: Pictures) -> Outcome:
    """The matched control: the subset with its reference as it was; perhaps the run itself. Collective."""
    case = on_root(bench.comm, arms.unchanged_case, bench)
    return Outcome(bench.run) if case is None else repeat(bench, case, shown.of("real"))


def _control(bench: Bench, control: ModuleType, shown: Pictures, unchanged: Outcome) -> ControlRecord:
    """A control's repetitions and its record (on rank 0 alone). Collective."""
    began = time.monotonic()
    cases = on_root(bench.comm, control.cases, bench)
    outcomes = {case.name: repeat(bench, case, shown.of(case.images)) for case in cases}
    records: list[ControlRecord] = []
    on_root(bench.comm, lambda: records.append(_recorded(bench, control, unchanged, outcomes)))
    if bench.comm.rank == 0:
        logger.debug("%s took %.0f s", control.NAME, time.monotonic() - began)
        return records[0]
    return ControlRecord(control.NAME, control.TITLE, "not applicable", "")


def _recorded(
    bench: Bench, control: ModuleType, unchanged: Outcome, outcomes: dict[str, Outcome]
) -> ControlRecord:  # fmt: skip
    """The record of a control, also written into its folder."""
    record: ControlRecord = control.record(bench, unchanged, outcomes)
    (bench.folder / control.NAME).mkdir(exist_ok=True)
    write_json(bench.folder / control.NAME / RECORD, record.as_dict())
    return record


def _finish(bench: Bench, records: list[ControlRecord]) -> dict[str, Any]:
    """audit.json; the images can be made again and are removed."""
    facts = {"schema": SCHEMA, "cryoiso": __version__, **facts_of(bench)}
    kept, settings = earlier(bench.run.folder.path, facts)
    facts["settings"] = {**settings, **facts["settings"]}
    by_name = {**_left_out(bench), **kept, **{record.name: record.as_dict() for record in records}}
    controls = [by_name[name] for name in extent.EXTENTS]
    result = {**facts, "verdict": gravest(control["verdict"] for control in controls), "controls": controls}
    write_json(bench.run.folder.path / products.AUDIT, result)
    shutil.rmtree(bench.folder / pictures.FOLDER, ignore_errors=True)
    return dict(json.loads((bench.run.folder.path / products.AUDIT).read_text(encoding="utf-8")))


def _left_out(bench: Bench) -> dict[str, dict[str, Any]]:
    """Name -> record of each control as one that was not run, with the reason."""
    job, asked = bench.job, bench.job.audit.controls
    return {
        name: ControlRecord(
            name, CONTROLS[name].TITLE, "not applicable",
            (control_extent.reason(job) if not asked or name in asked else "Not asked for.") or "Not asked for.",
        ).as_dict()
        for name, control_extent in extent.EXTENTS.items()
    }  # fmt: skip


CONCERNED = {
    "null": ("background",), "leak": ("background",), "omitted": ("regions", "region_share"),
    "added": ("regions", "region_share"), "other-reference": ("other_reference",),
}  # fmt: skip
"""Name of a control -> settings of audit.json that change it."""


def earlier(folder: Path, facts: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Name -> record of the controls that earlier calls left in audit.json, and their settings: they hold if run,
    particles and the settings that concern them are the same, or are not given now. So controls can be run one after
    the other.

    Args:
        facts: what audit.json would say of these.
    """
    try:
        result = json.loads((folder / products.AUDIT).read_text(encoding="utf-8"))
        settings, now = dict(result["settings"]), facts["settings"]
        if any(result[key] != value for key, value in facts.items() if key != "settings"):
            return {}, {}
        changed = {key for key in settings if key in now and now[key] != settings[key]}
        records = {control["name"]: control for control in result["controls"]}
        return {
            name: records[name] for name in extent.EXTENTS
            if records[name]["verdict"] in GRAVITY[1:] and not changed & {*CONCERNED.get(name, ())}
        }, settings  # fmt: skip
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return {}, {}
