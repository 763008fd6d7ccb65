"""Looking ahead: how far a stage is, what the stages to come take, and what is said of it."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from cryoiso.core import log, progress
from cryoiso.core.config import Job, RefineSection
from cryoiso.core.log import ProgressLine
from cryoiso.core.progress import LONGEST_STEP_S, Board
from cryoiso.engines.relion import supervise
from cryoiso.parallel import signals
from cryoiso.parallel.context import Context
from cryoiso.pipeline.batch.walltime import End
from cryoiso.pipeline.context import RunContext
from cryoiso.pipeline.job_inputs import Inputs
from cryoiso.pipeline.jobfile import read_resolved
from cryoiso.pipeline.planning import remaining_time
from cryoiso.pipeline.planning.forecast import Forecast, requeues
from cryoiso.pipeline.planning.job_size import Problem
from cryoiso.pipeline.planning.remaining_time import Ahead, Estimates, measured
from cryoiso.pipeline.planning.workload import Assumed, stages
from cryoiso.pipeline.records.journal import Journal
from cryoiso.pipeline.run import run_job
from cryoiso.pipeline.workflow import folder_stages
from cryoiso.refine.schedule import EXPECTED_ITERATIONS, expected_iterations


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture()
def clock(monkeypatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    monkeypatch.setattr(log, "time", found)
    return found


@pytest.fixture()
def board(clock, monkeypatch) -> Board:
    """An empty board in a stage that has just begun, on which progress lines and signals write."""
    found = Board()
    for module in (log, signals, supervise):
        monkeypatch.setattr(module, "board", found)
    found.begin("refine")
    return found


def work_on(line: ProgressLine, clock: Clock, first: int, last: int, step_s: float) -> None:
    """Updates for first+1 ... last, one every ``step_s``."""
    for done in range(first + 1, last + 1):
        clock.now += step_s
        line.update(done)


# --- how far a stage is


def test_what_is_left_follows_from_the_running_piece(board, clock):
    board.expect(0, 4, lines=2)
    work_on(ProgressLine("half 1", 10), clock, 0, 10, 10.0)
    assert board.share == 0.5 and board.left_s() == pytest.approx(100 + 3 * 200)
    work_on(ProgressLine("half 2", 10), clock, 0, 5, 10.0)
    assert board.share == 0.75 and board.left_s() == pytest.approx(50 + 3 * 200)
    clock.now += 20
    assert board.left_s() == pytest.approx(30 + 3 * 200)


def test_what_follows_the_lines_of_a_piece_is_reckoned_with(board, clock):
    """A correction after each iteration, whose own line is no part of it."""
    board.expect(0, 8)
    work_on(ProgressLine("iteration 1", 10), clock, 0, 10, 10.0)
    work_on(ProgressLine("training the network", 100), clock, 0, 30, 10.0)
    assert board.share == 1 and board.left_s() == pytest.approx(7 * (100 + 300))
    board.expect(1, 8)
    assert board.piece_s == pytest.approx(400) and board.left_s() == pytest.approx(7 * 400)
    work_on(ProgressLine("iteration 2", 10), clock, 0, 5, 20.0)
    assert board.left_s() == pytest.approx(100 + 300 + 6 * (200 + 300))


@pytest.mark.parametrize("label", ["noise of half 1", "copying images to scratch, MB", "images for RELION"])
def test_a_pass_beside_the_pieces_is_no_stage(board, clock, label):
    line = ProgressLine(label, 10)
    work_on(line, clock, 0, 9, 60.0)
    assert board.left_s() is None
    line.update(10)
    clock.now += 7200
    assert board.left_s() is None
    board.expect(0, 2)
    assert board.left_s() is None
    work_on(ProgressLine("iteration 1", 10), clock, 0, 5, 10.0)
    work_on(ProgressLine(label, 10), clock, 0, 1, 1.0)
    assert board.left_s() == pytest.approx(50 - 1 + 100)


def test_a_stage_whose_line_is_done_does_not_end_now(board, clock):
    board.expect(0, 1)
    work_on(ProgressLine("back-projecting", 10), clock, 0, 10, 10.0)
    assert board.left_s() is None
    board.begin("correct")
    for number in range(2):
        board.expect(number, 2)
        work_on(ProgressLine(f"training {number}", 10), clock, 0, 10, 10.0)
        clock.now += 30
    assert board.left_s() == 0.0
    clock.now += 300
    assert board.left_s() is None


def test_what_an_earlier_job_had_done_is_not_this_ones_pace(board, clock, caplog):
    """A training that goes on after step 8,000, and an iteration whose first batches were searched before."""
    caplog.set_level(logging.INFO, "cryoiso")
    logging.getLogger("cryoiso").propagate = True
    board.expect(0, 1)
    line = ProgressLine("training", 10_000)
    clock.now += 60
    line.update(8000)
    assert board.left_s() is None
    clock.now += 60
    line.update(8100)
    assert board.left_s() == pytest.approx(1900 * 0.6)
    assert "about 19 min 00 s left" in caplog.text
    board.begin("refine")
    board.expect(6, 8)
    line = ProgressLine("iteration 7", 1000)
    work_on(line, clock, 0, 800, 0.1)
    work_on(line, clock, 800, 900, 10.0)
    assert board.left_s() == pytest.approx(100 * 10.0 + 10_000)


def test_a_training_that_begins_again_is_as_far_as_it_is(board, clock):
    board.expect(0, 1)
    line = ProgressLine("training", 100)
    work_on(line, clock, 0, 50, 10.0)
    line.update(1)
    work_on(line, clock, 1, 21, 10.0)
    assert board.left_s() == pytest.approx(790)


def test_a_longer_silence_than_a_step_can_be_costs_no_job_anything(board, clock):
    clock.now += 45
    signals.stop_signal()  # asked at every place where a stop is possible
    clock.now += 30
    board.heard()
    assert board.longest_s == 45
    clock.now += LONGEST_STEP_S + 1
    board.heard()
    clock.now += 3 * 3600
    board.end()
    assert board.longest_s == 45


def test_expected_iterations_never_say_that_it_is_over():
    settings = RefineSection()
    assert expected_iterations(0, settings) == EXPECTED_ITERATIONS and expected_iterations(20, settings) == 22
    assert expected_iterations(24, settings) == 25
    assert expected_iterations(1, RefineSection(max_iterations=2)) == 2


# --- RELION

BEFORE = ' Auto-refine: Iteration= {0}\n Estimating accuracies in the orientations ...\n  90/  90 sec ...~~(,_,">'
SEARCH = ' Expectation iteration {0}\n000/??? sec ~~(,_,">    [oo]\r'
BAR = '  {0:.2f}/  2.00 hrs ....~~(,_,">\r'
AFTER = '\n Maximization ...\n   0.01/  0.50 min ~~(,_,">\r'


def test_relions_iterations_are_pieces_of_the_stage(board, clock, tmp_path):
    def piece_of(iteration: int, last: bool) -> tuple[int, int]:
        return iteration - 1, iteration if last else 8

    watch = supervise._RelionWatch(supervise.RelionStart([], tmp_path, lambda extra: extra, None, piece_of=piece_of))
    work_on(ProgressLine("images for RELION", 10), clock, 0, 10, 60.0)
    watch._follow(BEFORE.format(1) + "\n")
    clock.now += 600
    watch._follow("   still at it\n")
    assert board.left_s() is None
    watch._follow(SEARCH.format(1))
    for step in range(1, 5):
        clock.now += 0.25 * 3600
        watch._follow(BAR.format(0.25 * step))
        watch._follow("")
    assert board.share == pytest.approx(0.5) and board.left_s() == pytest.approx(3600 + 7 * 7200, rel=0.01)
    clock.now += 3600
    watch._follow(BAR.format(2.0) + AFTER)
    clock.now += 600
    watch._follow("")
    assert board.share == 1 and board.left_s() == pytest.approx(7 * 7800, rel=0.01)
    watch._follow(BEFORE.format(2) + "\n" + SEARCH.format(2))
    assert (board.piece, board.pieces) == (1, 8) and board.tail_s == pytest.approx(600)
    assert board.left_s() == pytest.approx(7 * board.piece_s)
    watch._follow(" Auto-refine: Refinement has converged, entering last iteration where two halves\n")
    assert board.pieces == 2


def test_all_places_where_relion_can_be_stopped_are_heard(board, clock):
    """It is looked after twenty times a second, and each time whoever rings is listened to."""
    from cryoiso.parallel.group_stop import StopSignal

    stop_signal = StopSignal(Context())
    for _ in range(100):
        clock.now += 60
        stop_signal.received()
    assert board.longest_s == 60


def test_rank_0_counts_the_images_that_it_writes_itself(board, tmp_path, monkeypatch):
    import numpy as np

    from cryoiso.engines.relion import images

    class Two(Context):
        size = 2

    seen = []
    monkeypatch.setattr(images, "STACK_BYTES", 4 * 8 * 8 * 10)
    monkeypatch.setattr(images.ProgressLine, "update", lambda line, done, words="": seen.append((done, line.total)))
    particles = SimpleNamespace(uid=np.arange(95), group_values=lambda name: np.full(95, 2.0))
    source = SimpleNamespace(particles=particles, box_px=8, read=lambda rows: np.zeros((len(rows), 8, 8), np.float32))
    images._export(source, np.arange(95), tmp_path / "images", Two(), False, "RELION")
    assert seen == [(10 * k, 50) for k in range(1, 6)]


# --- the stages to come


def estimates(thought: float | None = None, **sections) -> Estimates:
    """Of a job on a device of which no rate is known, unless given the same for all."""
    sections = {"run": {"workflow": "both"}, "auxiliary": {"rounds": 2, "balance": True}, **sections}
    job = Job.model_validate({"particles": {"file": "p.star"}, "reference": {"file": "r.mrc"}, **sections})
    names = [*folder_stages(job), "report"]
    work = stages(Problem(job, 10_000, 128, 1.5, 150.0), 2, Assumed(), "cuda")
    return Estimates(dict.fromkeys(names, thought), work, "cuda")


def test_stages_are_foretold_from_those_like_them():
    found = estimates()
    known = {"refine": 3600.0, "train-1": 1800.0}
    assert found.seconds("train-2", known) == 1800.0
    again = found.seconds("corefine-1", known)
    assert again is not None and 3600 < again < 4 * 3600  # more particles
    assert found.seconds("corefine-2", {**known, "corefine-1": 5000.0}) == 5000.0
    near = found.seconds("local", known)
    assert near is not None and 0 < near < 2 * 3600
    assert found.seconds("correct", known) is None
    ahead = found.after("corefine-2", {**known, "corefine-2": 5000.0})
    assert ahead.seconds > 0 and ahead.unknown == ("reconstruct", "correct", "diagnose", "report")
    assert found.after("report", {}) == Ahead()


def test_a_round_that_was_left_out_tells_nothing():
    assert estimates().seconds("corefine-2", {"refine": 3600.0, "corefine-1": 0.5}) > 3600


def test_stages_with_rates_are_scaled_by_what_was_measured():
    found = estimates(100.0)
    assert found.seconds("correct", {}) == 100.0 and found.seconds("correct", {"refine": 300.0}) == 300.0
    assert found.seconds("local", {"refine": 300.0, "train-1": 50.0}) == 300.0
    assert found.seconds("correct", {"refine": 300.0, "train-1": 50.0}) == 175.0


def line(event: str, minute: int, **facts) -> dict:
    return {"event": event, "time": f"2026-03-01T12:{minute:02d}:00.000+00:00", **facts}


JOURNAL = [
    line("run", 0, ranks=2),
    line("start", 0, stage="ingest", resumed=False), line("end", 5, stage="ingest"),
    line("start", 5, stage="refine", resumed=False), line("checkpoint", 15, stage="refine"),
    line("resume", 30, ranks=2),
    line("start", 31, stage="refine", resumed=True), line("forecast", 40, stage="refine"),
    line("end", 41, stage="refine"),
    line("start", 42, stage="train-1", resumed=False), line("stop", 45),
    line("resume", 50, ranks=2), line("start", 51, stage="train-1", resumed=True),
]  # fmt: skip


def test_the_attempts_of_a_stage_are_added():
    found = measured(JOURNAL, 2)
    assert found.ended == {"ingest": 300.0, "refine": 1200.0} and found.begun == {"train-1": 180.0}
    afresh = measured([*JOURNAL, line("resume", 55, ranks=2), line("start", 56, stage="train-1", resumed=False)], 2)
    assert afresh.begun == {"train-1": 0.0}


def test_what_other_ranks_did_is_no_measure():
    assert measured(JOURNAL, 4).ended == {} and not measured(JOURNAL, 4).begun
    mixed = measured([*JOURNAL, line("resume", 55, ranks=4), line("start", 56, stage="train-1", resumed=True)], 2)
    assert mixed.elsewhere == {"train-1"} and set(mixed.ended) == {"ingest", "refine"}


def test_a_real_run_on_a_device_without_rates(tmp_path, monkeypatch):
    """The last stages were measured by nobody; with --until they do not matter."""
    from pipeline_helper import simulate

    job = simulate(tmp_path / "data")
    run = run_job(job, tmp_path / "run", Context(), until="reference")
    context = RunContext(read_resolved(run)[1], run, Context(), journal=Journal(run.journal))
    inputs = Inputs(context.job, run, context.comm)
    with_rates = remaining_time.remaining_stages(context, inputs)("refine", 60.0, 60.0)
    assert with_rates.unknown == () and with_rates.seconds > 0
    monkeypatch.setattr(
        remaining_time, "predicted_stages", lambda run, _: dict.fromkeys([*folder_stages(run.job), "report"])
    )
    assert remaining_time.remaining_stages(context, inputs)("refine", 60.0, 60.0) == Ahead(
        0.0, ("reconstruct", "diagnose", "report")
    )
    assert remaining_time.remaining_stages(context, inputs, "refine")("refine", 60.0, 60.0) == Ahead()


# --- what is said


def told_of(board: Board, end_in: float | None, ahead: Ahead, caplog) -> tuple[dict, str]:
    caplog.set_level(logging.INFO, "cryoiso")
    logging.getLogger("cryoiso").propagate = True
    told, asked, now = [], [], 1e9
    end = None if end_in is None else End(now + end_in, "test")
    forecast = Forecast(
        board, end, 120.0, lambda *facts: asked.append(facts) or ahead, lambda **facts: told.append(facts),
        lambda why: None, job_began=now,
    )  # fmt: skip
    forecast.look(now, 10.0)
    assert told == []  # too early to say
    forecast.look(now, 600.0)
    forecast.look(now + 1, 601.0)
    (facts,) = told  # once: nothing new
    assert asked == [("refine", 600.0, pytest.approx(1500.0))]
    return facts, caplog.text


@pytest.fixture()
def at_half(board, clock) -> Board:
    """A stage in which a piece takes 200 s, half of the third of ten done: 1500 s left."""
    board.expect(2, 10)
    work_on(ProgressLine("iteration 3", 20), clock, 0, 10, 10.0)
    return board


@pytest.mark.parametrize("end_in, again", [(4000.0, 0), (1000.0, 1), (500.0, 3)])
def test_a_run_that_does_not_fit_is_foretold(at_half, caplog, end_in, again):
    facts, text = told_of(at_half, end_in, Ahead(300.0), caplog)
    assert facts["requeues"] == again and facts["stage"] == "refine" and facts["unknown_stages"] == []
    assert facts["run_ends"] == facts["run_ends_not_before"] > facts["stage_ends"]
    assert ("its wall-time limit is too short" in text) == bool(again) and ("unknown" not in text)


@pytest.mark.parametrize("end_in, again", [(2500.0, 0), (1800.0, 1), (None, None)])
def test_where_a_later_stage_is_unknown_the_known_ones_are_a_lower_bound(at_half, caplog, end_in, again):
    facts, text = told_of(at_half, end_in, Ahead(300.0, ("correct", "report")), caplog)
    assert facts["run_ends"] is None and facts["run_ends_not_before"] > facts["stage_ends"]
    assert facts["unknown_stages"] == ["correct", "report"] and facts.get("requeues") == again
    assert "the run not before" in text and "how long correct and report will take is unknown" in text
    assert ("must be started again at least 1 time (" in text) == bool(again)
    assert ("whether its time will do is unknown" in text) == (again == 0)


def test_time_to_stop_is_before_the_end_by_margin_and_longest_step(at_half):
    asked = []
    at_half.longest_s = 30.0
    ahead = Forecast(at_half, End(10_000.0, "test"), 120.0, lambda *facts: Ahead(), stop=asked.append)
    ahead.look(10_000.0 - 151, 0.0)
    assert asked == []
    ahead.look(10_000.0 - 149, 0.0)
    ahead.look(10_000.0 - 100, 0.0)
    assert len(asked) == 1
    never = Forecast(at_half, End(10_000.0, "test"), 0.0, lambda *facts: Ahead(), stop=asked.append)
    never.look(10_001.0, 0.0)
    assert len(asked) == 1


def test_number_of_further_jobs():
    assert requeues(0, 100, 100, 1000) == 0 and requeues(0, 1000, 100, 1000) == 1 and requeues(0, 3000, 500, 1000) == 3
