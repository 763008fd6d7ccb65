"""Sends batch scripts to the batch system, one after the other."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

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
    if scheduler == "slurm":
        wait = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []
        return ["sbatch", "--parsable", *wait, str(script)]
    if scheduler == "pbs":
        return ["qsub", *(["-W", f"depend=afterok:{after}"] if after else []), str(script)]
    if scheduler == "lsf":
        return ["bsub", *(["-w", f"done({after})"] if after else [])]
    raise UsageError(f"--submit: there is no batch system to submit to; start it with 'bash {script}'")


def in_words(scheduler: str, script: Path, after: str = "") -> str:
    """What a person would type to submit, or start, a script."""
    if scheduler == "mpirun":
        return f"bash {shlex.quote(str(script))}"
    words = shlex.join(submit_command(scheduler, script, after))
    return f"{words} < {shlex.quote(str(script))}" if scheduler == "lsf" else words


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
                f"'{command[0]}' is not on this machine; submit {script} from a login node, or set launch.scheduler"
            )
        jobs.append(_job_id(scheduler, command, script))
    return jobs


def _job_id(scheduler: str, command: list[str], script: Path) -> str:
    try:
        with open(script, encoding="utf-8") as stream:
            done = subprocess.run(
                command, stdin=stream if scheduler == "lsf" else subprocess.DEVNULL, capture_output=True, text=True,
                timeout=_TIMEOUT_S, env=outside_launcher(), check=False,
            )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise CryoisoError(
            f"{command[0]} has not answered for {_TIMEOUT_S:.0f} s; look whether {script} is queued"
        ) from None
    said = done.stdout.strip()
    found = {"slurm": r"^(\d+)", "pbs": r"^(\S+)$", "lsf": r"Job <(\d+)>"}[scheduler]
    number = re.search(found, said, flags=re.MULTILINE)
    if done.returncode != 0 or number is None:
        raise CryoisoError(f"{command[0]} did not take {script}: {done.stderr.strip() or said or 'no reason given'}")
    return number[1]
