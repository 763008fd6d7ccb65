"""Slurm's expedited requeue: ``sbatch --requeue=expedite``, since version 25.11.

After a node failure, or a failure of the script together with one of an epilog, the job restarts at once with the
highest priority, and its nodes are kept for it. A checkpoint before the wall time limit is no failure: the script then
requeues the job as without this option.
"""

from __future__ import annotations

import re
import shutil
import subprocess

from cryoiso.core.config import LaunchSection
from cryoiso.core.errors import UsageError

SINCE = (25, 11)


def require_expedited_requeue(section: LaunchSection) -> None:
    """Stops where sbatch would refuse the script.

    Raises:
        UsageError: another batch system, no requeueing at all, or an older Slurm on this machine.
    """
    if section.scheduler != "slurm":
        raise UsageError(f"launch.expedite is an option of Slurm, not of {section.scheduler}", code="options-conflict")
    if not section.requeue:
        raise UsageError("launch.expedite needs launch.requeue", code="options-conflict")
    version = _slurm_version()
    if version is not None and version < SINCE:
        raise UsageError(
            f"launch.expedite needs Slurm 25.11 or later; this is {version[0]}.{version[1]:02d}. Leave it out",
            code="options-conflict",
        )


def _slurm_version() -> tuple[int, int] | None:
    """Of the sbatch of this machine; None where there is none, or it does not tell."""
    if shutil.which("sbatch") is None:
        return None
    try:
        done = subprocess.run(["sbatch", "--version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"slurm\S* (\d+)\.(\d+)", done.stdout)
    return (int(match[1]), int(match[2])) if match else None
