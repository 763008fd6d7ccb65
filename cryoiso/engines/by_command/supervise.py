"""One start of the user's program: rank 0 follows it, and it never outlives the job."""

from __future__ import annotations

import logging
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

from cryoiso.core.errors import CryoisoError, Interrupted
from cryoiso.core.log import duration
from cryoiso.engines.process import Program, clean_environment, describe_status
from cryoiso.parallel.abort import agree
from cryoiso.parallel.context import Context
from cryoiso.parallel.group_stop import StopSignal
from cryoiso.parallel.idle_wait import poll_on_root

logger = logging.getLogger("cryoiso")
LOG = "command.log"
TAIL = 2000
"""Characters of its output that an error shows."""


@dataclass(frozen=True)
class CommandStart:
    """What to start, the same on every rank."""

    words: list[str]
    folder: Path
    site_launcher: bool
    silence_s: float
    """longest time without output; 0: any"""
    limit_s: float
    """longest time; 0: any"""


@dataclass(frozen=True)
class CommandEvent:
    """Why the ranks are woken."""

    kind: str
    """"ended", "stop" or "error\""""
    message: str = ""


def run(start: CommandStart, comm: Context, stop_signal: StopSignal) -> None:
    """Starts the program and returns when it has ended well (collective).

    Raises:
        MissingError: there is no such program.
        CryoisoError: it failed, fell silent or took too long; nothing of it is left by then.
        Interrupted: a signal asked to stop.
    """
    watch = _CommandWatch(start) if comm.rank == 0 else None
    try:
        agree(comm, watch.begin() if watch else None)
        event = poll_on_root(comm, stop_signal, watch.look if watch else lambda _: None)
        if event.kind == "stop":
            raise Interrupted("stopped by a signal; the command was ended")
        if event.kind == "error":
            agree(comm, CryoisoError(event.message, code="command-failed"))
    finally:
        if watch:
            watch.end()


class _CommandWatch:
    def __init__(self, start: CommandStart) -> None:
        self._start, self._began = start, time.monotonic()
        self._program: Program | None = None

    def begin(self) -> CryoisoError | None:
        start = self._start
        logger.info("starting: %s", shlex.join(start.words))
        try:
            self._program = Program(
                start.words, start.folder / LOG, folder=start.folder,
                environment=clean_environment(keep_allocation=start.site_launcher),
            )  # fmt: skip
        except CryoisoError as error:
            return error
        return None

    def look(self, stop: bool) -> CommandEvent | None:
        program, start = self._program, self._start
        if stop or program is None:
            return CommandEvent("stop")
        status = program.status()  # before its output: what it wrote last is seen
        program.output()
        if status is not None:
            return CommandEvent("ended") if status == 0 else self._error(describe_status(status))
        if start.limit_s and time.monotonic() - self._began > start.limit_s:
            return self._error(f"ran for more than {duration(start.limit_s)} and was ended (command.limit_min)")
        if start.silence_s and program.silent_s() > start.silence_s:
            silent = duration(program.silent_s())
            return self._error(f"has written nothing for {silent} and was ended (command.timeout_min)")
        return None

    def _error(self, what: str) -> CommandEvent:
        log = self._start.folder / LOG
        tail = log.read_text(encoding="utf-8", errors="replace")[-TAIL:].strip()
        return CommandEvent("error", f"the command {what}: {shlex.join(self._start.words)}\n{tail}\nSee {log}")

    def end(self) -> None:
        """Nothing of the program is left on this host."""
        if self._program is not None:
            self._program.stop()
