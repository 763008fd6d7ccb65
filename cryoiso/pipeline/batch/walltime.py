"""When the batch job ends, as far as the batch system tells. Best effort: it never waits long and never fails."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryoiso.core.batch_system import LSF, PBS, SLURM, SYSTEMS, current

ASK_S = 5.0
"""A batch system that has not answered by then is not asked again."""
Ask = Callable[[list[str]], str]
END = "CRYOISO_END_TIME"


@dataclass(frozen=True)
class End:
    """The end of this job."""

    time_s: float
    """seconds since the epoch"""
    source: str
    """who said so"""


def job_end(env: Mapping[str, str] | None = None, ask: Ask | None = None, now: float | None = None) -> End | None:
    """The job's end by the environment, else by the batch system's programs; None if nobody knows.

    CRYOISO_END_TIME, which our batch scripts export and which may be set by hand, and a system's own variable are
    seconds since the epoch.
    """
    env, ask, now = os.environ if env is None else env, ask or _ask, time.time() if now is None else now
    for name in (END, *(system.end for system in SYSTEMS if system.end)):
        seconds = _number(env.get(name, ""))
        if seconds is not None:
            return End(seconds, name)
    system = current(env)
    query = None if system is None else QUERIES.get(system.key)
    return None if system is None or query is None else query(env[system.variables["job"]], env, ask, now)


def _slurm(job: str, env: Mapping[str, str], ask: Ask, now: float) -> End | None:
    end = _date(ask(["squeue", "-h", "-j", job, "-o", "%e"]).strip())
    if end is not None:
        return End(end, "squeue")
    match = re.search(r"\bEndTime=(\S+)", ask(["scontrol", "show", "job", job]))
    end = _date(match[1]) if match else None
    return None if end is None else End(end, "scontrol")


def _pbs(job: str, env: Mapping[str, str], ask: Ask, now: float) -> End | None:
    status = ask(["qstat", "-f", job])
    if match := re.search(r"Walltime\.Remaining\s*=\s*(\d+)", status):
        return End(now + float(match[1]), "qstat")
    limit = re.search(r"Resource_List\.walltime\s*=\s*(\S+)", status)
    start = re.search(r"\bstime\s*=\s*(.+)", status)
    began = _date(start[1].strip(), "%a %b %d %H:%M:%S %Y") if start else None
    if limit and began is not None:
        return End(began + _hours(limit[1]), "qstat")
    seconds = _number(env.get("PBS_WALLTIME", ""))
    return None if seconds is None else End(_session_began(now) + seconds, "PBS_WALLTIME")


def _lsf(job: str, env: Mapping[str, str], ask: Ask, now: float) -> End | None:
    match = re.search(r"(\d+):(\d+)", ask(["bjobs", "-noheader", "-o", "time_left", job]))
    return End(now + 3600 * int(match[1]) + 60 * int(match[2]), "bjobs") if match else None


QUERIES = {SLURM.key: _slurm, PBS.key: _pbs, LSF.key: _lsf}
"""(job number, environment, how to ask a program, now) -> its end."""


def _ask(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        return ""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=ASK_S, stdin=subprocess.DEVNULL).stdout
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return ""


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text.strip()) else None


def _date(text: str, form: str = "%Y-%m-%dT%H:%M:%S") -> float | None:
    """Local time to seconds since the epoch; None for N/A, Unknown and the like."""
    try:
        return datetime.strptime(text, form).timestamp()
    except ValueError:
        return None


def _hours(text: str) -> float:
    """[[hours:]minutes:]seconds."""
    total = 0.0
    for part in text.split(":"):
        total = 60 * total + (float(part) if part.isdigit() else 0.0)
    return total


def _session_began(now: float) -> float:
    """When this process's session began: about when the batch job did."""
    try:
        ticks = float(Path(f"/proc/{os.getsid(0)}/stat").read_text().rsplit(")", 1)[1].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, IndexError, ValueError):
        return now
    return now - uptime + ticks / os.sysconf("SC_CLK_TCK")
