"""The names in a run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

STAGE_FOLDERS = {
    "ingest": "01_ingest",
    "reference": "02_reference",
    "refine": "03_refine",
    "reconstruct": "04_reconstruct",
    "diagnose": "05_diagnose",
}
TIMING = "timing.json"
"""How long the parts of a stage took: the one file of a stage that differs between two runs of the same job."""


@dataclass(frozen=True)
class RunFolder:
    """A run folder; every path in it has its name here and nowhere else."""

    path: Path

    @property
    def job(self) -> Path:
        """The job file as given."""
        return self.path / "job.toml"

    @property
    def resolved(self) -> Path:
        """The job with every default written out and absolute paths; what ``resume`` goes by."""
        return self.path / "resolved.toml"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def journal(self) -> Path:
        return self.path / "journal.jsonl"

    @property
    def lock(self) -> Path:
        return self.path / "lock.json"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def result(self) -> Path:
        return self.path / "result"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def stage(self, name: str) -> Path:
        return self.path / STAGE_FOLDERS[name]

    def holds_a_run(self) -> bool:
        return self.journal.exists() or self.resolved.exists() or self.manifest.exists()
