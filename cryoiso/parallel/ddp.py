"""Data-parallel training: the only home of torch.distributed. Its rendezvous is carried by MPI.

Every group of ranks is a torch.distributed world of its own, so that two generators can be trained side by side. One
rank alone needs none of it.
"""

from __future__ import annotations

import io
import json
import os
import socket
import threading
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cryoiso.core.errors import MissingError
from cryoiso.core.log import logger
from cryoiso.core.protocols import Communicator
from cryoiso.parallel import rendezvous_address
from cryoiso.parallel.pairwise_sum import sum_in_pairs
from cryoiso.parallel.rendezvous_store import group_store

TIMEOUT_S = 900.0
"""A rank that waits longer than this for the others of its group fails."""
_LEAVE_S = 10.0
BARRIER = "TORCH_DIST_INIT_BARRIER"
"""By this variable torch lets the ranks of a new group meet through the store, where they count themselves."""


def ranks_of_half(half: int, size: int) -> range:
    """The ranks that train on half-set 1 or 2: side by side where there are two ranks or more.

    >>> [(list(ranks_of_half(1, n)), list(ranks_of_half(2, n))) for n in (1, 2, 3)]
    [([0], [0]), ([0], [1]), ([0, 1], [2])]
    """
    first = size // 2 + size % 2
    return range(size) if size == 1 else range(first) if half == 1 else range(first, size)


class TrainingGroup:
    """Ranks that train one model; also the group of one rank, which needs no torch.distributed.

    Attributes:
        ranks: of the program.
        index: this rank's place in the group, -1 if it is not a member.
        size: number of ranks.
        device: torch device of this rank.
        backend: "nccl", "gloo", or "" for one rank.
    """

    def __init__(self, ranks: Sequence[int], index: int, device: str, backend: str = "", store: Any = None) -> None:
        self.ranks, self.index, self.size, self.device = tuple(ranks), index, len(ranks), device
        self.backend, self._store = backend, store
        # A worker thread of gloo that drops the last reference to a piece of work needs Python's lock for that, and if
        # Python is about to exit, the process aborts: so the last few are kept here.
        self._works: deque[Any] = deque(maxlen=4)

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what the group writes."""
        return self.index == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with gradients averaged over the group in backward(), parameters of the first rank for all."""
        if self.size == 1:
            return module
        from torch.nn.parallel import DistributedDataParallel

        # weights of 1 x 1 convolutions have two descriptions of one layout, which torch takes for two layouts
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        on_gpu = torch.device(self.device).type == "cuda"
        devices = [torch.device(self.device)] if on_gpu else None
        wrapped = DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True)
        if not on_gpu:
            wrapped.register_comm_hook(self, _average_in_pairs)
        return wrapped

    def spread(self, module: nn.Module) -> nn.Module:
        """The same module, with parameters and buffers of the first rank for all; no gradients. Collective."""
        if self.size > 1:
            state = {name: value.cpu().numpy() for name, value in module.state_dict().items()}
            shared = self.share_arrays(state if self.is_first else {})
            module.load_state_dict({name: torch.from_numpy(value) for name, value in shared.items()})
        return module

    def sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Overwrites tensors with their sums over the group, on CPUs added in pairs of ranks. Collective."""
        if self.size == 1:
            return
        import torch.distributed as dist

        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        if flat.device.type == "cpu":
            flat = _sum_slices(self, flat)
        else:
            self.finish(dist.all_reduce(flat, async_op=True))
        for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(total.view(gradient.shape))

    def all_sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over the group, the same bits on every rank; on CPUs added in pairs of ranks. Collective."""
        if self.size == 1:
            return values
        import torch.distributed as dist

        if values.device.type == "cpu":
            copies = torch.empty((self.size, values.numel()), dtype=values.dtype)
            self.finish(dist.all_gather(list(copies), values.contiguous().view(-1), async_op=True))
            return _sum_rows(copies).view(values.shape)
        total = values.clone()
        self.finish(dist.all_reduce(total, async_op=True))
        return total

    def all_mean(self, values: Tensor) -> Tensor:
        """Element-wise mean over the group. Collective."""
        return self.all_sum(values) / self.size

    def share(self, value: Any) -> Any:
        """The first rank's value on every rank: None, numbers, text, lists and dicts of them. Collective."""
        if self.size == 1:
            return value
        return json.loads(self._broadcast(json.dumps(value).encode() if self.is_first else b""))

    def share_arrays(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The first rank's arrays on every rank; those of the others are not looked at. Collective."""
        if self.size == 1:
            return arrays
        packed = io.BytesIO()
        if self.is_first:
            np.savez(packed, allow_pickle=False, **arrays)
        with np.load(io.BytesIO(self._broadcast(packed.getvalue())), allow_pickle=False) as shared:
            return {name: shared[name] for name in shared.files}

    def _broadcast(self, message: bytes) -> bytes:
        """The first rank's bytes on every rank. What arrives is data: nothing of it is ever run."""
        import torch.distributed as dist

        data = torch.frombuffer(bytearray(message or b" "), dtype=torch.uint8)
        length = torch.tensor([len(data)])
        self.finish(dist.broadcast(length, 0, async_op=True))
        if not self.is_first:
            data = torch.empty(int(length), dtype=torch.uint8)
        self.finish(dist.broadcast(data, 0, async_op=True))
        return data.numpy().tobytes()

    def finish(self, work: Any) -> None:
        """Waits for a collective call that was begun with ``async_op=True``."""
        self._works.append(work)
        work.wait()

    def barrier(self) -> None:
        """Waits for all ranks of the group."""
        self.all_sum(torch.zeros(1))

    def close(self, failed: bool = False) -> None:
        """Leaves torch.distributed; the group is of no use afterwards. Never waits long after a failure."""
        if self.backend:
            try:
                if not failed:
                    self.barrier()
            except RuntimeError:
                failed = True
                raise
            finally:
                self.backend = ""
                _leave(failed)
                self._store = None

    def __enter__(self) -> TrainingGroup:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(failed=error is not None)


def training_group(
    comm: Communicator, ranks: Sequence[int] | None = None, device: str | None = None, timeout_s: float = TIMEOUT_S
) -> TrainingGroup:
    """Brings the ranks of a group together (collective over all ranks of ``comm``, members or not).

    Several groups are made in one call if ranks name different groups; each rank gets the one it named.

    Args:
        comm: all ranks.
        ranks: members, the same on every member; None: all.
        device: of this rank; default ``comm.device()``.
        timeout_s: a collective call of the group fails after this long.

    Returns:
        A context manager; leave it to clean up.

    Raises:
        MissingError: members cannot reach each other over any network (on all ranks).
        ValueError: members name different groups (on all ranks).
    """
    members = tuple(range(comm.size) if ranks is None else ranks)
    device = device or comm.device()
    everybody = comm.allgather((members, socket.gethostname(), _gpu(device)))
    _check(everybody)
    index = members.index(comm.rank) if comm.rank in members else -1
    if comm.size == 1:
        return TrainingGroup(members, index, device)
    hosts = {everybody[rank][1] for rank in members}
    address, interface = _find_route(comm, members, index, len(hosts) == 1)
    store = group_store(comm.comm, members, index, min(timeout_s, 300.0))  # type: ignore[attr-defined]
    if store is None:
        return TrainingGroup(members, index, device)
    backend = _backend(device, [everybody[rank][1:] for rank in members])
    _join(store, backend, index, len(members), device, interface, timeout_s)
    store.settle()
    logger.debug("training group %s: %s over %s (%s)", members, backend, address, interface or "default interface")
    return TrainingGroup(members, index, device, backend, store)


def _gpu(device: str) -> str:
    """Identity of the GPU, which two ranks may share; empty on a CPU."""
    if torch.device(device).type != "cuda":
        return ""
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", device))


def _check(everybody: list[Any]) -> None:
    for rank, (members, *_) in enumerate(everybody):
        for other in members:
            if not 0 <= other < len(everybody) or (rank in members and everybody[other][0] != members):
                raise ValueError(f"rank {rank} is to train with ranks {list(members)}, but rank {other} is not")


def _backend(device: str, places: list[tuple[str, str]]) -> str:
    """NCCL needs a GPU for each rank; gloo takes anything."""
    if torch.device(device).type != "cuda":
        return "gloo"
    if len(set(places)) < len(places) or not torch.distributed.is_nccl_available():
        logger.warning("ranks of a training group share a GPU: gradients go through gloo, which is slow")
        return "gloo"
    return "nccl"


def _find_route(comm: Communicator, members: tuple[int, ...], index: int, one_host: bool) -> tuple[str, str]:
    """Address of the group's first rank that every member reaches, and this rank's interface to it (collective)."""
    needed = len(members) > 1
    addresses = rendezvous_address.candidates(one_host)
    if addresses[0] == rendezvous_address.LOOPBACK:
        addresses = addresses[:1]  # nothing of the group need be seen from outside
    beacon = rendezvous_address.Beacon(64 + 8 * len(members), addresses) if needed and index == 0 else None
    offers = comm.allgather((addresses, beacon.port) if beacon is not None else None)
    offer = offers[members[0]] if needed and index >= 0 else None
    routes = rendezvous_address.reachable(*offer) if offer is not None else {}
    answers = comm.allgather((members if needed and index >= 0 else (), sorted(routes)))
    if beacon is not None:
        with beacon:
            pass
    for group in {group for group, _ in answers if group}:
        common = [a for a in offers[group[0]][0] if all(a in answers[rank][1] for rank in group)]
        if not common:
            tried = ", ".join(offers[group[0]][0])
            raise MissingError(
                f"no address of rank {group[0]} can be reached by all ranks of its training group (tried {tried}). "
                f"Set {rendezvous_address.GLOO_INTERFACE} to the network interface that joins the nodes.",
                code="network-unreachable",
            )
        if group == members:
            return common[0], routes.get(common[0], "")
    return "", ""


def _join(store: Any, backend: str, index: int, size: int, device: str, interface: str, timeout_s: float) -> None:
    import torch.distributed as dist

    names = "gloo" if backend == "gloo" else "cpu:gloo,cuda:nccl"
    options: dict[str, Any] = {}
    if backend == "nccl":
        torch.cuda.set_device(torch.device(device))
        options["device_id"] = torch.device(device)
    os.environ.pop(BARRIER, None)  # the ranks have just met, and MPI's store does not count
    with _environment(rendezvous_address.GLOO_INTERFACE, interface):
        dist.init_process_group(
            names, store=store, rank=index, world_size=size, timeout=timedelta(seconds=timeout_s), **options
        )


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Sets an environment variable inside, unless the user has or the value is empty."""
    if not value or os.environ.get(name):
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


def _leave(failed: bool) -> None:
    """Destroys the world. After a failure that may wait for ranks that never answer, so it is given a few seconds."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return
    if not failed:
        dist.destroy_process_group()
        return
    thread = threading.Thread(target=_destroy_quietly, daemon=True)
    thread.start()
    thread.join(_LEAVE_S)


def _destroy_quietly() -> None:
    import torch.distributed as dist

    try:
        dist.destroy_process_group()
    except Exception:
        logger.debug("the training group could not be left in order", exc_info=True)


def _average_in_pairs(group, bucket):  # type: ignore[no-untyped-def]  # DDP accepts no annotations as text
    """A communication hook of DDP whose result does not depend on how gradients lie in buckets.

    An all-reduce adds in an order that depends on an element's place, and DDP moves the places after its first step:
    a resumed run would differ in the last bits.
    """
    gradients = bucket.buffer()
    gradients.copy_(_sum_slices(group, gradients)).div_(group.size)
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(gradients)
    return done


def _sum_slices(group: TrainingGroup, values: Tensor) -> Tensor:
    """Sum of a flat tensor over the group: each rank adds up its share and gives it to all. Collective."""
    import torch.distributed as dist

    length = -(-values.numel() // group.size)
    padded = torch.zeros(group.size * length, dtype=values.dtype)
    padded[: values.numel()] = values
    copies = torch.empty_like(padded)
    group.finish(dist.all_to_all_single(copies, padded, async_op=True))
    own_sum = _sum_rows(copies.view(group.size, length))
    group.finish(dist.all_gather(list(padded.view(group.size, length)), own_sum, async_op=True))
    return padded[: values.numel()]


def _sum_rows(copies: Tensor) -> Tensor:
    """Sum in pairs over the first axis, which is overwritten."""
    return sum_in_pairs(lambda rank: [copies[rank]], 0, len(copies))[0].clone()
