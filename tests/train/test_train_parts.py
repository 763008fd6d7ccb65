"""Steps from parts of a batch whose gradients are added in pairs: the same bits on one rank, two and four."""

from __future__ import annotations

import doctest
import json
import weakref
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from mpi_helper import run_mpi
from torch import Tensor, nn
from train_helper import ALONE, SETTINGS, HvaeTask, StopAt, ToyTask, checkpoint_arrays, digest, script

from cryoiso.core.errors import InputError, Interrupted
from cryoiso.parallel import pairwise_sum
from cryoiso.parallel.ddp import TrainingGroup
from cryoiso.parallel.pairwise_sum import sum_in_pairs
from cryoiso.parallel.partition import owned_rows
from cryoiso.train.loop import train
from cryoiso.train.prefetch import part_of
from cryoiso.train.step import Stepper

NAN = float("nan")
ONE = replace(SETTINGS, micro_batch=1)


def numbers(n: int, seed: int = 0) -> Tensor:
    """Of very different sizes: another order of adding them gives other bits."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn((n, 200), generator=g) * torch.exp(3 * torch.randn((n, 1), generator=g))


def added(rows: Tensor, first: int = 0, last: int | None = None) -> Tensor:
    return sum_in_pairs(lambda i: [rows[i].clone()], first, len(rows) if last is None else last)[0]


# --- the tree


def test_doctests():
    failed, tried = doctest.testmod(pairwise_sum)
    assert tried and not failed


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 16])
def test_the_sum_is_the_sum(n):
    assert torch.allclose(added(numbers(n).double()), numbers(n).double().sum(0), rtol=1e-13)
    with pytest.raises(ValueError):
        added(numbers(n), n, n)


@pytest.mark.parametrize(("n", "size"), [(4, 2), (4, 4), (8, 2), (8, 4), (8, 8), (12, 4), (5, 2), (7, 2), (20, 4)])
def test_ranks_that_share_the_tree_give_the_bits_of_one(n, size):
    rows = numbers(n)
    shares = [owned_rows(n, 1, rank, size) for rank in range(size)]
    each = torch.stack([added(rows, share.start, share.stop) for share in shares])
    assert torch.equal(added(each), added(rows))
    if n > 4:  # what this is for: one after the other is another sum
        running = rows[0].clone()
        for row in rows[1:]:
            running += row
        assert not torch.equal(running, added(rows))


def test_few_parts_are_in_memory():
    alive: list[Any] = []
    most = 0

    def part(i: int) -> list[Tensor]:
        nonlocal most
        tensor = torch.ones(3)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return [tensor]

    assert sum_in_pairs(part, 0, 64)[0].tolist() == [64, 64, 64] and most <= 7


# --- parts of a batch


@dataclass
class Pair:
    a: Tensor
    b: np.ndarray


class Named(NamedTuple):
    a: Tensor
    n: int


def test_a_part_of_a_batch_has_its_structure():
    x, y = torch.arange(12.0).view(4, 3), np.arange(4)
    batch = {"pair": Pair(x, y), "named": Named(x, 4), "list": [x, (y, None, "text", 0.5)], "one": torch.tensor(3.0)}
    part = part_of(batch, 1, 3, 4)
    assert torch.equal(part["pair"].a, x[1:3]) and part["pair"].b.tolist() == [1, 2]
    assert torch.equal(part["named"].a, x[1:3]) and part["named"].n == 4
    assert part["list"][1][0].tolist() == [1, 2] and part["list"][1][1:] == (None, "text", 0.5)
    assert part["one"] == 3
    part["pair"].a.zero_()
    assert float(x[1, 0]) == 3, "a copy"


@pytest.mark.parametrize("wrong", [torch.ones(5, 2), np.ones((3, 4)), object()])
def test_a_batch_that_cannot_be_divided_is_refused(wrong):
    with pytest.raises(ValueError, match="cannot be divided"):
        part_of({"images": torch.ones(4, 2), "more": wrong}, 0, 1, 4)


# --- one step


def step_of(module: nn.Module, x: Tensor, micro: int, **options) -> tuple[Stepper, Tensor]:
    stepper = Stepper(module, ALONE, 0.1, amp=False, **{"clip_norm": 0.0, "parts": micro > 0, **options})

    def loss_of(m: nn.Module, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        value = m(rows).abs()
        return value.mean(), {"most": value.mean(0)}

    if not micro:
        return stepper, stepper(lambda m: loss_of(m, x), 1.0, lambda: [7.0])
    parts = list(x.split(micro))
    sizes = [len(rows) for rows in parts]
    return stepper, stepper.in_parts(lambda m, i: loss_of(m, parts[i]), sizes, len(x), lambda: [7.0])


class Spare(nn.Linear):
    """With a parameter that no loss depends on."""

    def __init__(self) -> None:
        super().__init__(3, 2)
        self.spare = nn.Parameter(torch.ones(2))


@pytest.mark.parametrize("clip", [0.0, 0.1])
@pytest.mark.parametrize("micro", [1, 2, 3, 5, 9])
def test_a_step_in_parts_is_the_step(micro, clip):
    x = torch.randn((5, 3), generator=torch.Generator().manual_seed(1))
    results = []
    for size in (0, micro):
        torch.manual_seed(2)
        module = Spare()
        stepper, told = step_of(module, x, size, clip_norm=clip)
        results.append((told, *module.parameters(), *(p.grad for p in (module.weight, module.bias))))
        assert stepper.layout == {"most": (2,)} and torch.equal(module.spare, torch.ones(2))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert results[1][0][0] == 7 and results[1][0][-1] == 0


def test_a_part_that_is_not_finite_spoils_the_step():
    x = torch.ones(4, 3)
    x[2, 1] = NAN
    torch.manual_seed(2)
    module = nn.Linear(3, 2)
    before = digest(module)
    _, told = step_of(module, x, 1)
    assert told[-1] == 1 and told[1].isnan() and digest(module) == before


# --- a training on one rank


@pytest.mark.parametrize("micro", [1, 2])
def test_interrupted_ends_at_the_same_bits(tmp_path, micro):
    settings = replace(SETTINGS, micro_batch=micro, checkpoint_s=0.0, clip_norm=0.5)
    whole, rest = ToyTask(), ToyTask()
    outcome = train(whole, ALONE, settings, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(rest, ALONE, settings, tmp_path / "parts", stop=StopAt(9))
    assert train(rest, ALONE, settings, tmp_path / "parts", resume=True) == outcome
    a, b = (checkpoint_arrays(tmp_path / name) for name in ("whole", "parts"))
    assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_the_size_of_parts_belongs_to_the_configuration(tmp_path):
    with pytest.raises(Interrupted):
        train(ToyTask(), ALONE, ONE, tmp_path, stop=StopAt(5))
    with pytest.raises(InputError, match="of another training: micro_batch was 1, is 0"):
        train(ToyTask(), ALONE, SETTINGS, tmp_path, resume=True)


def test_bad_steps_are_skipped_and_too_many_begin_anew(tmp_path):
    def factor(attempt: int, step: int) -> float:
        return NAN if attempt == 0 and step in (2, 9, 10, 11) else 1.0

    outcome = train(ToyTask(factor=factor), ALONE, ONE, tmp_path)
    assert outcome.attempts == 2 and outcome.history[0]["skipped"] == 1


def test_the_compiler_is_tried_on_one_part(tmp_path, monkeypatch):
    seen: list[int] = []

    class Watches(ToyTask):
        def loss(self, module, batch, step, attempt):
            seen.append(len(batch["images"]))
            return super().loss(module, batch, step, attempt)

    monkeypatch.setattr(nn.Module, "compile", lambda self: None)
    train(Watches(), ALONE, replace(ONE, compile=True, steps=2, micro_batch=2), tmp_path)
    # its arithmetic is counted on one part as well
    assert seen == [2, 2] + 2 * [2, 2, 1]


@pytest.mark.parametrize("amp", [False, True])
def test_the_real_network_learns_as_before(tmp_path, amp):
    settings = replace(SETTINGS, steps=40, log_every=1, amp=amp, channels_last=True)
    curves = [
        [r["bound"] for r in train(HvaeTask(), ALONE, replace(settings, micro_batch=k), tmp_path / str(k)).history]
        for k in (0, 1)
    ]
    assert np.allclose(*curves, rtol=2e-2 if amp else 1e-3) and curves[1][0] - curves[1][-1] > 0.3


# --- on several ranks

CURVES = """
class Four(HvaeTask):
    batch = 4
class Eight(ToyTask):
    batch = 8
found = {}
with training_group(ctx) as group:
    for name, steps, options in (
        ("Four", 50, dict(micro_batch=1)),
        ("Eight", 50, dict(micro_batch=1, clip_norm=0.2, schedule="cosine")),
        ("Eight", 10, dict(micro_batch=2, channels_last=True)),
        ("Four", 10, dict(micro_batch=1, amp=True)),
        ("Four", 20, dict(micro_batch=0)),
    ):
        label, task = f"{name} {options}", globals()[name](group)
        settings = replace(SETTINGS, steps=steps, log_every=1, **options)
        end = train(task, group, settings, folder / f"{ctx.size} {len(found)}")
        assert group.share(digest(task.module)) == digest(task.module), "parameters differ between ranks"
        found[label] = digest(task.module), end.history
        if ctx.size == 3:
            break
if ctx.rank == 0:
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    """Number of ranks -> digest of the parameters and history of each training."""
    tmp_path = tmp_path_factory.mktemp("curves")
    return {n: json.loads(run_mpi(n, script(tmp_path, CURVES), timeout=300).stdout) for n in (1, 2, 3, 4)}


@pytest.mark.mpi
@pytest.mark.parametrize("n", [2, 4])
def test_two_and_four_ranks_give_the_bits_of_one(curves, n):
    """Parameters, losses, terms and gradients' norms over 50 steps; with dropout, clipping, bfloat16 as well."""
    *in_parts, whole = curves[1]
    assert len(in_parts) == 4 and "'micro_batch': 0" in whole
    for label in in_parts:
        assert all(np.isfinite(record["loss"]) for record in curves[1][label][1])
        assert curves[n][label] == curves[1][label], label
    assert curves[n][whole] != curves[1][whole], "the images of a rank all at once round differently"


@pytest.mark.mpi
def test_three_ranks_differ_by_rounding(curves):
    ((digest_of_three, three),) = curves[3].values()
    digest_of_one, one = curves[1][next(iter(curves[3]))]
    assert len(one) == 50 and digest_of_three != digest_of_one
    assert np.allclose([r["loss"] for r in three], [r["loss"] for r in one], rtol=0, atol=1e-4)


TOGETHER = """
class Other(ToyTask):
    batch = 4
    def start(self, attempt):
        torch.manual_seed(ctx.rank)  # parameters that are not those of the others
        super().start(attempt)
    def loss(self, module, batch, step, attempt):
        loss, terms = super().loss(module, batch, step, attempt)
        bad = attempt == 0 and step in (5, 6, 7) and group.index == group.size - 1
        return loss * (float("nan") if bad else 1.0), terms
settings = replace(SETTINGS, micro_batch=1)
with training_group(ctx) as group:
    task = Other(group)
    end = train(task, group, settings, folder / "whole")
    assert end.attempts == 2 and task.started == [0, 1]
    assert group.share(digest(task.module)) == digest(task.module)
    rest = Other(group)
    try:
        train(rest, group, settings, folder / "parts", stop=StopAt(12 if ctx.rank == ctx.size - 1 else -1))
        raise RuntimeError("not interrupted")
    except Interrupted:
        pass
    assert train(rest, group, settings, folder / "parts", resume=True) == end
    assert digest(rest.module) == digest(task.module)
print("fine")
"""


@pytest.mark.mpi
def test_ranks_begin_skip_stop_and_go_on_together(tmp_path):
    assert run_mpi(2, script(tmp_path, TOGETHER)).stdout.count("fine") == 2


# --- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("amp", [False, True])
def test_in_parts_on_a_gpu(tmp_path, amp):
    """The same curve, and a bad step is skipped there."""
    group = TrainingGroup((0,), 0, "cuda:0")
    settings = replace(SETTINGS, steps=30, log_every=1, amp=amp)

    class Bad(HvaeTask):
        def loss(self, module, batch, step, attempt):
            loss, terms = super().loss(module, batch, step, attempt)
            return loss * (NAN if step == 10 else 1.0), terms

    histories = [train(Bad(group), group, replace(settings, micro_batch=k), tmp_path / str(k)).history for k in (0, 2)]
    assert [r["skipped"] for r in histories[1]] == [int(i == 10) for i in range(30)]
    assert np.allclose(*([r["bound"] or 0 for r in h] for h in histories), rtol=5e-2)
