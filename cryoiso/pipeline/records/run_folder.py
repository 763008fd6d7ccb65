"""The names in a run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cryoiso.core import products

REFINE_STAGES = ("ingest", "reference", "refine", "reconstruct", "diagnose")
"""Stages that have a folder, in the order of the workflow ``refine``."""
REALIGN_STAGES = ("ingest", "reference", "refine", "reconstruct", "correct", "diagnose")
"""Those of the workflow ``realign``: the correction in the loop is part of ``refine``."""


@dataclass(frozen=True)
class RunFolder:
    """A run folder; every path in it has its name here and nowhere else."""

    path: Path
    stages: tuple[str, ...] = REFINE_STAGES
    """The stages with a folder of the run's workflow, in order; the folders are numbered by it."""

    @property
    def job(self) -> Path:
        """The job file as given."""
        return self.path / "job.toml"

    @property
    def resolved(self) -> Path:
        """The job with every default written out and absolute paths; what ``resume`` goes by."""
        return self.path / products.RESOLVED

    @property
    def manifest(self) -> Path:
        return self.path / products.MANIFEST

    @property
    def journal(self) -> Path:
        return self.path / products.JOURNAL

    @property
    def seal(self) -> Path:
        """Hashes of everything that matters, written when the run is done."""
        return self.path / products.SEAL

    @property
    def lock(self) -> Path:
        return self.path / products.LOCK

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def result(self) -> Path:
        return self.path / "result"

    @property
    def audit(self) -> Path:
        """Folder of the controls."""
        return (self.path / products.AUDIT).parent

    @property
    def report(self) -> Path:
        return self.path / products.REPORT_PAGE

    def stage(self, name: str) -> Path:
        """Folder of a stage.

        Raises:
            KeyError: the workflow has no such stage.
        """
        return self.path / self.folder_name(name)

    def folder_name(self, name: str) -> str:
        if name not in self.stages:
            raise KeyError(name)
        return f"{self.stages.index(name) + 1:02d}_{name}"

    def has(self, name: str) -> bool:
        return name in self.stages

    def holds_a_run(self) -> bool:
        """Whether a run has begun here: ``resolved.toml`` is the last file that is written before anything is done."""
        return self.journal.exists() or self.resolved.exists()
