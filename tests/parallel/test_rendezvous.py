"""How the ranks of a training group find each other: by MPI, with no port that answers anybody else."""

from __future__ import annotations

import socket
from datetime import timedelta
from pathlib import Path

import pytest
from mpi_helper import run_mpi
from torch.distributed import TCPStore
from train_helper import script

LISTENING = """
def listening():
    "(address, port) of every socket that this process listens on."
    inodes = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            link = os.readlink("/proc/self/fd/" + name)
        except OSError:
            continue
        if link.startswith("socket:["):
            inodes.add(link[8:-1])
    found = set()
    for kind in ("tcp", "tcp6"):
        for line in open("/proc/net/" + kind).read().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and words[9] in inodes:
                host, port = words[1].split(":")
                found.add((host, int(port, 16)))
    return found
"""

OUTSIDER = (
    LISTENING
    + """
sys.path.insert(0, sys.argv[2])
from test_rendezvous import GREETINGS, answers
before = listening()
with training_group(ctx) as group:
    opened = sorted(listening() - before)
    heard = b""
    for host, port in opened:
        for words in GREETINGS:
            heard += answers(port, words)
    total = group.all_sum(torch.arange(3.0) + group.index).tolist()
print("opened", json.dumps(opened), flush=True)
print("heard", heard, "total", total, flush=True)
"""
)


GREETINGS = (b"\0\xce\xf7\x85\x3c\x0d\x01\0\0\0", b"GET / HTTP/1.0\r\n\r\n", bytes(8))
"""The first is what a client of torch's TCPStore says: validate, a magic number, ping, a number to be sent back."""


def answers(port: int, words: bytes) -> bytes:
    """What a port of this host says to somebody who connects and says these words."""
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.settimeout(0.5)
        connection.sendall(words)
        try:
            return connection.recv(4096)
        except OSError:
            return b""


def test_the_store_of_torch_answers_anybody():
    """The control: with the store that is not used here, the outsider's words do get an answer."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    assert answers(store.port, GREETINGS[0]) == b"\x01\0\0\0"


@pytest.mark.mpi
def test_an_outsider_gets_nothing_and_changes_nothing(tmp_path):
    done = run_mpi(2, script(tmp_path, OUTSIDER, Path(__file__).parent), 180)
    opened = [line for line in done.stdout.splitlines() if line.startswith("opened ")]
    assert len(opened) == 2 and "[[" in opened[0], done.stdout
    for line in opened:  # 0100007F is 127.0.0.1: on one host nothing of the group can be seen from outside
        assert line.count("0100007F") == line.count("[") - 1 >= 1
    assert done.stdout.count("heard b'' total [1.0, 3.0, 5.0]") == 2


STORE = """
from mpi4py import MPI
from datetime import timedelta
from cryoiso.parallel.rendezvous_store import group_store
members = (0, 2) if ctx.rank in (0, 2) else (1,)
store = group_store(ctx.comm, members, members.index(ctx.rank), 1.0)
if ctx.rank == 1:
    assert store is None
else:
    index = members.index(ctx.rank)
    store.set(f"address/{index}", bytes([index, 0, 255]))
    assert store.get("address/0") == b"\\x00\\x00\\xff" and store.get("address/1") == b"\\x01\\x00\\xff"
    if index:
        store.set("never read", "by the other")
    assert not store.check(["nobody's"])
    try:
        store.wait(["nobody's"], timedelta(seconds=0.2))
    except RuntimeError as error:
        assert "has set \\"nobody's\\" within 0 s" in str(error)
    else:
        raise AssertionError("waited for nothing")
    store.settle()
    assert store.get("never read") == b"by the other" and store.num_keys() == 3
    store.set("later", b"stays here")
    assert store.delete_key("later") and not store.delete_key("later")
print("store is right", flush=True)
"""


@pytest.mark.mpi
def test_each_member_gets_every_key_and_nobody_else_takes_part(tmp_path):
    assert run_mpi(3, script(tmp_path, STORE)).stdout.count("store is right") == 3


def test_a_rank_alone_needs_no_store(monkeypatch):
    from cryoiso.parallel import ddp, rendezvous_store
    from cryoiso.parallel.context import Context

    monkeypatch.setattr(rendezvous_store, "group_store", None)
    with ddp.training_group(Context(), device="cpu", timeout_s=1.0) as group:
        assert group.share({"a": [1.5, None]}) == {"a": [1.5, None]} and group.share_arrays({}) == {}


SHARED = """
import numpy as np
with training_group(ctx) as group:
    arrays = {"weights": np.arange(6, dtype=np.float32).reshape(2, 3), "step": np.array(7), "empty": np.empty((0, 2))}
    got = group.share_arrays(arrays if group.is_first else {})
    same = all(np.array_equal(arrays[k], got[k]) and arrays[k].dtype == got[k].dtype for k in arrays)
    plain = group.share({"history": [1e-300, 0.1, None], "reason": "é"} if group.is_first else 3)
    print("shared", same and len(got) == 3, plain == {"history": [1e-300, 0.1, None], "reason": "é"}, flush=True)
    if group.is_first:
        try:
            group.share(object())
        except TypeError:
            print("only data", flush=True)
"""


@pytest.mark.mpi
def test_only_data_are_shared_with_the_group(tmp_path):
    done = run_mpi(2, script(tmp_path, SHARED), env={"TORCH_DIST_INIT_BARRIER": "1"})  # some sites set it
    assert done.stdout.count("shared True True") == 2 and done.stdout.count("only data") == 1
