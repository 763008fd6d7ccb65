"""The name of this machine's processor, for people who read numbers that were measured on it."""

from __future__ import annotations

import os
from pathlib import Path


def describe(device: str) -> str:
    """Processor and threads, or the GPU."""
    if device != "cpu":
        import torch

        return torch.cuda.get_device_properties(device).name
    return f"{processor()}, {os.environ.get('OMP_NUM_THREADS') or len(os.sched_getaffinity(0))} thread(s)"


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """As the system names it."""
    try:
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return "unknown processor"
