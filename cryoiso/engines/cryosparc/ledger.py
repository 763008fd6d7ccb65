"""What is known of the jobs of one round, on disk before and after everything that cryoSPARC is asked to make.

A job is made in three steps: the wish is noted, cryoSPARC is asked, its answer is noted. Where the answer was lost, the
wish is there, and the job is looked for by the mark in its description before another one is asked for.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryoiso.core.errors import CryoisoError
from cryoiso.io.atomic import write_text

PARTICLES, REFINEMENT = "particles", "refinement"
"""The two jobs: the external one that holds particles and maps, and the refinement."""


@dataclass
class JobLedger:
    """The file ``cryosparc.json`` of a round."""

    file: Path
    mark: str = field(default_factory=lambda: f"cryoiso-{secrets.token_hex(8)}")
    """Stands in the description of the jobs."""
    project: str = ""
    asked: list[str] = field(default_factory=list)
    """Jobs that cryoSPARC was asked to make."""
    jobs: dict[str, str] = field(default_factory=dict)
    """Job -> its uid in the project, e.g. J42."""
    uploaded: list[str] = field(default_factory=list)
    version: str = ""
    """Of the cryoSPARC that ran the refinement."""

    @classmethod
    def read(cls, file: Path) -> JobLedger:
        """The file, or a new one.

        Raises:
            CryoisoError: it cannot be read.
        """
        if not file.exists():
            return cls(file)
        try:
            facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return cls(file, **facts)
        except (ValueError, TypeError):
            raise CryoisoError(
                f"{file}: not a record of cryoSPARC jobs. Without it a second job would be queued: restore it, or "
                "start without --resume",
                code="cryosparc-result-invalid",
            ) from None

    def save(self) -> None:
        """Writes it atomically."""
        facts = {name: value for name, value in vars(self).items() if name != "file"}
        write_text(self.file, json.dumps(facts, indent=1) + "\n")

    def note_asked(self, job: str) -> None:
        """Before cryoSPARC is asked to make a job."""
        if job not in self.asked:
            self.asked.append(job)
            self.save()

    def note_job(self, job: str, uid: str) -> None:
        """After it has answered."""
        self.jobs[job] = uid
        self.save()

    def note_uploaded(self, name: str) -> None:
        self.uploaded.append(name)
        self.save()

    def note_cleared(self) -> None:
        """The files of the external job are gone."""
        self.uploaded = []
        self.save()
