"""Other jobs of this user that hold a lease on a copy, for tests of scratch."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from cryoiso.io import scratch_lease


def root_of(scratch: Path) -> Path:
    return scratch_lease.own_root(scratch)


def holder(root: Path, key: str, then: str = "time.sleep(60)") -> subprocess.Popen:
    """Another job of this user that holds a lease on a copy."""
    code = (
        "import sys, time, os\nfrom pathlib import Path\nfrom cryoiso.io import scratch_lease\n"
        f"held = scratch_lease.take(Path({str(root)!r}), {key!r}, run='other')\n"
        f"(held.files / 'shard-00000.h5').write_text('x')\nprint(held._heir.pid, flush=True)\n{then}\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def gone(path: Path, limit_s: float = 20.0) -> bool:
    end = time.monotonic() + limit_s
    while path.exists() and time.monotonic() < end:
        time.sleep(0.05)
    return not path.exists()
