"""Rank 0 does an errand in cryoSPARC while the others sleep; lost connections are waited out."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from cryoiso.core.errors import CryoisoError, Interrupted
from cryoiso.core.log import duration
from cryoiso.engines.cryosparc import session
from cryoiso.engines.cryosparc.errand import Errand
from cryoiso.engines.cryosparc.ledger import REFINEMENT
from cryoiso.parallel.abort import agree
from cryoiso.parallel.context import Context
from cryoiso.parallel.group_stop import StopSignal
from cryoiso.parallel.idle_wait import poll_on_root

logger = logging.getLogger("cryoiso")
LONGEST_PAUSE_S = 60.0


@dataclass(frozen=True)
class CryosparcEvent:
    """Why the ranks are woken."""

    kind: str
    """"ended", "stop" or "error\""""
    message: str = ""


def run(errand: Errand | None, comm: Context, stop_signal: StopSignal) -> None:
    """Returns when the results lie in the folder of the round (collective).

    Args:
        errand: on rank 0.

    Raises:
        CryoisoError: cryoSPARC refused something, its job failed, or it did not answer for ``cryosparc.retry_min``.
        Interrupted: a signal asked to stop; the job in cryoSPARC goes on, or was killed, by ``cryosparc.on_stop``.
    """
    watch = _CryosparcWatch(errand) if errand else None
    event = poll_on_root(comm, stop_signal, watch.look if watch else lambda _: None)
    if event.kind == "stop":
        raise Interrupted(f"stopped by a signal; {event.message}")
    agree(comm, watch.error if watch else None)


class _CryosparcWatch:
    def __init__(self, errand: Errand) -> None:
        self._errand, self._steps = errand, errand.steps()
        self._due, self._lost_since, self._losses = 0.0, 0.0, 0
        self.error: CryoisoError | None = None

    def look(self, stop: bool) -> CryosparcEvent | None:
        """One step, if it is time for one."""
        if stop:
            return CryosparcEvent("stop", self._stopped())
        if time.monotonic() < self._due:
            return None
        try:
            with session.quiet():
                pause = next(self._steps)
        except StopIteration:
            return CryosparcEvent("ended")
        except CryoisoError as error:
            return self._failed(error)
        except Exception as error:
            if session.is_lost(error):
                return self._wait()
            refused = session.explained(error, "a request")
            if refused is None:
                raise
            return self._failed(refused)
        if self._losses:
            logger.info("cryoSPARC answers again")
        self._losses, self._due = 0, time.monotonic() + pause
        return None

    def _wait(self) -> CryosparcEvent | None:
        """After a lost connection: the same again, later."""
        section, now = self._errand.order.section, time.monotonic()
        limit_s = 60 * section.retry_min
        if not self._losses:
            self._lost_since = now
            if limit_s:
                limit = duration(limit_s)
                logger.warning("cryoSPARC does not answer; trying again for %s. Its jobs go on meanwhile", limit)
        if now - self._lost_since >= limit_s:
            return self._failed(
                CryoisoError(
                    f"cryoSPARC has not answered for {duration(now - self._lost_since)} (cryosparc.retry_min). Its "
                    "jobs go on; resume takes them up where they are",
                    code="cryosparc-unreachable",
                )
            )
        self._losses += 1
        self._due = now + min(section.poll_s * 2 ** min(self._losses - 1, 10), LONGEST_PAUSE_S)
        self._steps = self._errand.steps()
        return None

    def _failed(self, error: CryoisoError) -> CryosparcEvent:
        self.error = error
        return CryosparcEvent("error")

    def _stopped(self) -> str:
        """What becomes of the job in cryoSPARC, in words."""
        errand = self._errand
        uid = errand.ledger.jobs.get(REFINEMENT)
        name = f"cryoSPARC job {errand.order.section.project}-{uid}"
        if errand.order.section.on_stop == "leave":
            return f"{name} goes on, and resuming takes its result" if uid else "no cryoSPARC job was queued yet"
        try:
            return errand.kill()
        except Exception as error:
            logger.debug("the job could not be killed (%s)", type(error).__name__)
            return f"{name} could not be killed: kill it there"
