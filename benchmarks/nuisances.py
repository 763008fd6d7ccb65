"""Refinement of sets with nuisances, without and with the engine's answer to each, against the truth, over seeds.

Sets are in nuisance_sets.py, ways to refine them in nuisance_rows.py, further scores in nuisance_scores.py; the rest
is that of views.py: sets are prepared once under --work, records go to --out, and those that are there with the same
settings are left out. Without --sets and --rows, all of PLAN is measured, first seed first.

    python benchmarks/nuisances.py --work sets --sets HA_plain,HA_scale --rows "plain,scale particle" --seeds 3
    python benchmarks/nuisances.py --tables
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness, nuisance_rows, nuisance_scores, nuisance_sets, nuisance_tables, views

ROWS_OF = {
    "plain": ("plain", "scale particle", "mask noise", "junk"),
    "ice_by_view": ("plain", "scale particle", "known"),
    "scale": ("plain", "scale particle", "known"),
    "bfactor": ("plain", "scale particle", "known"),
    "junk_20": ("plain", "junk", "known"),
    "touching": ("plain", "mask noise"),
    "real_noise": ("plain",),
    "all": ("plain", "all answers", "known"),
    "wide_plain": ("plain", "mask noise"),
    "wide_neighbours": ("plain", "mask noise"),
    "fine_plain": ("plain", "ctf-refine"),
    "fine_defocus_error": ("plain", "ctf-refine", "known"),
    "fine_beam_tilt": ("plain", "ctf-refine", "known"),
}
PLAN = {f"{base}_{name}": rows for base in nuisance_sets.BASES for name, rows in ROWS_OF.items()} | {
    "betagal_noisy_plain": ("plain", "junk"),
    "betagal_noisy_junk_20": ("plain", "junk", "known"),
}


def tables(records: Sequence[dict[str, Any]], sets: Sequence[str], rows: Sequence[str], *_: object) -> list[str]:
    """Of all records, and of what the answers are to reach."""
    made = [
        nuisance_tables.nuisance_table(records, sets, rows),
        nuisance_tables.criteria(records, tuple(nuisance_sets.BASES)),
    ]
    return [table for table in made if table]


NUISANCES = views.Benchmark(
    str(__doc__), nuisance_rows.ROWS, tuple(PLAN), harness.RESULTS / "nuisances.json",
    "",
    nuisance_scores.SCORERS, nuisance_rows.run, PLAN, tables,
)  # fmt: skip


if __name__ == "__main__":
    views.main(NUISANCES)
