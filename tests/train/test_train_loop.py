"""The training loop on one process: resuming to the bit, watchdogs, stopping, what is written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from errors_helper import raises_code
from forks_helper import python
from torch import nn
from train_helper import ALONE, SETTINGS, HvaeTask, StopAt, ToyTask, checkpoint_arrays, digest

from cryoiso.core.errors import EXIT_REQUEUE, CryoisoError, InputError, Interrupted
from cryoiso.parallel.ddp import TrainingGroup
from cryoiso.train import loop
from cryoiso.train.decision import TrainingDecision, flat_loss
from cryoiso.train.loop import CHECKPOINT, train
from cryoiso.train.step import Stepper

NAN = float("nan")


def run(folder: Path, task: ToyTask | None = None, settings=SETTINGS, **options):
    task = task or ToyTask()
    return task, train(task, ALONE, settings, folder, **options)


def interrupt(folder: Path, n: int, task: ToyTask | None = None, *, resume: bool = False, settings=SETTINGS) -> None:
    with pytest.raises(Interrupted, match="training was stopped after step"):
        run(folder, task, settings, stop=StopAt(n), resume=resume)


def assert_same_end(one: Path, two: Path, tasks, outcomes) -> None:
    assert digest(tasks[0].module) == digest(tasks[1].module)
    assert outcomes[0] == outcomes[1]
    a, b = checkpoint_arrays(one), checkpoint_arrays(two)
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[k], b[k]) for k in a), "parameters, optimiser, history"


# --- going on


@pytest.mark.parametrize("task", [ToyTask, HvaeTask])
@pytest.mark.parametrize("stops", [(1,), (7,), (12,), (23,), (24,), (3, 9, 1)])
def test_interrupted_anywhere_ends_at_the_same_bits(tmp_path, task, stops):
    whole, outcome = run(tmp_path / "whole", task())
    for i, n in enumerate(stops):
        interrupt(tmp_path / "parts", n, task(), resume=i > 0)
    rest, end = run(tmp_path / "parts", task(), resume=True)
    assert_same_end(tmp_path / "whole", tmp_path / "parts", (whole, rest), (outcome, end))
    assert end.step == 24 and [r["step"] for r in end.history] == [4, 8, 12, 16, 20, 24]
    first = sum(stops) if len(stops) > 1 else stops[0]
    assert rest.prepared[:1] == ([first] if first < 24 else [])


def test_killed_between_two_steps_goes_on_from_the_last_checkpoint(tmp_path):
    """A checkpoint every step; the process dies while the batch of step 11 is made."""

    class Dies(ToyTask):
        def prepare(self, step):
            if step == 11:
                raise SystemError("gone")
            return super().prepare(step)

    settings = replace(SETTINGS, checkpoint_s=0.0)
    whole, outcome = run(tmp_path / "whole")
    with pytest.raises(SystemError):
        run(tmp_path / "parts", Dies(), settings)
    rest, end = run(tmp_path / "parts", resume=True, settings=settings)
    assert rest.prepared[0] == 11
    assert_same_end(tmp_path / "whole", tmp_path / "parts", (whole, rest), (outcome, end))


def test_a_damaged_checkpoint_is_replaced_by_the_one_before(tmp_path):
    settings = replace(SETTINGS, checkpoint_s=0.0)
    whole, outcome = run(tmp_path / "whole")
    interrupt(tmp_path / "parts", 9, settings=settings)
    file = tmp_path / "parts" / CHECKPOINT
    file.write_bytes(file.read_bytes()[:-500])
    rest, end = run(tmp_path / "parts", resume=True)
    assert rest.prepared[0] in (8, 9)
    assert_same_end(tmp_path / "whole", tmp_path / "parts", (whole, rest), (outcome, end))


def test_resuming_what_is_finished_does_nothing(tmp_path):
    done, outcome = run(tmp_path)
    again, same = run(tmp_path, resume=True)
    assert same == outcome and again.prepared == [] and digest(again.module) == digest(done.module)


def test_resume_without_a_checkpoint_begins(tmp_path):
    task, outcome = run(tmp_path, resume=True)
    assert task.prepared[0] == 0 and outcome.step == 24


def test_without_resume_the_old_checkpoint_does_not_count(tmp_path):
    interrupt(tmp_path, 7)
    task, _ = run(tmp_path)
    assert task.prepared[0] == 0


@pytest.mark.parametrize("change", [{"learning_rate": 1e-3}, {"steps": 30}, {"seed": 6}])
def test_another_configuration_is_refused_by_name(tmp_path, change):
    interrupt(tmp_path, 7)
    (name,) = change
    with pytest.raises(InputError, match=f"state.npz: the checkpoint is of another training: {name} was"):
        run(tmp_path, settings=replace(SETTINGS, **change), resume=True)


def test_checkpoint_interval_is_no_part_of_the_configuration(tmp_path):
    interrupt(tmp_path, 7)
    run(tmp_path, settings=replace(SETTINGS, checkpoint_s=5.0), resume=True)


@pytest.mark.parametrize("began", [False, True])
def test_precision_stays_what_it_was_on_another_kind_of_device(tmp_path, began, monkeypatch):
    interrupt(tmp_path, 7, settings=replace(SETTINGS, amp=began))
    seen = []
    monkeypatch.setattr(loop, "Stepper", lambda *a, **k: seen.append(a[4]) or Stepper(*a, **k))
    run(tmp_path, settings=replace(SETTINGS, amp=not began), resume=True)
    assert seen == [began]


def test_no_timing_in_what_is_compared_and_speed_beside_it(tmp_path):
    _, outcome = run(tmp_path)
    values = json.loads(checkpoint_arrays(tmp_path)["meta"].tobytes())
    assert values["versions"]["torch"] == torch.__version__ and values["identity"]["task"] == "toy"
    assert set(outcome.history[0]) == {"step", "attempt", "loss", "error", "rows", "gradient_norm", "skipped"}
    timing = json.loads((tmp_path / "timing.json").read_text())
    assert [note["step"] for note in timing["notes"]] == [8, 12, 16, 20, 24]
    assert all(note["images_per_s"] > 0 for note in timing["notes"])


def test_records_are_means_over_their_steps(tmp_path):
    _, fine = run(tmp_path / "fine", settings=replace(SETTINGS, log_every=1))
    _, coarse = run(tmp_path / "coarse", settings=replace(SETTINGS, log_every=5))
    loss = np.array([r["loss"] for r in fine.history])
    rows = np.array([r["rows"] for r in fine.history])
    assert [r["step"] for r in coarse.history] == [5, 10, 15, 20, 24]
    for record, part in zip(coarse.history, np.split(np.arange(24), [5, 10, 15, 20])):
        assert record["loss"] == pytest.approx(loss[part].mean(), rel=1e-12)
        assert np.allclose(record["rows"], rows[part].mean(0), rtol=1e-12)


def test_torchs_generator_and_threads_are_left_alone(tmp_path):
    torch.manual_seed(3)
    expected = torch.randn(3)
    torch.manual_seed(3)
    run(tmp_path)
    assert torch.equal(torch.randn(3), expected)
    assert not any(thread.name == "batches" for thread in threading.enumerate())


def test_progress_says_loss_and_speed(tmp_path):
    said = []
    run(tmp_path, on_progress=lambda step, words: said.append((step, words)))
    assert [step for step, _ in said] == [4, 8, 12, 16, 20, 24]
    assert all("loss " in words and "images/s" in words for _, words in said)


# --- steps that fail


def factor_of(bad: dict[int, tuple[int, ...]], value: float = NAN):
    """Multiplies the loss of these steps of these attempts."""
    return lambda attempt, step: value if step in bad.get(attempt, ()) else 1.0


@pytest.mark.parametrize("value", [NAN, float("inf"), 3e38])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path, value):
    """With 3e38 the loss is finite, but its gradient is not."""
    settings = replace(SETTINGS, steps=5, log_every=1)
    good, _ = run(tmp_path / "good", settings=settings)
    task, outcome = run(tmp_path / "bad", ToyTask(factor=factor_of({0: (4,)}, value)), settings)
    assert [r["skipped"] for r in outcome.history] == [0, 0, 0, 0, 1]
    assert outcome.history[-1]["loss"] is None
    _, before = run(tmp_path / "before", settings=replace(settings, steps=4))
    a, b = checkpoint_arrays(tmp_path / "bad"), checkpoint_arrays(tmp_path / "before")
    assert all(np.array_equal(a[k], b[k]) for k in a if k != "meta"), "parameters and optimiser of step 4"
    assert digest(task.module) != digest(good.module) and before.attempts == outcome.attempts == 1


def test_two_bad_steps_in_a_row_are_skipped_and_three_begin_anew(tmp_path):
    _, outcome = run(tmp_path / "two", ToyTask(factor=factor_of({0: (5, 6, 9, 10)})))
    assert outcome.attempts == 1 and sum(r["skipped"] for r in outcome.history) == 4
    task, outcome = run(tmp_path / "three", ToyTask(factor=factor_of({0: (5, 6, 7)})))
    assert outcome.attempts == 2 and task.started == [0, 1] and outcome.step == 24
    assert [r["attempt"] for r in outcome.history] == [0, 0] + 6 * [1]


def test_a_new_attempt_has_other_parameters_and_the_same_images(tmp_path):
    starts = []

    class Notes(ToyTask):
        def start(self, attempt):
            super().start(attempt)
            starts.append(digest(self.module))

    task, _ = run(tmp_path, Notes(factor=factor_of({0: (0, 1, 2)})))
    assert len(set(starts)) == 2
    again = task.prepared[task.prepared.index(0, 1) :]
    assert again == list(range(24))


def test_parameters_that_are_not_finite_begin_anew_at_once(tmp_path):
    class Breaks(ToyTask):
        def loss(self, module, batch, step, attempt):
            if attempt == 0 and step == 6:
                with torch.no_grad():
                    next(module.parameters()).view(-1)[0] = NAN
            return super().loss(module, batch, step, attempt)

    task, outcome = run(tmp_path, Breaks(), replace(SETTINGS, log_every=1))
    assert task.started == [0, 1]
    assert [r["step"] for r in outcome.history if r["attempt"] == 0] == list(range(1, 8))


def test_restarts_are_bounded_and_the_end_is_one_sentence(tmp_path):
    task = ToyTask(factor=lambda attempt, step: NAN)
    with raises_code(
        "training-diverged", CryoisoError, match="tried 3 times and failed: loss or gradient were not finite"
    ) as caught:
        run(tmp_path, task)
    assert task.started == [0, 1, 2] and caught.value.exit_code == 1 and "\n" not in str(caught.value)


@pytest.mark.parametrize("stops", [(6,), (7,), (8,), (9,), (7, 1, 4)])
def test_interrupted_around_a_restart_ends_at_the_same_bits(tmp_path, stops):
    def task():
        return ToyTask(factor=factor_of({0: (4, 5, 6)}))

    whole, outcome = run(tmp_path / "whole", task())
    for i, n in enumerate(stops):
        interrupt(tmp_path / "parts", n, task(), resume=i > 0)
    rest, end = run(tmp_path / "parts", task(), resume=True)
    assert_same_end(tmp_path / "whole", tmp_path / "parts", (whole, rest), (outcome, end))
    assert end.attempts == 2


# --- judges


def test_the_judge_sees_the_records_of_its_attempt_and_restarts(tmp_path):
    seen = []

    def verdict(history):
        seen.append([(r["attempt"], r["step"]) for r in history])
        collapsed = history[-1]["attempt"] == 0 and history[-1]["step"] == 8
        return TrainingDecision("restart", "the posterior collapsed") if collapsed else TrainingDecision()

    task, outcome = run(tmp_path, ToyTask(verdict=verdict))
    assert task.started == [0, 1] and outcome.attempts == 2
    assert seen[1] == [(0, 4), (0, 8)] and seen[2] == [(1, 4)] and seen[-1] == [(1, s) for s in range(4, 25, 4)]


def test_a_verdict_to_stop_ends_without_another_attempt(tmp_path):
    task = ToyTask(verdict=lambda history: TrainingDecision("stop", "the particles are all the same"))
    with raises_code("training-diverged", CryoisoError, match="tried once and failed: the particles are all the same"):
        run(tmp_path, task)
    assert task.started == [0]


def test_a_network_that_learns_nothing_is_stopped_by_the_flat_loss(tmp_path):
    class Deaf(ToyTask):
        def loss(self, module, batch, step, attempt):
            loss, terms = super().loss(module, batch, step, attempt)
            return loss * 0 + batch["noise"].square().mean(), terms

    task = Deaf()
    with raises_code("training-diverged", CryoisoError, match="failed: the loss is flat"):
        run(tmp_path, task, replace(SETTINGS, steps=60, log_every=2))
    assert task.started == [0, 1, 2] and max(task.prepared) < 50


def test_the_real_network_is_not_flat(tmp_path):
    _, outcome = run(tmp_path, HvaeTask(), replace(SETTINGS, steps=80, log_every=2))
    assert outcome.attempts == 1


def records(loss) -> list[dict]:
    return [{"step": i + 1, "attempt": 0, "loss": float(v)} for i, v in enumerate(loss)]


def fires(loss, after: int = 0, window: int = 40) -> bool:
    """Whether the flat-loss watchdog speaks at any record."""
    return any(flat_loss(records(loss[: i + 1]), after, window) for i in range(4, len(loss), 5))


def noisy(loss, seed: int, sd: float = 0.1) -> np.ndarray:
    return np.asarray(loss) + sd * np.random.default_rng(seed).standard_normal(len(loss))


def test_flat_loss_speaks_of_a_constant_loss():
    assert fires(np.full(100, 2.5)) and not fires(np.full(100, 2.5), after=80)
    assert all(fires(noisy(np.full(200, 2.5), seed)) for seed in range(100))
    assert all(fires(noisy(np.linspace(2.5, 3.0, 200), seed)) for seed in range(30)), "or of one that grows"


def test_flat_loss_is_silent_while_anything_is_learned():
    t = np.arange(400)
    curves = {
        "fast, then a plateau": 1 + 5 * np.exp(-t / 3),
        "slow": 3 - t / 300,
        "late": np.where(t < 25, 3.0, 3.0 - (t - 25) / 100),
        "negative": -4 - np.log1p(t / 20),
        "annealed": 6 * np.exp(-t / 10) + np.minimum(1, t / 200),
    }
    for name, curve in curves.items():
        for seed in range(30):
            assert not fires(noisy(curve, seed), after=200 if name == "annealed" else 0), name


def test_flat_loss_waits_for_the_annealing_and_skips_lost_steps():
    loss = [*np.full(60, 2.0), NAN, *np.full(60, 2.0)]
    assert fires(loss) and not fires(loss[:100], after=61)


def test_a_compiler_that_fails_costs_a_warning_and_nothing_else(tmp_path, monkeypatch, caplog):
    def broken(self, *args, **options):
        def call(*inputs):
            raise RuntimeError("no compiler\nhere")

        self._compiled_call_impl = call

    whole, outcome = run(tmp_path / "plain")
    monkeypatch.setattr(nn.Module, "compile", broken)
    task, end = run(tmp_path / "compiled", settings=replace(SETTINGS, compile=True))
    assert "torch.compile does not work here (no compiler)" in caplog.text
    assert digest(task.module) == digest(whole.module) and end == outcome


# --- a real signal

SIGNALLED = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from train_helper import ALONE, SETTINGS, ToyTask, digest
from cryoiso.parallel.abort import guard
from cryoiso.parallel.context import get_context
from cryoiso.train.loop import train
ctx = get_context()
ctx.install_signal_handlers()
class Slow(ToyTask):
    def loss(self, module, batch, step, attempt):
        if step == 5 and sys.argv[2] != "resume":
            print("ready", flush=True)
            time.sleep(1)
        return super().loss(module, batch, step, attempt)
with guard(ctx):
    task = Slow()
    train(task, ALONE, SETTINGS, Path(sys.argv[1]), resume=sys.argv[2] == "resume")
    print(digest(task.module))
"""


def test_a_signal_writes_a_checkpoint_and_exits_75(tmp_path):
    script = SIGNALLED.format(tests=str(Path(__file__).parent))
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PMI_", "OMPI_"))}
    command = [python(), "-c", script, str(tmp_path / "parts")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    process = subprocess.Popen([*command, "begin"], **pipes)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == EXIT_REQUEUE and err.startswith("error: training was stopped after step 6"), err
    assert (tmp_path / "parts" / CHECKPOINT).exists()
    task, _ = run(tmp_path / "whole")
    rest, end = run(tmp_path / "parts", resume=True)
    assert digest(rest.module) == digest(task.module) and end.step == 24


# --- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_it_learns_skips_bad_steps_and_goes_on(tmp_path, compiled):
    group = TrainingGroup((0,), 0, "cuda:0")
    settings = replace(SETTINGS, steps=60, log_every=1, amp=True, channels_last=True, compile=compiled, clip_norm=100.0)

    class Bad(HvaeTask):
        def loss(self, module, batch, step, attempt):
            loss, terms = super().loss(module, batch, step, attempt)
            return loss * self.factor(attempt, step), terms

    whole = Bad(group, factor=factor_of({0: (10, 30)}))
    outcome = train(whole, group, settings, tmp_path / "whole")
    assert [i for i, r in enumerate(outcome.history) if r["skipped"]] == [10, 30]
    assert outcome.history[10]["loss"] is None
    # the bound, not the loss, in which the weight of the KL grows over the first 25 steps
    bound = [r["bound"] or 0 for r in outcome.history]
    assert np.mean(bound[-5:]) < 0.7 * np.mean(bound[:5])
    parts = Bad(group, factor=factor_of({0: (10, 30)}))
    with pytest.raises(Interrupted):
        train(parts, group, settings, tmp_path / "parts", stop=StopAt(20))
    end = train(parts, group, settings, tmp_path / "parts", resume=True)
    assert np.allclose([r["bound"] or 0 for r in end.history], bound, rtol=0.05)
    again = Bad(group, factor=lambda attempt, step: NAN)
    with raises_code("training-diverged", CryoisoError, match="tried 2 times"):
        train(again, group, replace(settings, max_restarts=1), tmp_path / "never")


@pytest.mark.gpu
def test_gpu_and_cpu_learn_the_same_curve(tmp_path):
    curves = []
    for device in ("cpu", "cuda:0"):
        group = TrainingGroup((0,), 0, device)
        settings = replace(SETTINGS, steps=30, log_every=1)
        curves.append([r["loss"] for r in train(HvaeTask(group), group, settings, tmp_path / device[:3]).history])
    assert np.allclose(*curves, rtol=2e-2)
