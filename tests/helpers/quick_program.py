"""The program ``cryoiso`` with the stand-ins of pipeline_helper, for tests that start it through a batch script.

With QUICK_WAIT=1 the first start does one iteration and then waits until it is told to stop.
"""

from __future__ import annotations

import os
import time
from typing import Any

from pipeline_helper import QuickEngine, quick_full_reconstructor, quick_reconstructor, quick_report

from cryoiso.cli.main import main


class WaitingEngine(QuickEngine):
    """Stops after its first checkpoint, as soon as a signal asks for it."""

    def refine(self, request: Any, comm: Any) -> None:
        if request.resume or os.environ.get("QUICK_WAIT") != "1":
            super().refine(request, comm)
            return
        from cryoiso.core.errors import Interrupted

        self.iterations = 1
        super().refine(request, comm)
        while not comm.stop_requested():
            time.sleep(0.05)
        raise Interrupted("stopped by a signal")


def with_stand_ins() -> None:
    import cryoiso.report
    from cryoiso.pipeline.stages import engines

    engines.engine = lambda name: WaitingEngine()  # type: ignore[assignment]
    engines.reconstructor = lambda: quick_reconstructor  # type: ignore[assignment]
    engines.full_reconstructor = lambda: quick_full_reconstructor  # type: ignore[assignment]
    cryoiso.report.publish = quick_report  # type: ignore[assignment]


if __name__ == "__main__":
    with_stand_ins()
    main()
