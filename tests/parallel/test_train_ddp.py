"""Training on several ranks: the same curve as on one, groups side by side, stopping and failing together."""

from __future__ import annotations

import doctest
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from mpi_helper import find_mpirun, mpi_environment, run_mpi, start_mpi
from test_parallel import said
from test_two_hosts import VNODE, hosts  # noqa: F401
from train_helper import ALONE, SETTINGS, HvaeTask, PlainTask, ToyTask, digest, script

from cryoiso.core.errors import EXIT_INPUT, EXIT_REQUEUE, CryoisoError, Interrupted
from cryoiso.parallel import ddp, rendezvous_address
from cryoiso.parallel.context import Context
from cryoiso.parallel.group_stop import group_wide, side_by_side
from cryoiso.train.loop import CHECKPOINT, train


def test_doctests():
    failed, tried = doctest.testmod(ddp)
    assert tried and not failed


# --- one rank, no mpirun


def test_one_rank_needs_no_torch_distributed():
    import torch
    import torch.distributed as dist

    with ddp.training_group(Context(), device="cpu") as group:
        assert (group.index, group.size, group.backend) == (0, 1, "")
        module, values = torch.nn.Linear(2, 2), torch.ones(3)
        assert group.wrap(module) is module and torch.equal(group.all_mean(values), values)
        assert group.share({"a": 1}) == {"a": 1}
        assert not dist.is_initialized()


@pytest.mark.parametrize("error", [None, Interrupted("stop"), CryoisoError("failed", code="training-diverged")])
def test_alone_side_by_side_is_nothing_special(error):
    def both():
        with side_by_side(Context()) as stop_signal:
            assert not stop_signal.received()
            if error is not None:
                raise error

    if error is None:
        both()
    else:
        with pytest.raises(type(error), match=str(error)):
            both()


def test_errors_of_a_group_keep_their_kind():
    assert group_wide(Interrupted("x")).exit_code == EXIT_REQUEUE


@pytest.mark.parametrize("size", range(1, 9))
def test_halves_share_the_ranks(size):
    one, two = ddp.ranks_of_half(1, size), ddp.ranks_of_half(2, size)
    if size == 1:
        assert list(one) == list(two) == [0]
    else:
        assert [*one, *two] == list(range(size)) and 0 <= len(one) - len(two) <= 1


def test_a_host_finds_its_own_addresses_and_interfaces():
    assert rendezvous_address.interfaces().get("127.0.0.1") == "lo"
    assert (
        rendezvous_address.candidates(True)[0] == "127.0.0.1"
        and rendezvous_address.candidates(False)[-1] == "127.0.0.1"
    )
    with rendezvous_address.Beacon(8, rendezvous_address.candidates(False)) as beacon:
        offers = ["127.0.0.1", "192.0.2.1"]  # the second is reserved for documentation: nobody answers
        assert rendezvous_address.reachable(offers, beacon.port, limit_s=0.2) == {"127.0.0.1": "lo"}
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        assert rendezvous_address.reachable(["127.0.0.1"], closed.getsockname()[1]) == {}


def test_the_users_interface_comes_first(monkeypatch):
    monkeypatch.setenv(rendezvous_address.GLOO_INTERFACE, "lo")
    assert rendezvous_address.candidates(False)[0] == "127.0.0.1"


# --- the same training on any number of ranks

SAME = """
results = []
with training_group(ctx) as group:
    for task in (HvaeTask(group), PlainTask(group)):  # 6 images a step, and 5: 3 and 2, or 2, 2 and 1
        end = train(task, group, replace(SETTINGS, steps=50, log_every=1), folder / f"{ctx.size}{type(task).__name__}")
        results.append(end.history)
        assert group.share(digest(task.module)) == digest(task.module), "parameters differ between ranks"
if ctx.rank == 0:
    print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    """Number of ranks -> histories of both tasks."""
    tmp_path = tmp_path_factory.mktemp("curves")
    settings = replace(SETTINGS, steps=50, log_every=1)
    alone = [train(task, ALONE, settings, tmp_path / type(task).__name__) for task in (HvaeTask(), PlainTask())]
    several = {n: json.loads(run_mpi(n, script(tmp_path, SAME)).stdout) for n in (2, 3)}
    return {1: [outcome.history for outcome in alone], **several}


def values(history, name: str) -> np.ndarray:
    return np.array([record[name] for record in history])


@pytest.mark.mpi
@pytest.mark.parametrize("n", [2, 3])
def test_several_ranks_follow_the_curve_of_one(curves, n):
    hvae, plain = curves[1]
    assert len(hvae) == 50 and values(hvae, "bound")[0] - values(hvae, "bound")[-1] > 0.3, "it learns"
    for name in ("loss", "bound", "kl"):
        assert np.allclose(values(hvae, name), values(curves[n][0], name), rtol=0, atol=1e-4), name
    for name in ("loss", "rows", "gradient_norm"):
        assert np.allclose(values(plain, name), values(curves[n][1], name), rtol=1e-4), name


RESUMED = """
with training_group(ctx) as group:
    def go(name, **options):
        task = ToyTask(group)
        end = train(task, group, SETTINGS, folder / name, **options)
        return digest(task.module), end
    whole = go("whole")
    for stop in (1, 2, 7):
        try:
            # one rank alone asks for it
            go("parts", stop=StopAt(stop if ctx.rank == ctx.size - 1 else -1), resume=stop > 1)
            raise RuntimeError("not interrupted")
        except Interrupted as caught:
            assert (folder / "parts/checkpoint/state.npz").exists() and "training was stopped after step" in str(caught)
    assert go("parts", resume=True) == whole
    class Nan(ToyTask):
        def loss(self, module, batch, step, attempt):
            loss, terms = super().loss(module, batch, step, attempt)
            bad = attempt == 0 and step in (5, 6, 7) and group.index == group.size - 1
            return loss * (float("nan") if bad else 1.0), terms
    task = Nan(group)
    assert train(task, group, SETTINGS, folder / "nan").attempts == 2
    assert task.started == [0, 1] and group.share(digest(task.module)) == digest(task.module)
    torch.nn.Module.compile = lambda self: None  # what a compiler that works does to the loop
    task = ToyTask(group)
    train(task, group, replace(SETTINGS, compile=True), folder / "compiled")
    assert digest(task.module) == whole[0]
print("fine")
"""


@pytest.mark.mpi
def test_interrupted_on_three_ranks_ends_at_the_same_bits(tmp_path):
    """And one rank's NaN is everybody's; and trying the compiler does not disturb the exchange of gradients."""
    assert run_mpi(3, script(tmp_path, RESUMED)).stdout.count("fine") == 3


# --- groups

GROUPS = """
half = 1 if ctx.rank in ranks_of_half(1, ctx.size) else 2
steps = {1: 40, 2: 8}[half]
for turn in range(2):
    with side_by_side(ctx) as stop_signal, training_group(ctx, ranks_of_half(half, ctx.size)) as group:
        assert group.size == len(ranks_of_half(half, ctx.size)) and group.ranks[group.index] == ctx.rank
        task = ToyTask(group, seed=half)
        end = train(task, group, replace(SETTINGS, steps=steps, seed=half), folder / f"{turn}half{half}",
                    stop=stop_signal.received)
    assert not torch.distributed.is_initialized()
found = ctx.allgather((half, digest(task.module), end.history[-1]["loss"]))
# a rank that trains in no group, and groups that members do not agree upon
with training_group(ctx, range(1)) as group:
    assert group.index == (0 if ctx.rank == 0 else -1)
try:
    training_group(ctx, range(ctx.size) if ctx.rank else range(1))
    raise RuntimeError("accepted")
except ValueError as error:
    assert "to train with ranks" in str(error)
if ctx.rank == 0:
    print(json.dumps(found))
"""


@pytest.mark.mpi
@pytest.mark.parametrize("n", [2, 3])
def test_two_groups_train_side_by_side_each_as_if_alone(tmp_path, n):
    found = json.loads(run_mpi(n, script(tmp_path, GROUPS)).stdout)
    for half, steps in ((1, 40), (2, 8)):
        task = ToyTask(seed=half)
        alone = train(task, ALONE, replace(SETTINGS, steps=steps, seed=half), tmp_path / f"alone{half}")
        mine = [(mark, loss) for h, mark, loss in found if h == half]
        assert len(mine) == len(ddp.ranks_of_half(half, n)) and len(set(mine)) == 1
        if len(mine) == 1:
            assert mine[0] == (digest(task.module), alone.history[-1]["loss"])


SIGNALLED = """
half = 1 if ctx.rank in ranks_of_half(1, ctx.size) else 2
class Slow(ToyTask):
    def loss(self, module, batch, step, attempt):
        if sys.argv[2] == "begin":
            if step == 3:
                print("ready", half, group.index, os.getpid(), flush=True)
            time.sleep(0.0 if half == int(sys.argv[3]) else 0.25)
        return super().loss(module, batch, step, attempt)
with side_by_side(ctx) as stop_signal, training_group(ctx, ranks_of_half(half, ctx.size)) as group:
    task = Slow(group, seed=half)
    train(task, group, SETTINGS, folder / f"half{half}", stop=stop_signal.received, resume=sys.argv[2] == "resume")
print("end", half, digest(task.module), flush=True)
"""


@pytest.mark.mpi
@pytest.mark.parametrize("fast", [0, 2], ids=["while both train", "after its own group is done"])
def test_a_signal_to_one_rank_stops_both_groups_with_checkpoints(tmp_path, fast):
    process = start_mpi(3, script(tmp_path, SIGNALLED, "begin", fast), mpi_environment())
    ready = {}
    while len(ready) < 3:
        word, half, index, pid = process.stdout.readline().split()
        assert word == "ready"
        ready[int(half), int(index)] = int(pid)
    if fast:
        time.sleep(1.0)
    os.kill(ready[2, 0], signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == EXIT_REQUEUE and "end" not in out, (out, err)
    assert len(said(process_result(err))) == 1 and "training was stopped after step" in err
    assert all((tmp_path / f"half{half}" / CHECKPOINT).exists() for half in (1, 2))
    if not fast:
        ends = run_mpi(3, script(tmp_path, SIGNALLED, "resume", 0)).stdout.split("\n")
        task = ToyTask(seed=2)
        train(task, ALONE, SETTINGS, tmp_path / "alone")
        assert f"end 2 {digest(task.module)}" in ends


def process_result(err: str):
    return subprocess.CompletedProcess([], 0, "", err)


FAILING = """
half = 1 if ctx.rank in ranks_of_half(1, ctx.size) else 2
with side_by_side(ctx) as stop_signal, training_group(ctx, ranks_of_half(half, ctx.size)) as group:
    task = ToyTask(group, factor=lambda attempt, step: float("nan") if half == 2 else 1.0)
    train(task, group, replace(SETTINGS, steps=10**6), folder / f"half{half}", stop=stop_signal.received)
print("end")
"""
DYING = """
half = 1 if ctx.rank in ranks_of_half(1, ctx.size) else 2
class Dies(ToyTask):
    def prepare(self, step):
        if ctx.rank == 1 and step == 5:
            raise InputError("no such image", file="a.mrcs", code="stack-too-short")
        return super().prepare(step)
with side_by_side(ctx) as stop_signal, training_group(ctx, ranks_of_half(half, ctx.size)) as group:
    train(Dies(group), group, replace(SETTINGS, steps=10**6), folder / f"half{half}", stop=stop_signal.received)
print("end")
"""


@pytest.mark.mpi
def test_a_group_that_fails_stops_the_other_and_speaks_once(tmp_path):
    start = time.monotonic()
    done = run_mpi(3, script(tmp_path, FAILING), 90, check=False)
    assert done.returncode == 1 and "end" not in done.stdout and time.monotonic() - start < 80
    (message,) = said(done)
    assert "training was tried 3 times and failed" in message
    assert (tmp_path / "half1" / CHECKPOINT).exists(), "the other group's work is not lost"


@pytest.mark.mpi
def test_a_rank_that_fails_alone_ends_all(tmp_path):
    start = time.monotonic()
    done = run_mpi(3, script(tmp_path, DYING), 90, check=False)
    assert done.returncode == EXIT_INPUT and "end" not in done.stdout and time.monotonic() - start < 80
    (message,) = said(done)
    assert message.startswith("error: rank 1 on ") and "a.mrcs: no such image" in message


CLEAN = """
for turn in range(2):
    start = time.monotonic()
    try:
        with training_group(ctx, timeout_s=3.0) as group:
            assert torch.distributed.is_initialized()
            if turn == 0:
                raise CryoisoError("all fail", code="training-diverged")
            if group.index == 0:
                group.barrier()  # nobody comes
            else:
                time.sleep(6)
    except CryoisoError:
        pass
    except RuntimeError as error:
        print("waited", 2 < time.monotonic() - start < 60)
    assert not torch.distributed.is_initialized()
    ctx.wait_for_all()
with training_group(ctx) as group:
    print("works again", group.all_sum(torch.ones(1)).item(), flush=True)
"""


@pytest.mark.mpi
def test_errors_leave_nothing_behind_and_nobody_waits_for_ever(tmp_path):
    done = run_mpi(2, script(tmp_path, CLEAN))
    assert done.stdout.count("works again 2.0") == 2 and done.stdout.count("waited True") == 2


@pytest.mark.mpi
def test_over_two_network_hosts(hosts, tmp_path):  # noqa: F811
    """Each host has an address and an interface of its own."""
    if "HYDRA" not in subprocess.run([str(find_mpirun()), "--version"], capture_output=True, text=True).stdout:
        pytest.skip("LOUD: this test speaks to MPICH's mpirun")
    launcher = [str(find_mpirun()), "-launcher", "rsh", "-launcher-exec", VNODE, "-hosts", "n1:1,n2:2", "-n", "3"]
    body = """
with training_group(ctx) as group:
    task = ToyTask(group)
    end = train(task, group, SETTINGS, folder / "two")
    print("hosts", sorted(ctx.nodes), digest(task.module) == group.share(digest(task.module)), flush=True)
"""
    words = [VNODE, "n1", *launcher, sys.executable, *map(str, script(tmp_path, body))]
    done = subprocess.run(words, env=mpi_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("hosts ['n1', 'n2'] True") == 3


@pytest.mark.gpu
@pytest.mark.mpi
def test_two_ranks_on_gpus_follow_the_curve_of_one(tmp_path):
    """Through NCCL where each rank has a GPU of its own, else through gloo."""
    body = """
losses = []
with training_group(ctx, device=ctx.device("cuda")) as group:
    for k in (0, 1):
        settings = replace(SETTINGS, steps=30, log_every=1, micro_batch=k)
        outcome = train(HvaeTask(group), group, settings, folder / f"gpu{ctx.size}{k}")
        losses.append([r["loss"] for r in outcome.history])
if ctx.rank == 0:
    print(json.dumps(losses))
"""
    one, two = (json.loads(run_mpi(n, script(tmp_path, body)).stdout.splitlines()[-1]) for n in (1, 2))
    assert np.allclose(one, two, rtol=2e-2)


def test_helper_tasks_are_not_the_same():
    """The tests above compare trainings: different seeds and networks must be told apart by ``digest``."""
    import torch

    marks = set()
    for task in (ToyTask(), HvaeTask()):
        for seed in (1, 2):
            torch.manual_seed(seed)
            marks.add(digest(task.make()))
    assert len(marks) == 4
