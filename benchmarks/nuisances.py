"""Refinement of sets with nuisances, without and with the engine's answer to each, against the truth, over seeds.

Sets are in nuisance_sets.py, ways to refine them in ROWS below, further scores in SCORERS; the rest is that of
views.py: sets are prepared once under --work, records go to --out, and those that are there with the same settings
are left out.

    python benchmarks/nuisances.py --work sets --sets HA_plain,HA_neighbours --rows plain,mask\\ zero --seeds 3
    python benchmarks/nuisances.py --tables [--pairs "plain:mask zero"]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness, nuisance_sets, views
from benchmarks.views_rows import Row

ROWS: dict[str, Row] = {
    "true poses": Row("reconstruct"),
    "plain": Row(),
    "scale group": Row(engine={"scale": "group"}),
    "scale particle": Row(engine={"scale": "particle"}),
    "mask zero": Row(engine={"image_mask": "zero"}),
    "mask noise": Row(engine={"image_mask": "noise"}),
    "junk": Row(engine={"junk": True}),
}
"""Keys of [refine] beside the defaults; `job` has those of other sections. A changed row is measured again."""

SCORERS: tuple[views.Scorer, ...] = ()
"""Called as scorer(folder of the set, folder of the row's result, set), each adds its numbers to the record."""

NUISANCES = views.Benchmark(
    str(__doc__), ROWS, tuple(nuisance_sets.SETS), harness.RESULTS / "nuisances.json",
    "plain:mask zero,plain:mask noise", SCORERS,
)  # fmt: skip


if __name__ == "__main__":
    views.main(NUISANCES)
