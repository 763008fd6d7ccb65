"""External programs: started with an argument list, followed through a log file, ended with the job.

A program's output goes straight into a file, which is read as it grows: no pipe can fill up and block the program, and
nobody waits in a read. The program has a session of its own, and a watchdog (``watchdog.py``) ends that session as soon
as this process is gone, even if it was killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from cryoiso.core.batch_system import SYSTEMS
from cryoiso.core.errors import MissingError
from cryoiso.engines import watchdog

_MPI = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "HYDRA_", "HYDI_", "MPI_LOCAL", "MPIR_", "PALS_", "MV2_COMM", "ORTE_")
_MEANT_BY_USER = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_MCA_", "PRTE_MCA_")


def clean_environment(extra: Mapping[str, str] | None = None, *, keep_allocation: bool = False) -> dict[str, str]:
    """This process's environment as a new MPI program needs it: without what the launcher of this one put there.

    With it, an inner ``mpirun`` would take itself for a rank of the outer one, or hand its ranks to the outer Slurm
    step and hang there.

    Args:
        extra: variables to add.
        keep_allocation: leave the batch system's description of the allocation (SLURM_JOB_*, ...), for launchers of
            the site such as ``srun``; what describes the step and rank of this process goes all the same.
    """
    gone: tuple[str, ...] = _MPI
    for system in SYSTEMS:
        gone += system.step if keep_allocation or not system.prefix else (system.prefix,)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(gone) or _by_user(k)}
    return {**kept, **(extra or {})}


def _by_user(name: str) -> bool:
    """Settings of Open MPI that users make; those that its launcher makes for its ranks are not among them."""
    return name.startswith(_MEANT_BY_USER) and not name.startswith(("OMPI_MCA_orte_", "OMPI_MCA_ess", "OMPI_MCA_pmix"))


class Program:
    """A running external program."""

    def __init__(
        self, command: Sequence[str], log: Path, *, folder: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        """Starts it.

        Args:
            command: program and arguments, no shell.
            log: takes its standard output and error, after what is there.
            folder: its working folder.
            environment: default: ``clean_environment()``.

        Raises:
            MissingError: there is no such program.
        """
        self.command, self.log = list(command), log
        self._read_to = log.stat().st_size if log.exists() else 0
        self._last_output = time.monotonic()
        self._swept = False
        env = dict(clean_environment() if environment is None else environment)
        try:
            with open(log, "ab") as out:
                self._child = subprocess.Popen(
                    self.command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, cwd=folder, env=env,
                    start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            raise MissingError(f"{command[0]} cannot be started: {error.strerror}", code="program-missing") from None
        self._watchdog = subprocess.Popen(
            [sys.executable, "-I", "-S", watchdog.__file__, str(self._child.pid)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def status(self) -> int | None:
        """None while it runs, then its exit status; negative: the signal that ended it.

        Where it failed, nothing that it started is left on this host: a launcher that was killed leaves its ranks.
        """
        status = self._child.poll()
        if status is not None:
            if status and not self._swept:
                watchdog.end_session(self._child.pid, 2.0)
            self._swept = True
            self._dismiss_watchdog()
        return status

    def output(self) -> str:
        """What it has written since the last call; returns at once."""
        with open(self.log, "rb") as stream:
            stream.seek(self._read_to)
            new = stream.read()
        if new:
            self._read_to += len(new)
            self._last_output = time.monotonic()
        return new.decode(errors="replace")

    def silent_s(self) -> float:
        """Seconds since ``output`` last had anything, or since ``excuse``."""
        return time.monotonic() - self._last_output

    def excuse(self) -> None:
        """Its silence up to now was not its fault: it waited for us."""
        self._last_output = time.monotonic()

    def stop(self, grace_s: float = 5.0) -> None:
        """Ends it and all that it started on this host; returns when they are gone."""
        if self._child.poll() is None:
            watchdog.end_session(self._child.pid, grace_s)
            self._child.wait()
        self._dismiss_watchdog()

    def _dismiss_watchdog(self) -> None:
        if self._watchdog.poll() is None:
            self._watchdog.kill()
            self._watchdog.wait()
        if self._watchdog.stdin is not None:
            self._watchdog.stdin.close()

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def describe_status(status: int) -> str:
    """An exit status in words.

    >>> describe_status(1), describe_status(-9)
    ('ended with status 1', 'was ended by SIGKILL')
    """
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"
