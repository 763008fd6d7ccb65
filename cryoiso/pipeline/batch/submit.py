"""Sends batch scripts to the batch system, one after the other."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

from cryoiso.core.batch_system import BY_KEY, Submission
from cryoiso.core.errors import CryoisoError, MissingError, UsageError
from cryoiso.parallel.mpi_probe import outside_launcher

_TIMEOUT_S = 120.0


def submit_command(scheduler: str, script: Path, after: str = "") -> list[str]:
    """The command that submits a script; for LSF the script comes on its standard input.

    Args:
        after: job id that must have ended well before.

    Raises:
        UsageError: there is no batch system.
    """
    how = _submission(scheduler)
    if how is None:
        raise UsageError(
            f"--submit: there is no batch system to submit to; start it with 'bash {script}'", code="options-conflict"
        )
    wait = [word.format(job=after) for word in how.after] if after else []
    return [*how.command, *wait, *([] if how.script_on_stdin else [str(script)])]


def _submission(scheduler: str) -> Submission | None:
    system = BY_KEY.get(scheduler)
    return None if system is None else system.submission


def in_words(scheduler: str, script: Path, after: str = "") -> str:
    """What a person would type to submit, or start, a script."""
    how = _submission(scheduler)
    if how is None:
        return f"bash {shlex.quote(str(script))}"
    words = shlex.join(submit_command(scheduler, script, after))
    return f"{words} < {shlex.quote(str(script))}" if how.script_on_stdin else words


def submit(scheduler: str, scripts: list[Path]) -> list[str]:
    """Submits the scripts, each to run when the one before has ended well; returns their job ids.

    Raises:
        UsageError: there is no batch system.
        MissingError: its program is not here.
        CryoisoError: it refused; has its own words.
    """
    jobs: list[str] = []
    for script in scripts:
        command = submit_command(scheduler, script, jobs[-1] if jobs else "")
        if shutil.which(command[0]) is None:
            raise MissingError(
                f"'{command[0]}' is not on this machine; submit {script} from a login node, or set launch.scheduler",
                code="program-missing",
            )
        jobs.append(_job_id(scheduler, command, script))
    return jobs


def _job_id(scheduler: str, command: list[str], script: Path) -> str:
    how = _submission(scheduler)
    assert how is not None  # or there is no command
    try:
        with open(script, encoding="utf-8") as stream:
            done = subprocess.run(
                command, stdin=stream if how.script_on_stdin else subprocess.DEVNULL, capture_output=True, text=True,
                timeout=_TIMEOUT_S, env=outside_launcher(), check=False,
            )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise CryoisoError(
            f"no answer from {command[0]} for {_TIMEOUT_S:.0f} s. Check whether {script} is queued",
            code="submission-failed",
        ) from None
    said = done.stdout.strip()
    number = re.search(how.job_id, said, flags=re.MULTILINE)
    if done.returncode != 0 or number is None:
        raise CryoisoError(
            f"{command[0]} rejected {script}: {done.stderr.strip() or said or 'no reason given'}",
            code="submission-failed",
        )
    return number[1]
