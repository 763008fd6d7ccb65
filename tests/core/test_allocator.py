"""Memory that was freed goes back to the system where the program asks for it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import numpy as np
import pytest

from cryoiso.refine import batches
from cryoiso.refine.batches import READS_BETWEEN_RETURNS, BatchReader

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="LOUD: no glibc")


SCRIPT = """
import numpy as np
from pathlib import Path
from cryoiso.core.allocator import return_free_memory

def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

before = resident_mib()
blocks = [np.ones(100_000, np.uint8) for _ in range(2000)]
kept = blocks[::10]
del blocks
held = resident_mib() - before
return_free_memory()
print(held, resident_mib() - before)
"""


@needs_glibc
@pytest.mark.parametrize("environment", [{}, {"MALLOC_TRIM_THRESHOLD_": "1000000000"}])
def test_what_is_free_between_kept_blocks_goes_back_unless_the_user_sets_the_allocator(environment):
    unset = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=unset | environment, capture_output=True, text=True, check=True
    )
    held, left = map(float, done.stdout.split())
    assert held > 120, "kept blocks hold the others: else this tests nothing"
    assert left > 120 if environment else left < 60


def test_a_pass_over_images_returns_memory_as_it_goes(monkeypatch):
    returned = []
    monkeypatch.setattr(batches, "return_free_memory", lambda: returned.append(1))
    monkeypatch.setattr(BatchReader, "_holds", lambda *_: False)
    monkeypatch.setattr(BatchReader, "_prepare", lambda *_: None)
    monkeypatch.setattr(BatchReader, "_keep", lambda *_: "batch")
    reader = BatchReader(None, None, 1.0)
    for i in range(2 * READS_BETWEEN_RETURNS):
        reader.read(np.arange(i, i + 4), 5)
    assert len(returned) == 2
