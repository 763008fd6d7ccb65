"""One thing that was looked at, how severe it is, and what to do about it."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

from cryoiso.core.config import Job
from cryoiso.core.errors import EXIT_DONE

logger = logging.getLogger("cryoiso")
FINE, NOTE, WARNING, ERROR = "fine", "note", "warning", "error"
LEVELS = (FINE, NOTE, WARNING, ERROR)
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    check: str
    severity: str
    found: str
    remedy: str = ""
    exit_code: int = EXIT_DONE
    """what the program ends with if this is an error"""
    code: str = ""
    """of an error: a key of ``core.error_codes.CODES``"""

    def line(self) -> str:
        return self.found + (f". {self.remedy}" if self.remedy else "")


@dataclass(frozen=True)
class Needs:
    """What a job asks of a machine, as far as it is known beforehand."""

    job: Job
    memory_bytes: int
    """at the most, of any rank"""
    disk_bytes: int
    """at once"""
    files: int
    largest_input_bytes: int = 0
    gpu_bytes: int = 0
    first_rank_bytes: int = 0
    """more memory, of rank 0 alone"""


def worst(findings: list[Finding]) -> Finding | None:
    """The first of the most severe findings."""
    return max(findings, key=lambda f: (LEVELS.index(f.severity), -findings.index(f)), default=None)


def exit_code(findings: list[Finding]) -> int:
    """0 unless there is an error: then that of the first one."""
    first = worst(findings)
    return first.exit_code if first is not None and first.severity == ERROR else EXIT_DONE


def as_dicts(findings: list[Finding]) -> list[dict[str, Any]]:
    return [asdict(finding) for finding in findings]


def tell(findings: list[Finding]) -> None:
    """Warnings into the log, one line each."""
    for finding in findings:
        if finding.severity == WARNING:
            logger.warning("%s", finding.line())


def gib(value: float) -> str:
    return f"{value / GIB:.1f} GiB" if value >= 0.1 * GIB else f"{value / 2**20:.0f} MiB"
