"""One start of RELION: rank 0 follows it, all ranks serve its callbacks, and it never outlives the job."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryoiso.core.errors import EXIT_OTHER, CryoisoError, Interrupted, with_code
from cryoiso.core.log import duration, indented
from cryoiso.core.progress import board
from cryoiso.core.types import HALVES
from cryoiso.engines.process import Program, describe_status
from cryoiso.engines.relion.callback import ADDRESS_FILE, VARIABLE, write_script
from cryoiso.engines.relion.external import ReconstructionTask, read_task
from cryoiso.engines.relion.progress_parser import RelionProgress
from cryoiso.engines.relion.serve import Setting, serve
from cryoiso.parallel.abort import agree
from cryoiso.parallel.context import Context
from cryoiso.parallel.group_stop import StopSignal
from cryoiso.parallel.idle_wait import poll_on_root
from cryoiso.parallel.rendezvous_address import candidates
from cryoiso.parallel.task_socket import Call, TaskServer

logger = logging.getLogger("cryoiso")
LOG = "run.log"
TELL_EVERY_S = 60.0
ONE_HALF_LIMIT_S = 3600.0
"""RELION reconstructs both halves at the same time; its arrays may take minutes to write."""


@dataclass(frozen=True)
class RelionEvent:
    """Why the ranks are woken."""

    kind: str
    """"tasks", "ended", "stop" or "error\""""
    tasks: dict[int | None, ReconstructionTask] = field(default_factory=dict)
    step_deg: float = 360.0
    message: str = ""
    code: str = ""
    """of an error"""
    status: int = 0


@dataclass
class RelionStart:
    """What to start, the same on every rank."""

    command: list[str]
    folder: Path
    """where RELION runs"""
    environment: Callable[[dict[str, str]], dict[str, str]]
    setting: Setting | None
    """None: no callback"""
    elsewhere: bool = False
    """RELION may run on other hosts than rank 0"""
    silence_s: float = 0.0
    """longest time without output; 0: any"""
    step_of: Callable[[int], float | None] = lambda iteration: None
    """angular sampling of an iteration from RELION's files, where its output did not tell"""
    piece_of: Callable[[int, bool], tuple[int, int]] = lambda iteration, last: (iteration, iteration + 1)
    """which of how many iterations in all this is, from 0; is told whether RELION calls it the last"""
    iteration_began: Callable[[int], None] = lambda iteration: None
    """called on rank 0"""
    note: Callable[[int, dict[str, Any]], None] = lambda iteration, facts: None
    """called on rank 0 with what a callback did, before RELION gets its answer"""


def run(start: RelionStart, comm: Context, stop_signal: StopSignal) -> None:
    """Starts RELION and returns when it has ended well (collective).

    Raises:
        CryoisoError: RELION failed or fell silent, or a callback failed; RELION is gone by then.
        Interrupted: a signal asked to stop.
    """
    watch = _RelionWatch(start) if comm.rank == 0 else None
    try:
        agree(comm, watch.begin() if watch else None)
        while True:
            event = poll_on_root(comm, stop_signal, watch.look if watch else lambda _: None)
            if event.kind == "ended":
                return
            if event.kind == "stop":
                raise Interrupted("stopped by a signal; RELION was ended after its last complete iteration")
            if event.kind == "error":
                agree(comm, CryoisoError(event.message, code=event.code))
            assert start.setting is not None
            with watch.at_work(comm) if watch else nullcontext():
                facts = serve(event.tasks, event.step_deg, start.setting, comm)
            if watch:
                iteration = next(iter(event.tasks.values())).name.iteration
                if iteration is not None and facts is not None:
                    start.note(iteration, facts)  # before RELION can end the iteration
                watch.answer()
    finally:
        if watch:
            watch.end()


class _RelionWatch:
    """Rank 0's view of a running RELION."""

    def __init__(self, start: RelionStart) -> None:
        self._start = start
        self._program: Program | None = None
        self._server: TaskServer | None = None
        self._calls: dict[int | None, tuple[ReconstructionTask, Call]] = {}
        self._first_call = 0.0
        self._warned = 0
        self._progress = RelionProgress()
        self._told = time.monotonic()

    def begin(self) -> CryoisoError | None:
        start, extra = self._start, {"OMPI_MCA_mpi_yield_when_idle": "1"}
        try:
            if start.setting is not None:
                address_file = start.folder / ADDRESS_FILE
                self._server = TaskServer(address_file, candidates(False) if start.elsewhere else ())
                extra[VARIABLE] = write_script(start.folder / "callback.sh", address_file)
            self._program = Program(
                start.command, start.folder / LOG, folder=start.folder, environment=start.environment(extra)
            )
        except CryoisoError as error:
            return error
        return None

    def look(self, stop: bool) -> RelionEvent | None:
        """What to wake the ranks for, if anything."""
        try:
            return self._look(stop)
        except CryoisoError as error:
            return RelionEvent("error", message=str(error), code=error.code)

    def _look(self, stop: bool) -> RelionEvent | None:
        program = self._program
        if stop or program is None:
            return RelionEvent("stop")
        status = program.status()  # before its output: what it wrote last is seen
        self._follow(program.output())
        if status is not None:
            return self._ended(status)
        self._collect()
        if set(self._calls) in ({None}, set(HALVES)):
            task = next(iter(self._calls.values()))[0]
            return RelionEvent("tasks", {half: call[0] for half, call in self._calls.items()}, self._step(task))
        if self._calls and time.monotonic() - self._first_call > ONE_HALF_LIMIT_S:
            task = next(iter(self._calls.values()))[0]
            return RelionEvent(
                "error", message=f"RELION called for half {task.name.half} of iteration {task.name.iteration} and not "
                f"for the other half within {duration(ONE_HALF_LIMIT_S)}; it was ended. See {program.log}",
                code="relion-half-not-called",
            )  # fmt: skip
        if self._start.silence_s and program.silent_s() > self._start.silence_s:
            return RelionEvent(
                "error", message=f"RELION has written nothing for {duration(program.silent_s())} and was ended "
                f"(relion.timeout_min). See {program.log}",
                code="relion-silent",
            )  # fmt: skip
        return None

    def _follow(self, text: str) -> None:
        for iteration in self._progress.feed(text):
            resolution = self._progress.resolution_A
            logger.info(
                "RELION: iteration %d%s begins%s", iteration, ", the last," if self._progress.last else "",
                f", resolution {resolution:.2f} Å" if resolution else "",
            )  # fmt: skip
            self._told = time.monotonic()
            self._start.iteration_began(iteration)
        for option in self._progress.unknown[self._warned :]:
            logger.warning("RELION says that it does not know the option %s (relion.extra)", option)
        self._warned = len(self._progress.unknown)
        self._note_progress()
        now, left = time.monotonic(), self._progress.left_s
        if left and now - self._told > TELL_EVERY_S:
            self._told = now
            logger.info("RELION: iteration %d: about %s of its search left", self._progress.iteration, duration(left))

    def _note_progress(self) -> None:
        """How far RELION is, for whoever predicts the stage's end."""
        seen = self._progress
        if seen.iteration > 0:
            label = f"RELION's iteration {seen.iteration}"
            board.expect(*self._start.piece_of(seen.iteration, seen.last))
            board.open(label)
            if seen.share > 0:
                board.note(label, round(1000 * seen.share), 1000)

    def _collect(self) -> None:
        """Takes calls of RELION in; of an iteration both halves are needed."""
        if self._server is None:
            return
        for call in self._server.look():
            star = Path(str(call.task.get("star", "")))
            if star.parent.resolve() != self._start.folder.resolve():
                call.answer(False, f"{star} is not of this run", "relion-callback-failed")
                continue
            task = read_task(Path(star.name), self._start.folder)
            others = [known for known, _ in self._calls.values() if known.name.iteration != task.name.iteration]
            if task.name.half in self._calls or others:
                raise CryoisoError(
                    f"RELION called out of turn: {star.name} while {others or 'the same'} is waiting",
                    code="relion-callback-failed",
                )
            self._first_call = self._first_call if self._calls else time.monotonic()
            task.result.unlink(missing_ok=True)  # whatever is there afterwards was made for this call
            self._calls[task.name.half] = (task, call)

    def _step(self, task: ReconstructionTask) -> float:
        step = self._progress.step_deg if self._progress.iteration == task.name.iteration else None
        step = step or self._start.step_of(task.name.iteration or 0)
        return 360.0 if step is None else step

    def _ended(self, status: int, when: str = "") -> RelionEvent:
        if status == 0 and not when:
            return RelionEvent("ended")
        log = self._start.folder / LOG
        said = f": {self._progress.error}" if self._progress.error else ""
        message = f"RELION {describe_status(status)}{when}{said}. See {log}"
        return RelionEvent("error", message=message, code="relion-failed", status=status)

    @contextmanager
    def at_work(self, comm: Context) -> Iterator[None]:
        """While all ranks work for RELION nobody looks after it; should it end, a thread ends them.

        A correction may take hours, which would be for nothing.
        """
        over = threading.Event()

        def look() -> None:
            while not over.wait(0.5):
                if self._program is not None and (status := self._program.status()) is not None:
                    event = self._ended(status, " while its references were corrected")
                    sys.stderr.write(f"error: {indented(with_code(event.message, event.code))}\n")
                    sys.stderr.flush()
                    time.sleep(0.3)  # a launcher that ends the ranks may throw away what it has not passed on yet
                    comm.abort(EXIT_OTHER)

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def answer(self) -> None:
        """The results are there: RELION goes on."""
        for _, call in self._calls.values():
            call.answer(True)
        self._calls.clear()
        if self._program is not None:
            self._program.excuse()

    def end(self) -> None:
        """Nothing of RELION is left on this host, and nobody waits for an answer."""
        if self._program is not None:
            self._program.stop()
        for _, call in self._calls.values():
            call.answer(False, "the run was ended", "ranks-unreachable")
        if self._server is not None:
            self._server.close()
