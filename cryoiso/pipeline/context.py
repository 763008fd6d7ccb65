"""What every stage of a run is given beside its inputs: the job, the folder, the ranks and the records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryoiso.core.config import Job
from cryoiso.parallel.context import Context
from cryoiso.pipeline.records.journal import Journal
from cryoiso.pipeline.records.manifest_record import Manifest
from cryoiso.pipeline.records.run_folder import RunFolder


@dataclass(frozen=True)
class Control:
    """What a control changes in a refinement that no key of a job file can change."""

    grey_scale: float
    """factor that brings the initial reference to the images' grey scale; the images are not required to match it"""
    half_references: tuple[Path, Path] | None = None
    """initial references of half-sets 1 and 2; None: that of the job, for both"""


@dataclass(frozen=True)
class RunContext:
    """A job, its folder, its ranks and its records; one for a whole run, or for a single command without records."""

    job: Job
    folder: RunFolder
    comm: Context
    journal: Journal | None = None
    """on rank 0 of a run"""
    manifest: Manifest | None = None
    """on rank 0 of a run; hashes of inputs are added to it"""
    report: Callable[[Path], object] | None = None
    """makes the report of a run folder"""
    audit: Callable[..., object] | None = None
    """does the stage ``audit``, called as one"""
    control: Control | None = None
    """in a control of another run"""
    label: str = ""
    """in a control: what stands before the names of stages where progress is shown"""
    timing: dict[str, Any] = field(default_factory=dict)
    """what becomes timing.json, see ``pipeline.planning.timing``; empty until a stage of this process has ended"""

    def note_checkpoint(self, stage: str, **facts: Any) -> None:
        """A line in the journal, on rank 0 of a run; elsewhere nothing."""
        if self.journal is not None:
            self.journal.append("checkpoint", stage=stage, **facts)
