"""Peak memory of whole commands, in bytes per particle: no more than `plan` counts on.

Without what has a limit of its own: cached images (1 GiB) and search results that wait to be written (64 MiB).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.repeated_set import repeat, simulate
from cryoiso.pipeline.planning import memory

BOX, PIXEL_A, DISTINCT = 16, 12.0, 2_000
FEW, MANY = 4_000, 44_000
PEAK = """
import resource, sys
from cryoiso.cli.main import main
from cryoiso.refine import refinement_setup, search_cache
refinement_setup.room_for_batches = lambda device: 0
search_cache.EVERY_S = 0.0
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, file=open(sys.argv[-1] + ".peak", "w"))
"""


def peak_bytes(folder: Path, command: str, star: Path, *options: object) -> int:
    out = folder / f"{command}-{star.parent.name}"
    words = [sys.executable, "-c", PEAK, command, star, *options]
    words += ["--out", out] if command != "ingest" else [out]
    subprocess.run(list(map(str, words)), check=True, capture_output=True)
    return int(out.with_name(f"{out.name}.peak").read_text())


@pytest.fixture(scope="module")
def stars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    simulate(DISTINCT, BOX, PIXEL_A, folder / "small")
    return {n: repeat(folder / "small", n // DISTINCT, folder / str(n)) for n in (FEW, MANY)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "expected"),
    [("ingest", memory.ROW_BYTES), ("reconstruct", memory.ROW_BYTES),
     ("refine", memory.REFINED_ROW_BYTES)],
)  # fmt: skip
def test_memory_grows_by_what_plan_counts_on(stars, tmp_path, command, expected):
    options = {
        "ingest": (), "reconstruct": ("--symmetry", "C3"),
        "refine": ("--ref", stars[FEW].parents[1] / "small/truth_map.mrc", "--symmetry", "C3", "--lowpass", 40,
                   "--local", 5, "--shift-range", 12, "--max-iterations", 1, "--device", "cpu"),
    }[command]  # fmt: skip
    few, many = (peak_bytes(tmp_path, command, stars[n], *options) for n in (FEW, MANY))
    each = (many - few) / (MANY - FEW)
    print(f"{command}: {each:.0f} B per particle, {expected:.0f} planned")
    assert each < memory.MEMORY_MARGIN * expected
