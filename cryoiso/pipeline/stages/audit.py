"""The stage ``audit``: controls of the run, done by the function that was given for it (``pipeline.audit``), since each
of them is a run of stages itself."""

from __future__ import annotations

from cryoiso.core.errors import UsageError
from cryoiso.pipeline.context import RunContext
from cryoiso.pipeline.job_inputs import Inputs


def audit(run: RunContext, inputs: Inputs, *, resume: bool) -> None:
    """The controls; what an interrupted attempt left is used whether or not it is continued."""
    if run.audit is None:
        raise UsageError(
            "the controls cannot be run from here. Type 'cryoiso audit RUN' on the finished run.",
            code="options-conflict",
        )
    run.audit(run, inputs)
