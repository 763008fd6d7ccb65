"""When a row of the kill matrix is through: what it counts as hit, and where it aims."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from kill_helper import RELION, Aim, Hit, Tally, record, stage_now, table

SECONDS = {"ingest": 1.0, "refine": 5.0, "report": 2.0}


def tally(**changes) -> Tally:
    return Tally(SECONDS, changes.pop("relion_seconds", {}), 2, **{"numbers": [signal.SIGKILL], **changes})


def hit(stage: str, target: str, name: str = "SIGKILL") -> Hit:
    return Hit(stage, target, name, 1.0, 137)


def test_many_hits_of_one_stage_are_not_all_stages():
    found = tally()
    found.hits += [hit("refine", "0")] * 30 + [hit("", "1")] * 30
    assert found.missing() == ["0 in ingest", "1 in ingest", "1 in refine", "0 in report", "1 in report"]
    assert found.aims(5, 100) == [Aim("ingest", "1", 9), Aim("refine", "1", 9), Aim("report", "1", 9)]
    found.hits += [hit(stage, rank) for stage in SECONDS for rank in "01"]
    assert found.missing() == [] and [aim.stage for aim in found.aims(6, 100)] == list(SECONDS)


def test_one_kill_of_relion_is_not_ten():
    found = tally(relion_seconds={"refine": 3.0}, relion_hits=10)
    found.hits += [hit(stage, rank) for stage in SECONDS for rank in "01"] * 5 + [hit("refine", RELION)]
    assert found.missing() == ["RELION 9 times more"]
    assert found.aims(0, 100) == [Aim("refine", RELION, 9)] * 4
    found.hits += [hit("refine", RELION)] * 9
    assert found.missing() == []


def test_relion_is_wanted_in_each_of_its_stages():
    found = tally(relion_seconds={"ingest": 3.0, "refine": 3.0}, relion_hits=2)
    found.hits += [hit(stage, rank) for stage in SECONDS for rank in "01"] + [hit("refine", RELION)] * 10
    assert found.missing() == ["relion in ingest"] and found.aims(0, 100) == [Aim("ingest", RELION, 9)]


def test_both_signals_are_wanted_and_few_strikes_are_spread():
    found = tally(numbers=[signal.SIGTERM, signal.SIGUSR1])
    found.hits += [hit(stage, rank, "SIGTERM") for stage in SECONDS for rank in "01"]
    assert found.missing() == ["SIGUSR1"]
    assert [(a.stage, a.number) for a in found.aims(0, 2)] == [("ingest", signal.SIGTERM), ("report", signal.SIGTERM)]
    assert {a.number for a in found.aims(1, 100)} == {signal.SIGTERM, signal.SIGUSR1} and found.aims(0, 0) == []


def test_the_stage_that_a_run_is_in(tmp_path: Path):
    lines = [("start", "ingest"), ("checkpoint", "ingest"), ("end", "ingest"), ("start", "refine")]
    for count, expected in ((0, ""), (1, "ingest"), (2, "ingest"), (3, ""), (4, "refine")):
        rows = [json.dumps({"event": event, "stage": stage}) for event, stage in lines[:count]]
        (tmp_path / "journal.jsonl").write_text("".join(f"{row}\n" for row in rows) + '{"event": "torn')
        assert stage_now(tmp_path) == expected


def test_a_row_is_kept_as_json_and_makes_a_line_of_a_table():
    found = tally()
    found.hits += [hit("ingest", "0"), hit("ingest", "1"), hit("", "1")]
    kept = json.loads(json.dumps(record("refine", found, [True, False], 80, 0.0)))
    assert kept["stages"] == {"ingest": {"0": 1, "1": 1}, "refine": {}, "report": {}, "between stages": {"1": 1}}
    assert kept["gone_slowest_s_of_stages"] == {"ingest": 1.0, "between stages": 1.0}
    assert kept["never_hit"] == found.missing() != [] and kept["statuses"] == {"SIGKILL 137": 3}
    line = "| refine | SIGKILL | 3 | 1 of 3 | rank 0 1 times, rank 1 2 times | 1.0 s | 1.0 s | 1 of 2 runs, 80 files |"
    assert line in table([kept])
