"""One refinement in cryoSPARC as a sequence of steps that can be begun again at any point.

Every step looks first at what is there already, in the ledger or in cryoSPARC. So a lost connection, a signal and a
killed program are one case: the sequence starts anew and does what is missing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from cryoiso.core.config import CryosparcSection
from cryoiso.core.errors import CryoisoError
from cryoiso.core.log import duration, printable
from cryoiso.engines.cryosparc import session
from cryoiso.engines.cryosparc.ledger import PARTICLES, REFINEMENT, JobLedger
from cryoiso.engines.cryosparc.order import JOB_TYPES, Order
from cryoiso.engines.cryosparc.outputs import SLOTS, filled
from cryoiso.engines.cryosparc.results import take_results
from cryoiso.engines.cryosparc.streams import file_to_send, table_to_send

logger = logging.getLogger("cryoiso")
PROGRESS_S = 300.0
"""A line of its log is repeated in ours so often."""
_ENDED_BADLY = ("failed", "killed")


class Errand:
    """Follows one order (rank 0)."""

    def __init__(self, order: Order, ledger: JobLedger) -> None:
        self.order, self.ledger, self._section = order, ledger, order.section
        self._began = False
        self._told = ("", 0.0)

    def steps(self) -> Iterator[float]:
        """Does it step by step, and yields how many seconds to wait before the next.

        Raises:
            CryoisoError: what cryoSPARC refused, or how the job ended.
            Exception: of the connection, see ``session.is_lost``; then begin again.
        """
        project = project_of(session.connect(), self._section)
        held = yield from self._particles(project)
        job = self._refinement(project, held)
        self._queue(job)
        yield from self._ended(job)
        self.ledger.version = str(getattr(job.model, "version", None) or "")
        self.ledger.save()
        asked("the results of the job", take_results, project, job, self.order)

    def kill(self) -> str:
        """Ends the refinement in cryoSPARC; what became of it, in words."""
        uid = self.ledger.jobs.get(REFINEMENT)
        if uid is None:
            return "no cryoSPARC job was queued yet"
        project_of(session.connect(), self._section).find_job(uid).kill()
        return f"cryoSPARC job {self._section.project}-{uid} was killed"

    def _particles(self, project: Any) -> Iterator[float] | Any:
        """The external job with particles and maps, complete."""
        section, ship = self._section, self.order.shipment
        self._made(
            project, PARTICLES,
            lambda text: project.create_external_job(section.workspace, title=f"{self.order.title}: input", desc=text),
        )  # fmt: skip
        uid = self.ledger.jobs[PARTICLES]
        job = asked(f"job {uid}", project.find_external_job, uid)
        if job.status == "completed":
            return job
        if job.status in _ENDED_BADLY:
            asked(f"to clear job {uid}", job.clear)
            self.ledger.note_cleared()
        if job.status == "building":
            asked(f"to start job {uid}", job.start, "running")
        files = [*ship.maps, *(ship.stacks if section.upload else ())]
        if section.upload and ship.stacks:
            asked("a folder for images", job.mkdir, "images", exist_ok=True)
        for name, path in files:
            if name not in self.ledger.uploaded:
                asked(f"the upload of {path.name}", job.upload, name, file_to_send(path), overwrite=True)
                self.ledger.note_uploaded(name)
                logger.info("cryoSPARC %s-%s: %s is there", section.project, uid, name)
                yield 0.0
        for name, (type_, slots) in SLOTS.items():
            columns = ship.columns(name, uid if section.upload else "", uid)
            if columns is None:
                continue
            if name not in job.outputs:
                asked(f"an output {name}", job.add_output, type_, name, slots)
            table = filled(asked(f"the fields of {name}", job.alloc_output, name, columns["uid"]), columns, name)
            asked(f"the {name}", job.save_output, name, table_to_send(table))
        asked(f"to end job {uid}", job.stop)
        return job

    def _refinement(self, project: Any, held: Any) -> Any:
        section, order = self._section, self.order
        kind = JOB_TYPES[order.kind]
        inputs = {name: (held.uid, name) for name in SLOTS if name in held.outputs}
        self._made(
            project, REFINEMENT,
            lambda text: project.create_job(
                section.workspace, kind, connections=inputs, params=order.params, title=order.title, desc=text
            ),
        )  # fmt: skip
        uid = self.ledger.jobs[REFINEMENT]
        job = asked(f"job {uid}", project.find_job, uid)
        if getattr(job.model, "deleted", False):
            raise CryoisoError(
                f"cryoSPARC job {section.project}-{uid} was deleted. Start without --resume for a new one",
                code="cryosparc-not-found",
            )
        return job

    def _made(self, project: Any, name: str, create: Callable[[str], Any]) -> None:
        """Makes a job unless it was made: also where the answer of an earlier request was lost."""
        ledger = self.ledger
        if name in ledger.jobs:
            return
        text = f"{ledger.mark}-{name}"
        if name in ledger.asked:
            uid = asked("its jobs", self._marked, project, text)
            if uid is not None:
                return ledger.note_job(name, uid)
        ledger.note_asked(name)
        job = asked(f"a new job in {self._section.project}-{self._section.workspace}", create, text)
        ledger.note_job(name, job.uid)

    def _marked(self, project: Any, text: str) -> str | None:
        jobs = project.find_jobs(workspace_uid=self._section.workspace, order=-1)
        return next((str(job.uid) for job in jobs if text in job.desc), None)

    def _queue(self, job: Any) -> None:
        """Queues it once; a job that had ended badly when this program began is cleared and queued again.

        The library repeats a request whose answer was lost: it may be refused because it has worked.
        """
        if job.status in _ENDED_BADLY and not self._began:
            logger.info("cryoSPARC %s: %s before; queued again", self._name(job), job.status)
            asked(f"to clear job {job.uid}", job.clear)
        self._began = True
        if job.status != "building":
            return
        lane = self._section.lane
        try:
            asked(
                f"to queue the job in lane {lane}" if lane else "to run the job on its master", job.queue, lane or None
            )
        except CryoisoError:
            if asked(f"job {job.uid}", job.refresh).status == "building":
                raise

    def _ended(self, job: Any) -> Iterator[float]:
        """Waits until it has completed.

        Raises:
            CryoisoError: it failed or was killed.
        """
        since = time.monotonic()
        while True:
            self._tell(job, since)
            if job.status == "completed":
                return
            if job.status == "failed":
                raise CryoisoError(
                    f"cryoSPARC job {self._name(job)} failed: {_reason(job)}", code="cryosparc-job-failed"
                )
            if job.status == "killed":
                raise CryoisoError(
                    f"cryoSPARC job {self._name(job)} was killed in cryoSPARC. Resume to queue it again",
                    code="cryosparc-job-failed",
                )
            yield self._section.poll_s
            asked(f"job {job.uid}", job.refresh)

    def _tell(self, job: Any, since: float) -> None:
        """A line in the log for every change of its status, and now and then one of its own lines."""
        message = getattr(job.model, "queue_message", None) if job.status == "queued" else None
        state = job.status + (f" ({printable(str(message))})" if message else "")
        now = time.monotonic()
        if state == self._told[0] and (job.status != "running" or now - self._told[1] < PROGRESS_S):
            return
        line = _last_line(job) if state == self._told[0] else ""
        self._told = (state, now)
        after = f" after {duration(now - since)}" if line else ""
        logger.info("cryoSPARC %s: %s%s%s", self._name(job), state, after, f"; {line}" if line else "")

    def _name(self, job: Any) -> str:
        return f"{self._section.project}-{job.uid}"


def project_of(cs: Any, section: CryosparcSection) -> Any:
    """The project of the section, after a look whether workspace and lane are there.

    Raises:
        CryoisoError: one of them is not (code ``cryosparc-not-found``).
    """
    project = asked(f"project {section.project}", cs.find_project, section.project)
    asked(f"workspace {section.project}-{section.workspace}", project.find_workspace, section.workspace)
    lanes = [lane.name for lane in asked("its lanes", cs.get_lanes)]
    if section.lane and section.lane not in lanes:
        raise CryoisoError(
            f"cryoSPARC has no lane '{section.lane}' (known: {', '.join(lanes) or 'none'}). Change cryosparc.lane",
            code="cryosparc-not-found",
        )
    return project


def asked(what: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The answer of cryoSPARC, or its refusal in our words."""
    try:
        return function(*args, **options)
    except Exception as error:
        if session.is_lost(error):
            raise
        refused = session.explained(error, what)
        if refused is None:
            raise
        raise refused from None


def _reason(job: Any) -> str:
    """cryoSPARC's own message."""
    errors = [str(event.message) for event in getattr(job.model, "errors_run", []) if not event.warning]
    return printable((errors[-1] if errors else "") or _last_line(job) or "it gives no reason; see its log there")


def _last_line(job: Any) -> str:
    """Last line of its log; empty where it cannot be had."""
    try:
        events = job.cs.api.jobs.get_event_logs(job.project_uid, job.uid)
    except Exception as error:  # a line of progress is not worth a job
        logger.debug("no log of the cryoSPARC job (%s)", type(error).__name__)
        return ""
    texts = [str(event.text).strip() for event in events if getattr(event, "type", "") in ("text", "warning", "error")]
    return printable(next((text for text in reversed(texts) if text), ""))[:200]
