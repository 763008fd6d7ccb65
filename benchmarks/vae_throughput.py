"""The conditional hierarchical VAE beside the published one: same width, depth and latents, same machine, one run.

A training step is projection with CTF (theirs in real space, ours by central slices), forward, backward, clipping and
Adam; generation is projection and decoding of a prior sample. Variants take turns; on a CPU one thread and CPU time
count, on a GPU wall time between synchronisations. The published network (MIT licence) is not part of this
repository: give its wheel or unpacked folder. Its command insists on a GPU, so its network class is used directly, with
its own loss and optimiser settings.

    python benchmarks/vae_throughput.py --published cryopros-1.2.0-py3-none-any.whl [--device cuda] [--box 64]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness

EXTENT_A, LIKELIHOOD_SD, LEARNING_RATE = 192.0, 0.1, 1e-4
GRAPHS, COMPILED = "bf16, CUDA graphs", "bf16, torch.compile"
Step = Callable[[], Any]


@dataclass
class Variant:
    """One implementation in one precision."""

    name: str
    train: Step
    generate: Step
    batch: int
    network: Any

    def parameters(self) -> int:
        return sum(p.numel() for p in self.network.parameters() if p.requires_grad)


class Particles:
    """A batch of poses, CTFs and images that both networks are given."""

    def __init__(self, box: int, batch: int, device: str) -> None:
        import numpy as np
        import torch

        from cryoiso.physics.phantom import phantom_map
        from cryoiso.physics.so3 import random_rotations

        self.box, self.batch, self.device = box, batch, device
        self.volume = torch.from_numpy(phantom_map(box, EXTENT_A / box, 12.0).data).to(device)
        rotation = random_rotations(np.random.default_rng(1), batch)
        self.rotation = torch.from_numpy(rotation.astype(np.float32)).to(device)
        self.shift_px = torch.randn(batch, 2, device=device)
        self.defocus_A = torch.linspace(10000, 25000, batch, device=device, dtype=torch.float64)[:, None]
        self.images = torch.randn(batch, 1, box, box, device=device)


def published(particles: Particles, code: Path) -> Variant:
    """The published network, loss and optimiser as its training command sets them."""
    import torch

    if str(code) not in sys.path:
        sys.path.insert(0, str(code))
    from cryoPROS.models.network_hvae import HVAE  # type: ignore[import-not-found]

    p = particles
    torch.manual_seed(1)
    network = HVAE(1, 64, [2, 2, 4, 4], 16, p.box, EXTENT_A / p.box, True).to(p.device)
    optimiser = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    columns = [p.defocus_A[:, 0], p.defocus_A[:, 0], *(torch.full((p.batch,), v) for v in (0, 300, 2.7, 0.1, 0))]
    optics = torch.stack([c.to(p.device, torch.float32) for c in columns], 1)
    pose = torch.randn(p.batch, 6, device=p.device)
    given = p.rotation.transpose(1, 2), p.shift_px / p.box, optics, pose
    images = 0.1 * p.images

    def train() -> None:
        optimiser.zero_grad()
        reconstruction, kl, model = network(images, *given)
        loss = reconstruction.mean() + 1e-4 * kl.mean() + 0 * model.mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 200).item()
        if not torch.isnan(loss).item() and norm < 1e9:
            optimiser.step()

    def generate() -> None:
        with torch.no_grad():
            network.generate(*given)

    return Variant("published", train, generate, p.batch, network)


def projector(particles: Particles) -> Callable[[], Any]:
    """A function that makes the CTF-multiplied projections (B, 1, D, D) of the batch."""
    from cryoiso.physics.contrast_transfer import ctf
    from cryoiso.physics.fourier import fourier_disc, fourier_to_images, shift_phases
    from cryoiso.physics.projection import FourierVolume, scatter_to_half_plane

    p = particles
    volume, disc = FourierVolume.from_volume(p.volume), fourier_disc(p.box, (p.box - 1) // 2, with_dc=True)
    ky, kx = (k.to(p.device) for k in disc.frequencies(1.0))
    pixel_A = EXTENT_A / p.box
    optics = {"voltage_kV": 300.0, "spherical_aberration_mm": 2.7, "amplitude_contrast": 0.1}

    def project():
        values = volume.slices(p.rotation, disc)
        transfer = ctf(
            ky / pixel_A,
            kx / pixel_A,
            defocus_u_A=p.defocus_A,
            defocus_v_A=p.defocus_A,
            defocus_angle_deg=0.0,
            **optics,
        )
        phases = shift_phases(ky, kx, -p.shift_px.double())
        values = values * (phases * transfer).to(values.dtype)
        return fourier_to_images(scatter_to_half_plane(values, disc), p.box)[:, None]

    return project


def ours(particles: Particles, name: str, preset: str = "paper") -> Variant:
    """This repository's network; the name says precision and compilation."""
    import torch

    from cryoiso.nets.hvae import ConditionalHvae, pose_vector
    from cryoiso.nets.hvae_parts import HvaeConfig
    from cryoiso.nets.losses import negative_elbo

    p = particles
    torch.manual_seed(1)
    network = ConditionalHvae(HvaeConfig.preset(preset, p.box)).to(p.device)
    optimiser = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    project, low = projector(p), "bf16" in name
    latents = network.config.latent_size

    def autocast():
        return torch.autocast(p.device, torch.bfloat16, enabled=low, cache_enabled=name != GRAPHS)

    def given():
        return project(), pose_vector(p.rotation, p.shift_px, p.box), torch.randn(p.batch, latents, device=p.device)

    forward, sample = network, network.sample
    if name == COMPILED:
        forward, sample = torch.compile(network), torch.compile(network.sample)
    if name == GRAPHS:
        forward, sample = with_cuda_graphs(network, (p.images, *given()), autocast)

    def train() -> None:
        optimiser.zero_grad(set_to_none=name != GRAPHS)
        with autocast():
            output = forward(p.images, *given())
        negative_elbo(output, p.images, LIKELIHOOD_SD, 1.0).loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 200.0)
        optimiser.step()

    def generate() -> None:
        with torch.no_grad(), autocast():
            sample(*given())

    return Variant(f"{preset}, {name}", train, generate, p.batch, network)


def with_cuda_graphs(network, batch: tuple, autocast) -> tuple[Step, Step]:
    """Forward, backward and generation recorded once and replayed: a step costs a few launches."""
    import torch

    with torch.no_grad(), autocast():
        static = [t.clone() for t in batch[1:]]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                network.sample(*static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            image = network.sample(*static)

    def sample(*new):
        for old, value in zip(static, new):
            old.copy_(value)
        graph.replay()
        return image

    with autocast():
        forward = torch.cuda.make_graphed_callables(network, batch)
    return forward, sample


def clock(device: str) -> float:
    """CPU seconds of this process, or wall seconds after the GPU has finished."""
    if device == "cpu":
        return time.process_time()
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


def seconds(step: Step, device: str, least_s: float) -> float:
    """Time of one call, averaged over calls that last ``least_s`` together."""
    start, calls = clock(device), 0
    while True:
        step()
        calls += 1
        if (spent := clock(device) - start) >= least_s:
            return spent / calls


def measure(variants: list[Variant], device: str, rounds: int, least_s: float) -> dict[str, dict[str, float]]:
    """Median of the rounds; the variants take turns within each."""
    times: dict[str, dict[str, list[float]]] = {v.name: {"train": [], "generate": []} for v in variants}
    for variant in variants:
        for step in (variant.train, variant.generate):
            step()
    for _ in range(rounds):
        for variant in variants:
            times[variant.name]["train"].append(seconds(variant.train, device, least_s))
            times[variant.name]["generate"].append(seconds(variant.generate, device, least_s))
    return {name: {what: statistics.median(values) for what, values in t.items()} for name, t in times.items()}


def flops(variant: Variant) -> dict[str, float]:
    """GFLOP an image of a training step and of generation, as PyTorch counts convolutions and products."""
    from torch.utils.flop_counter import FlopCounterMode

    found = {}
    for what, step in (("train", variant.train), ("generate", variant.generate)):
        with FlopCounterMode(display=False) as counter:
            step()
        found[what] = counter.get_total_flops() / variant.batch / 1e9
    return found


def matmul_peak_tflops(device: str) -> float:
    """What a large product of bf16 matrices (float32 on a CPU) reaches on this machine, now."""
    import torch

    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    torch.mm(a, b)
    best = min(seconds(lambda: torch.mm(a, b), device, 0.1) for _ in range(5))
    return 2 * size**3 / best / 1e12


def variants_of(particles: Particles, names: list[str], code: Path | None) -> list[Variant]:
    """Those that can be built on this machine; the others are named loudly."""
    makers: list[tuple[str, Callable[[], Variant]]] = []
    if code is not None:
        makers.append(("published", lambda: published(particles, code)))
    makers += [(name, lambda name=name: ours(particles, name)) for name in names]
    built = []
    for name, make in makers:
        try:
            variant = make()
            variant.train()
            variant.generate()
            built.append(variant)
        except (RuntimeError, ImportError, TypeError) as error:
            harness.skip(f"{name} at {particles.box} px: {str(error).splitlines()[0]}")
    return built


def one_box(box: int, a: argparse.Namespace, names: list[str], code: Path | None, peak: float) -> list[dict[str, Any]]:
    """Rows of all variants at one box."""
    particles = Particles(box, a.batch, a.device)
    built = variants_of(particles, names, code)
    work = {v.name: flops(v) for v in built if v.name == "published" or v.name.endswith("float32")}
    found = measure(built, a.device, a.rounds, 0.3 if a.device == "cuda" else 0.0)
    reference, rows = found.get("published"), []
    for v in built:
        gflop = work.get(v.name) or work["paper, float32"]
        row: dict[str, Any] = {"box_px": box, "batch": a.batch, "variant": v.name, "parameters": v.parameters()}
        for what in ("train", "generate"):
            s = found[v.name][what]
            row[what] = {
                "ms": 1e3 * s, "images_per_s": a.batch / s, "gflop_an_image": gflop[what],
                "tflops": a.batch * gflop[what] / s / 1e3, "of_matmul_peak": a.batch * gflop[what] / s / 1e3 / peak,
                "times_published": reference[what] / s if reference else None,
            }  # fmt: skip
        rows.append(row)
    return rows


def projections(box: int, a: argparse.Namespace, code: Path | None) -> dict[str, float]:
    """Milliseconds of projecting a batch alone."""
    import torch

    particles = Particles(box, a.batch, a.device)
    steps: dict[str, Step] = {"central slices": projector(particles)}
    if code is not None:
        net = published(particles, code).network
        optics = torch.tensor([[15000.0, 15000, 0, 300, 2.7, 0.1, 0]], device=a.device).repeat(a.batch, 1)
        shift = particles.shift_px / box
        steps["published, real space"] = lambda: net.generate_proj(particles.rotation, shift, optics)
    with torch.no_grad():
        return {k: 1e3 * min(seconds(s, a.device, 0.1) for _ in range(3)) for k, s in steps.items()}


def unpacked(given: Path | None, work: Path) -> Path | None:
    """Folder of the published code; a wheel is unpacked into ``work``."""
    if given is None:
        harness.skip("no published code to compare with; give --published")
        return None
    if given.is_dir():
        return given.resolve()
    with zipfile.ZipFile(given) as wheel:
        wheel.extractall(work / "published")
    return work / "published"


def report(result: dict[str, Any]) -> str:
    """Markdown tables."""
    rows = []
    for r in result["rows"]:
        line: list[object] = [r["box_px"], r["batch"], r["variant"], f"{r['parameters'] / 1e6:.2f}"]
        for what in ("train", "generate"):
            t = r[what]
            ratio = t["times_published"]
            line += [
                f"{t['gflop_an_image']:.2f}", f"{t['ms']:,.1f}", f"{t['images_per_s']:,.1f}",
                None if ratio is None else f"{ratio:.2f}", f"{t['tflops']:.3g} ({t['of_matmul_peak']:.0%})",
            ]  # fmt: skip
        rows.append(line)
    cells = ["GFLOP an image", "ms a batch", "images/s", "times published", "TFLOP/s (of matmul)"]
    head = ["px", "batch", "variant", "M parameters", *(f"{w}: {c}" for w in ("training", "generation") for c in cells)]
    tables = [harness.markdown(head, rows)]
    for box, found in result["projection_ms"].items():
        tables.append(f"projection of a batch at {box} px, ms: " + ", ".join(f"{k} {v:.2f}" for k, v in found.items()))
    tables.append(f"matrix product: {result['matmul_tflops']:.3g} TFLOP/s")
    return "\n\n".join(tables)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", type=Path, help="wheel or folder of cryoPROS 1.2.0")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--box", type=int, nargs="+", help="default 64 on a CPU; 64, 128 and 256 on a GPU")
    parser.add_argument("--compile-box", type=int, nargs="*", default=(128,), help="GPU: torch.compile at these boxes")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="default benchmarks/results/vae_throughput_DEVICE.json")
    a = parser.parse_args()
    a.box = a.box or ([64, 128, 256] if a.device == "cuda" else [64])
    a.out = (a.out or harness.RESULTS / f"vae_throughput_{a.device}.json").resolve()
    return a


def main() -> None:
    a = arguments()
    if a.device == "cpu":
        os.environ.update(harness.ONE_THREAD)
    import torch

    if a.device == "cpu":
        torch.set_num_threads(1)
    given = None if a.published is None else a.published.resolve()
    with harness.work_folder(None) as work:
        # the published package writes a log into the working folder when it is imported
        os.chdir(work)
        measure_all(a, unpacked(given, work))
        os.chdir(harness.REPO)


def measure_all(a: argparse.Namespace, code: Path | None) -> None:
    """All boxes, those with torch.compile once more at the end; results are written after each."""
    import torch

    device = torch.cuda.get_device_name() if a.device == "cuda" else "one CPU thread"
    result: dict[str, Any] = {"machine": harness.machine(), "device": device, "rows": [], "projection_ms": {}}
    peak = result["matmul_tflops"] = matmul_peak_tflops(a.device)
    names = ["float32", "bf16"] + ([GRAPHS] if a.device == "cuda" else [])
    for box in a.box:
        result["rows"] += one_box(box, a, names, code, peak)
        result["projection_ms"][str(box)] = projections(box, a, code)
        harness.write_json(a.out, result)
    for box in a.compile_box if a.device == "cuda" else ():
        result["rows"] += [r for r in one_box(box, a, ["float32", COMPILED], None, peak) if COMPILED in r["variant"]]
        harness.write_json(a.out, result)
    print(report(result))


if __name__ == "__main__":
    main()
