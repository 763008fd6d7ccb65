"""The Triton kernels without a GPU: run by Triton's interpreter against plain torch, and compiled for several GPUs.

What they do and how fast on a GPU is tested by the tests marked ``gpu``.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cryoiso.physics import gpu_kernels
from cryoiso.physics.backproject import UNIT, SliceAccumulator
from cryoiso.physics.fourier import fourier_disc
from cryoiso.physics.phantom import phantom_map
from cryoiso.physics.projection import FourierVolume
from cryoiso.physics.so3 import random_rotations
from cryoiso.refine.likelihood import Whitened, local_scores_torch

triton = pytest.importorskip("triton", reason="Triton is not installed: the GPU kernels are not tested")
BOX, RADIUS = 16, 7
SOURCE = Path(gpu_kernels.__file__).with_name("_triton_kernels.py")
INT64 = dict.fromkeys(("grid", "data", "particle"), "*i64")
TYPES = {**INT64, "n_samples": "i32", "h": "i32", "scale": "fp32", "unit": "fp32"}


def tensor(values: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float32)


def images() -> Whitened:
    g = torch.Generator().manual_seed(5)
    disc = fourier_disc(BOX, RADIUS)
    data = 30 * torch.randn(3, disc.size, dtype=torch.complex64, generator=g)
    return Whitened(data, torch.rand(3, disc.size, generator=g) + 0.1, disc, None)


def reference() -> FourierVolume:
    volume = tensor(phantom_map(BOX, 10.0, 25.0).data)
    return FourierVolume.from_volume(volume / volume.std())


def scored(views: int) -> tuple:
    """Arguments of a case with two images, each with ``views`` views."""
    g = np.random.default_rng(6)
    particle = torch.tensor([2, 0]).repeat_interleave(views)
    shift = tensor(g.normal(size=(2, 2))).repeat_interleave(views, 0)
    return particle, tensor(random_rotations(g, 2 * views)), shift, 0.7


def inserted(order: list[int]) -> tuple:
    white, rotation = images(), tensor(random_rotations(np.random.default_rng(7), 3))
    grid = torch.zeros_like(SliceAccumulator.empty(BOX, RADIUS).grid)
    return grid, white.disc, white.data[order], white.weight[order], rotation[order], 2, UNIT


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> list[torch.Tensor]:
    """What the kernels return, run by the interpreter in one process for all cases."""
    folder = tmp_path_factory.mktemp("interpreted")
    white, volume = images(), reference()
    cases = [("score_local", (volume, white.disc, white.data, white.weight, *scored(v), v)) for v in (1, 8)]
    cases += [("insert_slices", inserted(order)) for order in ([0, 1, 2], [2, 0, 1])]
    torch.save(cases, folder / "cases.pt")
    program = Path(__file__).parent.parent / "helpers" / "interpret_kernels.py"
    subprocess.run([sys.executable, program, folder / "cases.pt", folder / "found.pt"], check=True)
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize("case", [0, 1])
def test_scores_of_the_kernel_are_those_of_plain_torch(interpreted, case):
    plain = local_scores_torch(images(), reference(), *scored((1, 8)[case]))
    assert plain.std(1).min() > 1  # the shifts differ
    torch.testing.assert_close(interpreted[case], plain, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))


def test_insertion_by_the_kernel_is_that_of_plain_torch(interpreted):
    plain = SliceAccumulator.empty(BOX, RADIUS)
    _, disc, data, weight, rotation, *_ = inserted([0, 1, 2])
    plain.insert_torch(data, weight, rotation, disc)
    assert (plain.grid[..., 2] > 0).sum() > 1000
    difference = float((interpreted[2] - plain.grid).abs().max())
    assert difference < 2e-6 * float(plain.grid.abs().max())  # float32, rounded once more


def test_insertion_does_not_depend_on_the_order_of_slices(interpreted):
    assert torch.equal(interpreted[2], interpreted[3])


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "hip:gfx942"])
def test_kernels_compile_for_gpus_and_keep_their_numbers_in_registers(target, tmp_path):
    from triton.backends.compiler import GPUTarget

    kind, name = target.split(":")
    gpu = GPUTarget(kind, int(name) if kind == "cuda" else name, 32 if kind == "cuda" else 64)
    sizes = (
        ("score_local", {"VIEWS": 8, "BLOCK": gpu_kernels.SCORE_BLOCK}, gpu_kernels.SCORE_WARPS),
        ("insert_slices", {"BLOCK": gpu_kernels.INSERT_BLOCK}, gpu_kernels.INSERT_WARPS),
    )
    for kernel, constants, warps in sizes:
        code = compiled(kernel, constants, warps, gpu)
        assert code
        if kind == "cuda":
            used = memory_outside_registers(code["cubin"], tmp_path)
            assert int(re.search(r"REG:(\d+)", used)[1]) <= 128, used
            assert int(re.search(r"LOCAL:(\d+)", used)[1]) == 0, used


def compiled(kernel: str, constants: dict[str, int], warps: int, gpu: object) -> dict[str, str]:
    """Code of a kernel by stage, for a GPU that need not be here."""
    from triton.compiler import ASTSource

    spec = importlib.util.spec_from_file_location("compiled_kernels", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, kernel)
    types = {name: "constexpr" if name in constants else TYPES.get(name, "*fp32") for name in function.arg_names}
    made = triton.compile(
        ASTSource(function, types, constexprs=constants),
        target=gpu,
        options={"num_warps": warps, "enable_fp_fusion": True},
    )
    return made.asm


def memory_outside_registers(cubin: bytes, folder: Path) -> str:
    """Registers and local memory of a compiled kernel, as NVIDIA's tool prints them."""
    import triton.backends.nvidia as backend

    (folder / "kernel.cubin").write_bytes(cubin)
    program = Path(backend.__file__).parent / "bin" / "cuobjdump"
    done = subprocess.run([program, "-res-usage", folder / "kernel.cubin"], capture_output=True, text=True, check=True)
    return done.stdout
