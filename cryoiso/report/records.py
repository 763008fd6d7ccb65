"""What a report is made of: the records of a run, gathered, and what is said of them."""

from __future__ import annotations

from typing import Any, TypedDict

from cryoiso.core.records import DiagnoseRecord, IterationRecord, ReferenceRecord, RefineRecord


class StageTime(TypedDict):
    stage: str
    seconds: float | None


class ReportData(TypedDict, total=False):
    """``report.json``: see ``report.collect.collect``."""

    schema: int
    title: str
    summary: list[str]
    numbers: list[dict[str, Any]]
    iterations: list[IterationRecord]
    diagnose: DiagnoseRecord
    ingest: dict[str, Any]
    reference: ReferenceRecord
    refine: RefineRecord
    classify: dict[str, Any]
    """classify.json of a run that classified its particles."""
    reconstruct: dict[str, Any]
    stages: list[StageTime]
    job: dict[str, Any]
    """The resolved job: a user may have left out what a section leaves out."""
    audit: dict[str, Any]
    auxiliary: dict[str, Any]
    measured: dict[str, Any]
    """shares: of the corrected map; controls: of an audit. See ``report.sections.measured``."""
    comparison: dict[str, Any]
    correct: dict[str, Any]
    realign: list[dict[str, Any]]
    provenance: list[tuple[str, str]]
