"""The published anisotropy correction (spIsoNet, MIT licence), driven by ``correct_throughput.py``.

None of its code is in this repository: ``--published`` names a checkout, whose network and data set are imported. Its
training function starts a process for each GPU and joins them with NCCL, also where there is one GPU only.
``Published`` says in our words what that function does at each micro-step, so that a step can be timed by itself, and
on a CPU too. ``own_loop`` is the check of that: it lets the published function itself train on a GPU and takes the time
between its own reports of progress.

    python benchmarks/spisonet.py CHECKOUT FOLDER --batch 4 --accumulate 2 --steps 20     prints JSON (needs a GPU)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

LEARNING_RATE, ALPHA, BETA = 3e-4, 1.0, 0.5
WORKERS, SUB_MAPS = 4, 1000
PLANES = ((0, 1, 1), (0, 1, 3), (1, 2, 1), (1, 2, 3), (0, 1, 0), (0, 1, 2))
"""(axis, axis, quarter turns): with 0 to 3 quarter turns in the plane (0, 2) after it these are the 24 of a cube."""
FILTER = "filter.npy"


def importable(code: Path) -> None:
    if str(code) not in sys.path:
        sys.path.insert(0, str(code))


def write_sub_maps(folder: Path, pairs: np.ndarray, transfer: np.ndarray) -> None:
    """Sub-maps as the published program leaves them: a file each, in a folder for each half.

    As many as its default, so that its epochs are as long; there are only so many different ones.

    Args:
        pairs: (N, 2, C, C, C) float32.
        transfer: (C, C, C) float32, origin at C//2.
    """
    import mrcfile

    for half in (0, 1):
        here = folder / f"half{half + 1}"
        here.mkdir(parents=True)
        for number in range(SUB_MAPS):
            path = here / f"subvolume_{number:06d}.mrc"
            if number >= len(pairs):
                path.hardlink_to(here / f"subvolume_{number % len(pairs):06d}.mrc")
                continue
            with mrcfile.new(path) as file:
                file.set_data(pairs[number, half])
    np.save(folder / FILTER, transfer)


def halves(folder: Path) -> list[str]:
    return [str(folder / "half1"), str(folder / "half2")]


class Published:
    """Its training, one optimisation step (``accumulate`` micro-steps) at a call."""

    def __init__(self, code: Path, folder: Path, batch: int, accumulate: int, device: str, how: str) -> None:
        """
        Args:
            folder: what ``write_sub_maps`` wrote.
            how: "as it is" (GPU: in DistributedDataParallel and compiled) or "bare" (neither).
        """
        import torch
        from torch import nn

        importable(code)
        from spIsoNet.models.unet import Unet  # type: ignore[import-not-found]

        self.device, self.batch, self.accumulate = device, batch, accumulate
        torch.manual_seed(1)
        network: Any = Unet(filter_base=64, unet_depth=3, add_last=True)
        self.network = network
        self.parameters = sum(p.numel() for p in network.parameters())
        on_gpu = device != "cpu"
        if on_gpu and how == "as it is":
            alone()
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network).cuda()
            network = nn.parallel.DistributedDataParallel(network, device_ids=[0])
        network = network.to(device)
        if on_gpu and how != "bare" and torch.cuda.get_device_capability()[0] >= 7:
            network = torch.compile(network)
        self.model = network.train()
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE)
        self.filter = torch.fft.fftshift(torch.from_numpy(np.load(folder / FILTER)).to(device))
        self.batches = self._batches(halves(folder), batch // accumulate, WORKERS if on_gpu else 0)
        self.distance = nn.L1Loss()
        self.sum = torch.zeros((), device=device)
        self.optimiser.zero_grad()

    def _batches(self, folders: list[str], size: int, workers: int) -> Iterator[Any]:
        """Pairs of sub-maps, epoch after epoch; a CPU's one thread reads them itself."""
        from spIsoNet.models.data_sequence import Train_sets_sp_n2n  # type: ignore[import-not-found]
        from torch.utils.data import DataLoader
        from torch.utils.data.distributed import DistributedSampler

        sets = Train_sets_sp_n2n(folders)
        sampler: Any = DistributedSampler(sets, num_replicas=1, rank=0, shuffle=True, drop_last=True)
        loader = DataLoader(
            sets, batch_size=size, sampler=sampler, num_workers=workers,
            persistent_workers=workers > 0, pin_memory=workers > 0,
        )  # fmt: skip
        epoch = 0
        while True:
            sampler.set_epoch(epoch)
            yield from loader
            epoch += 1

    def step(self) -> None:
        for _ in range(self.accumulate):
            x1, x2 = (x.to(self.device) for x in next(self.batches))
            loss = self.loss(x1, x2) / self.accumulate
            loss.backward()
            # it reads every loss, which waits for the GPU, and adds it up there
            self.sum += loss.item()
        self.optimiser.step()
        self.optimiser.zero_grad()

    def loss(self, x1: Any, x2: Any) -> Any:
        """Consistency and equivariance, each against both halves; filters and turns cube by cube, as published."""
        import torch

        y1 = self.model(x1)
        seen = self._filtered(y1)
        consistent = self.distance(seen, x1), self.distance(seen, x2)
        y2 = self.model(x2)
        turned1, turned2, given = (torch.zeros_like(y1) for _ in range(3))
        for number in range(len(y1)):
            plane, second = random.choice(PLANES), random.randrange(4)
            for turned, y in ((turned1, y1), (turned2, y2)):
                once = torch.rot90(y[number][0], plane[2], plane[:2])
                turned[number][0] = torch.rot90(once, second, (0, 2))
            given[number][0] = self._filtered_cube(turned1[number][0])
        again = self.model(given)
        alike = self.distance(again, turned1), self.distance(again, turned2)
        return ALPHA * alike[0] + consistent[0] + BETA * (ALPHA * alike[1] + consistent[1])

    def _filtered(self, cubes: Any) -> Any:
        import torch

        out = torch.zeros_like(cubes)
        for number, cube in enumerate(cubes):
            out[number][0] = self._filtered_cube(cube[0])
        return out

    def _filtered_cube(self, cube: Any) -> Any:
        import torch

        return torch.real(torch.fft.ifftn(self.filter * torch.fft.fftn(cube)))


def alone() -> None:
    """torch.distributed with one process, as the published program has it on one GPU."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        torch.cuda.set_device(0)
        store = dist.TCPStore("127.0.0.1", 0, world_size=1, is_master=True)
        dist.init_process_group("nccl", store=store, rank=0, world_size=1)


def own_loop(code: Path, folder: Path, batch: int, accumulate: int, steps: int) -> dict[str, Any]:
    """Seconds of each optimisation step of the published training function, which runs unchanged on GPU 0."""
    importable(code)
    from spIsoNet.models import network_n2n  # type: ignore[import-not-found]

    marks: list[float] = []

    class Marks:
        """In the place of its progress bar, which it updates after each step and after it has waited for the GPU."""

        def __init__(self, **_: Any) -> None: ...
        def __enter__(self) -> Marks:
            return self

        def __exit__(self, *_: Any) -> None: ...
        def set_postfix(self, *_: Any) -> None: ...
        def update(self) -> None:
            marks.append(time.perf_counter())

    network_n2n.tqdm = Marks
    net = network_n2n.Net(filter_base=64, unet_depth=3, add_last=True)
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        network_n2n.ddp_train(
            0, 1, net.port_number, net.model, ALPHA, BETA, halves(folder), batch, accumulate, 1, steps,
            LEARNING_RATE, False, str(folder / "own.pt"), np.load(folder / FILTER),
        )  # fmt: skip
    return {"first_step_s": marks[0] - start, "step_s": np.diff(marks).tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("code", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--accumulate", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    a = parser.parse_args()
    print(json.dumps(own_loop(a.code.resolve(), a.folder.resolve(), a.batch, a.accumulate, a.steps)))


if __name__ == "__main__":
    main()
