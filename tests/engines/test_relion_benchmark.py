"""The disease and its cure with real RELION, at the size that takes it a minute: `benchmarks/realign_relion.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import harness
from benchmarks.realign_relion import refine


@pytest.mark.slow
@pytest.mark.relion
def test_auxiliary_particles_cure_what_preferred_views_do_to_relion(shared: Path, tmp_path: Path):
    """90 % of 300 particles are seen from the top (f1_pref; true poses: 11.9 Å)."""
    if harness.open_mpi() is None:
        pytest.skip("LOUD: no mpirun of RELION's MPI")
    bench = shared / "relion_bench"
    plain, cured = (refine(row, bench, "f1_pref", tmp_path, ranks=1) for row in ("relion", "auxiliary"))
    assert plain["top_to_side"] > 0.1 and plain["truth_A"] > 20, "RELION alone takes top views for side views"
    assert cured["top_to_side"] < 0.5 * plain["top_to_side"]
    assert cured["truth_A"] < 18 and cured["median_deg"] < plain["median_deg"]
