"""The comparison of trained generators: means over seeds, and differences paired by seed with their interval."""

from __future__ import annotations

from benchmarks.generator_quality import NUMBERS, table


def record(tree: str, seed: int, bound: float) -> dict[str, object]:
    return {"set": "phantom", "tree": tree, "seed": seed, **dict.fromkeys(NUMBERS, 1.0), "bound": bound}


def test_differences_are_paired_by_seed():
    records = [record("last", 3, 1.40), record("last", 4, 1.42), record("now", 4, 1.421), record("now", 3, 1.403)]
    last, now = table(records, ["last", "now"]).splitlines()[2:]
    assert "| 1.4100 |" in last
    # 0.002 on the average, half the distance of the two times t(0.975, 1)
    assert "1.4120 (+0.0020 [-0.0107, +0.0147])" in now


def test_a_seed_of_one_tree_alone_is_left_out():
    records = [record("last", 3, 1.40), record("now", 3, 1.41), record("now", 4, 9.0)]
    assert "| 1 | 1.0 | 1.4100 |" in table(records, ["last", "now"]).splitlines()[-1]
