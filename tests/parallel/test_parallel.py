"""Ranks: detection, shares, sums, failing together."""

from __future__ import annotations

import doctest
import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from mpi_helper import mpi_environment, run_mpi, start_mpi

from cryoiso.core.errors import EXIT_INPUT, EXIT_MISSING, EXIT_REQUEUE, InputError
from cryoiso.core.protocols import Communicator
from cryoiso.parallel import abort, launcher, partition
from cryoiso.parallel.context import Context
from cryoiso.parallel.parent_launchers import hidden_launcher
from cryoiso.parallel.signals import STOP_SIGNALS

RANKS = (1, 2, 3, 4)


# --- who started us


@pytest.mark.parametrize(
    "env, name, size",
    [
        ({"OMPI_COMM_WORLD_SIZE": "4", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, "Open MPI", 4),
        ({"PMI_SIZE": "3", "PMI_RANK": "1", "MPI_LOCALNRANKS": "3"}, "PMI (MPICH, Intel MPI, Cray MPICH)", 3),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "8"}, "srun", 8),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "2"}, "srun", 2),
        ({"PMIX_RANK": "0"}, "PMIx", None),
    ],
)
def test_launcher_is_recognised(env, name, size):
    found = launcher.find_launcher(env)
    assert found is not None and (found.name, found.size) == (name, size)
    assert launcher.wants_mpi(found, env)
    assert launcher.find_launcher({**env, "CRYOISO_MPI": "0"}) is None


@pytest.mark.parametrize("env", [{}, {"SLURM_NTASKS": "8", "SLURM_JOB_ID": "1", "SLURM_PROCID": "0"}])
def test_no_launcher_in_a_plain_shell_or_batch_script(env):
    assert launcher.find_launcher(env) is None
    assert launcher.find_launcher({**env, "CRYOISO_MPI": "1"}) is not None


def test_a_single_rank_needs_no_mpi():
    assert not launcher.wants_mpi(launcher.find_launcher({"PMI_SIZE": "1"}), {"PMI_SIZE": "1"})


def test_serial_context_is_a_communicator():
    ctx: Communicator = Context()
    array = np.arange(5.0)
    assert (ctx.rank, ctx.size) == (0, 1)
    assert ctx.sum_all(array) is array and ctx.sum_to(array, 0) is array
    assert ctx.allgather(7) == [7] and ctx.bcast("x") == "x" and ctx.max_all(2) == 2.0
    assert Context().device("cpu") == "cpu" and Context().nodes == {Context().hostname: [0]}


def test_importing_loads_no_mpi_and_no_torch():
    code = (
        "import sys, cryoiso.parallel.context, cryoiso.parallel.abort, cryoiso.parallel.reduce\n"
        "from cryoiso.parallel.context import get_context\n"
        "assert get_context().size == 1\n"
        "print(sorted(set(sys.modules) & {'mpi4py', 'torch', 'numba'}))"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")}
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env).stdout.strip() == "[]"


def test_ranks_that_do_not_see_each_other_are_an_error():
    """What 'srun --mpi=none' or a foreign mpirun does: every process is alone and believes it is rank 0 of 1."""
    pytest.importorskip("mpi4py", reason="LOUD: mpi4py is not installed")
    env = {**os.environ, "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}
    code = "from cryoiso.parallel.context import get_context\nget_context()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert "started 4 ranks" in done.stderr and ("--mpi=pmi2" in done.stderr or "no MPI library" in done.stderr)


def test_mismatch_exits_69_and_only_the_first_process_speaks():
    pytest.importorskip("mpi4py", reason="LOUD: mpi4py is not installed")
    for procid, messages in (("0", 1), ("3", 0)):
        env = {**os.environ, "SLURM_STEP_ID": "0", "SLURM_PROCID": procid, "SLURM_STEP_NUM_TASKS": "4"}
        command = [sys.executable, "-m", "cryoiso.cli.main", "doctor"]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == EXIT_MISSING and done.stderr.count("error:") == messages, done.stderr
        assert "Traceback" not in done.stderr


def _process(proc, pid, name, parent):
    (proc / str(pid)).mkdir()
    (proc / str(pid) / "stat").write_text(f"{pid} ({name}) S {parent} {pid} 0 0 -1\n")


def test_a_launcher_is_found_in_the_process_tree(tmp_path):
    (tmp_path / "self").mkdir()
    _process(tmp_path, 1, "init", 0)
    _process(tmp_path, 10, "mpirun", 1)
    _process(tmp_path, 11, "hydra_pmi_proxy", 10)
    _process(tmp_path, 20, "a) (b 7", 11)  # what programs call themselves is theirs to choose
    _process(tmp_path, 30, "cryoiso", 20)
    assert hidden_launcher(30, tmp_path) is None  # one rank: nothing to refuse
    _process(tmp_path, 21, "starter", 11)
    assert hidden_launcher(30, tmp_path) == ("hydra_pmi_proxy", 2)
    assert hidden_launcher(20, tmp_path) == ("hydra_pmi_proxy", 2)
    assert hidden_launcher(99, tmp_path) is None  # gone meanwhile, or not to be seen
    _process(tmp_path, 40, "bash", 1)
    assert hidden_launcher(40, tmp_path) is None


@pytest.mark.mpi
@pytest.mark.parametrize("ranks, told, status", [(2, {}, EXIT_MISSING), (1, {}, 0), (2, {"CRYOISO_MPI": "0"}, 0)])
def test_ranks_whose_environment_was_emptied_are_an_error(ranks, told, status):
    """What 'mpirun apptainer exec --cleanenv' does to the ranks inside."""
    script = f"""
import os, subprocess, sys
env = {{k: os.environ[k] for k in ("PATH", "PYTHONPATH")}} | {told}
command = [sys.executable, "-c", "from cryoiso.cli.main import main; main()", "doctor"]
sys.exit(subprocess.run(command, env=env).returncode)
"""
    done = run_mpi(ranks, script, check=False, forks=False)
    assert done.returncode == status, done.stderr
    assert ("its variables did not reach them" in done.stderr) == bool(status)
    assert done.stdout.count("packages     cryoiso ") == (0 if status else ranks), "a rank went on by itself"


# --- shares


def test_doctests():
    failed, tried = doctest.testmod(partition)
    assert tried >= 3 and failed == 0


@pytest.mark.parametrize("n", [0, 1, 2, 5, 64, 1001])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_chunks_are_shared_out_exactly_once_and_evenly(n, size):
    shares = [partition.owned_chunks(n, rank, size) for rank in range(size)]
    assert [c for share in shares for c in share] == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    rows = [partition.owned_rows(n, 8, rank, size) for rank in range(size)]
    assert [r for share in rows for r in share] == list(range(n))
    assert all(share.start % 8 == 0 for share in rows if len(share))


def test_a_rank_that_does_not_exist_owns_nothing():
    with pytest.raises(ValueError, match="rank 3 of 3"):
        partition.owned_chunks(10, 3, 3)
    with pytest.raises(ValueError):
        partition.chunk_bounds(10, 0)


# --- sums

SUMS = """
import numpy as np, sys
from cryoiso.parallel.context import get_context
from cryoiso.parallel import reduce
ctx = get_context()
assert ctx.size == {n}, ctx.size
everybody = [np.random.default_rng(r) for r in range({n})]
for dtype in (np.float64, np.float32, np.int64, np.complex64):
    for shape in ((), (1,), (3, 5, 7), (1001,)):
        all_parts = [(1e6 * g.standard_normal(shape)).astype(dtype) * (1 + g.integers(0, 9)) for g in everybody]
        all_parts = [np.asarray(p, dtype) for p in all_parts]
        expected = all_parts[0].copy()
        for p in all_parts[1:]:
            expected = (expected + p).astype(dtype)   # in rank order: the result must have these very bits
        mine = all_parts[ctx.rank]
        got = ctx.sum_all(mine.copy())
        assert got.dtype == dtype and got.shape == shape, (got.dtype, got.shape)
        assert np.array_equal(got, expected), (dtype, shape)
        if ctx.size > 1:
            small = reduce.sum_all(ctx.comm, mine.copy(), slab_bytes=100)
            assert np.array_equal(small, expected), ("slabs", dtype, shape)
        for root in range(ctx.size):
            there = ctx.sum_to(mine.copy(), root)
            assert (there is not None) == (ctx.rank == root)
            if there is not None:
                assert np.array_equal(there, expected), (dtype, shape, root)
        transposed = ctx.sum_all(np.array(mine, order="F"))
        assert np.array_equal(transposed, expected)
        sent = ctx.bcast(mine if ctx.rank == ctx.size - 1 else None, ctx.size - 1)
        assert np.array_equal(sent, all_parts[-1]) and sent.shape == shape
assert ctx.allgather(ctx.rank) == list(range(ctx.size))
assert ctx.gather(2 * ctx.rank, 0) == (None if ctx.rank else [2 * r for r in range(ctx.size)])
assert ctx.max_all(float(ctx.rank)) == ctx.size - 1
for shape in ((), (3,), (2, 5)):
    parts = [np.arange(r * int(np.prod(shape)), dtype=np.int32).reshape(r, *shape) + r for r in range({n})]
    found = ctx.concat_all(parts[ctx.rank])   # rank 0 has no row
    assert found.dtype == np.int32 and np.array_equal(found, np.concatenate(parts)), (shape, found)
assert sum(ctx.nodes.values(), []) == list(range(ctx.size))
assert 0 <= ctx.local_rank < ctx.local_size
assert ctx.stop_requested() is False
ctx.barrier()
print("fine")
"""


@pytest.mark.mpi
@pytest.mark.parametrize("n", RANKS)
def test_sums_and_exchanges(n):
    assert run_mpi(n, SUMS.format(n=n)).stdout.count("fine") == n


@pytest.mark.mpi
def test_integer_sums_do_not_depend_on_the_number_of_ranks():
    """Fixed-point accumulation: the same particles on any number of ranks give the same bits."""
    script = """
import hashlib, numpy as np
from cryoiso.parallel.context import get_context
from cryoiso.parallel.partition import owned_rows
ctx = get_context()
data = np.random.default_rng(1).integers(-2**40, 2**40, (1000, 50))
mine = owned_rows(1000, 16, ctx.rank, ctx.size)
total = ctx.sum_all(data[mine.start:mine.stop].sum(0))
if ctx.rank == 0:
    print(hashlib.sha256(total.tobytes()).hexdigest())
"""
    assert len({run_mpi(n, script).stdout for n in RANKS}) == 1


@pytest.mark.mpi
def test_ranks_of_a_node_share_its_cores():
    script = """
import os
from cryoiso.parallel.context import get_context
get_context()
print("threads", os.environ["OMP_NUM_THREADS"])
"""
    cores = len(os.sched_getaffinity(0))
    env = {"OMP_NUM_THREADS": "", "NUMBA_NUM_THREADS": ""}
    assert run_mpi(2, script, env=env).stdout.count(f"threads {max(1, cores // 2)}") == 2
    assert run_mpi(2, script, env={"OMP_NUM_THREADS": "3"}).stdout.count("threads 3") == 2


# --- failing together

GUARDED = """
import time, sys
from cryoiso.core.errors import InputError, Interrupted
from cryoiso.parallel.abort import agree, guard, on_root
from cryoiso.parallel.context import get_context
ctx = get_context()
def bad():
    raise InputError("no such stack", file="a.mrcs", code="file-not-found")
with guard(ctx):
    {body}
print("reached the end")
"""


def _guarded(n: int, body: str):
    return run_mpi(n, GUARDED.format(body=body.replace("\n", "\n    ")), 60, check=False)


def said(done) -> list[str]:
    """The error lines of the program itself; launchers add their own remarks."""
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


@pytest.mark.mpi
@pytest.mark.parametrize("n", RANKS)
def test_common_error_is_said_once(n):
    done = _guarded(n, "on_root(ctx, bad)")
    assert done.returncode == EXIT_INPUT
    assert said(done) == ["error: a.mrcs: no such stack [file-not-found]"] and done.stdout == ""


@pytest.mark.mpi
@pytest.mark.parametrize("n", (2, 4))
def test_one_ranks_error_ends_all(n):
    start = time.monotonic()
    done = _guarded(n, "if ctx.rank == 1: bad()\nctx.barrier()\ntime.sleep(100)")
    assert time.monotonic() - start < 50, "the other ranks were left waiting"
    assert done.returncode == EXIT_INPUT
    assert done.stderr.startswith("error: rank 1 on ") and "no such stack" in done.stderr.splitlines()[0]
    assert done.stderr.count("error: ") == 1 and "reached" not in done.stdout


@pytest.mark.parametrize("kind", ("pipe", "socket"))
def test_what_the_launcher_has_not_read_yet_is_waited_for(kind):
    if kind == "pipe":
        reader, writer = os.pipe()
    else:
        ours, theirs = socket.socketpair()
        reader, writer = theirs.detach(), ours.detach()
    try:
        assert abort._unread_bytes(writer) == 0
        os.write(writer, b"error: no such stack")
        assert abort._unread_bytes(writer) > 0
        os.read(reader, 100)
        assert abort._unread_bytes(writer) == 0
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.mpi
def test_same_error_on_every_rank_is_said_once():
    done = _guarded(4, "bad()")
    assert done.returncode == EXIT_INPUT and done.stderr.count("error: ") == 1
    assert done.stderr.startswith("error: rank 0 on ")


@pytest.mark.mpi
def test_agree_raises_the_lowest_ranks_error_everywhere():
    error = "InputError(f'row {ctx.rank}', code='value-not-a-number')"
    body = f"agree(ctx, None)\nagree(ctx, {error} if ctx.rank in (1, 2) else None)"
    done = _guarded(3, body)
    assert done.returncode == EXIT_INPUT and said(done) == ["error: row 1 [value-not-a-number]"]


@pytest.mark.mpi
def test_unexpected_exception_ends_all_with_exit_1():
    done = _guarded(3, "if ctx.rank == 2: 1 / 0\nctx.barrier()")
    assert done.returncode == 1 and "rank 2 on " in done.stderr and "ZeroDivisionError" in done.stderr


def test_on_root_alone_returns_and_raises():
    assert abort.on_root(Context(), lambda a, b=1: a + b, 2, b=3) == 5

    def bad():
        raise InputError("x", code="value-not-a-number")

    with pytest.raises(InputError, match="x"):
        abort.on_root(Context(), bad)


@pytest.mark.mpi
def test_killed_rank_takes_the_others_down():
    script = """
import os, signal, time
from cryoiso.parallel.abort import guard
from cryoiso.parallel.context import get_context
ctx = get_context()
with guard(ctx):
    ctx.barrier()
    if ctx.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ctx.barrier()
    time.sleep(100)
"""
    start = time.monotonic()
    done = run_mpi(3, script, 60, check=False)
    assert done.returncode != 0 and time.monotonic() - start < 50


STOPPABLE = """
import signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
from cryoiso.core.errors import Interrupted
from cryoiso.parallel.abort import guard
from cryoiso.parallel.context import get_context
ctx = get_context()
ctx.install_signal_handlers()
with guard(ctx):
    ctx.barrier()
    if ctx.rank == ctx.size - 1:
        print("ready", __import__("os").getpid(), flush=True)
    for step in range(400):
        time.sleep(0.05)
        if ctx.stop_requested():
            raise Interrupted("stopped by a signal; resume goes on")
"""


@pytest.mark.mpi
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signal_to_one_rank_stops_all_in_an_orderly_way(number):
    process = start_mpi(3, STOPPABLE, mpi_environment())
    line = process.stdout.readline()
    os.kill(int(line.split()[1]), number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == EXIT_REQUEUE, err
    assert err.count("error: stopped by a signal") == 1


# --- who speaks


@pytest.mark.mpi
def test_a_group_without_rank_0_tells_its_end_and_rank_0_that_it_waits():
    """Of what two groups do side by side people see both ends; of all else what rank 0 says."""
    code = """
import logging, time
from cryoiso.cli.common import log_to_stderr
from cryoiso.core.log import BY_ANY_RANK, ProgressLine
from cryoiso.parallel import group_stop
from cryoiso.parallel.context import get_context
comm = get_context()
log_to_stderr(comm.rank)
group_stop.TELL_AFTER_S = 0.3
with group_stop.side_by_side(comm):
    time.sleep(1.5 * comm.rank)
    logging.getLogger("cryoiso").warning(f"usual {comm.rank}")
    logging.getLogger("cryoiso").warning(f"odd {comm.rank}", extra=BY_ANY_RANK)
    ProgressLine(f"half {comm.rank + 1}", 1).close("done")
"""
    said = run_mpi(2, code).stderr
    lines = [line.split("  ", 1)[1] for line in said.splitlines() if "  " in line]
    waits = "rank 0 is through and waits for ranks that work on something else"
    assert lines[:4] == ["warning: usual 0", "warning: odd 0", "half 1: done (0 s)", waits]
    assert lines[4:] == ["warning: odd 1", "half 2: done (0 s)"]


@pytest.mark.mpi
def test_an_error_in_one_rank_of_a_tests_script_ends_the_others():
    """They would wait for it until the test's time is over, and nobody would see the error."""
    script = """
from cryoiso.parallel.context import get_context
comm = get_context()
if comm.rank == 0:
    raise AttributeError("a helper has lost its name")
comm.barrier()
"""
    done = run_mpi(2, script, timeout=60, check=False)
    assert done.returncode != 0
    assert "a helper has lost its name" in done.stderr
