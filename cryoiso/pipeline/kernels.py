"""The program's inner loops on made-up data of a job's size, to be timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from cryoiso.pipeline.estimate import Problem
from cryoiso.pipeline.workload import _preset

Timed = dict[str, tuple[float, Callable[[], Any]]]
"""Kernel -> (units that a call does, the call)."""
IMAGES = 64
VIEWS = 256
SHIFTS = 16


def timings(p: Problem, device: str) -> Timed:
    """The kernels that the job's workflow uses."""
    found = _search(p, device) | _reading(p, device)
    if p.job.run.workflow in ("auxiliary", "both"):
        found |= _generator(p, device)
    if p.job.run.workflow in ("realign", "both"):
        found |= _unet(p, device)
    return found


def _search(p: Problem, device: str) -> Timed:
    from cryoiso.physics.backproject import SliceAccumulator
    from cryoiso.physics.fourier import disc
    from cryoiso.physics.project import FourierVolume
    from cryoiso.physics.so3 import random_rotations
    from cryoiso.refine.likelihood import ReferenceSlices, Whitened, global_scores, local_scores
    from cryoiso.refine.schedule import disc_of_shifts

    draw = np.random.default_rng(1)
    box, padding = p.box_px, p.job.refine.padding
    density = torch.from_numpy(draw.standard_normal((box,) * 3).astype(np.float32)).to(device)
    volume = FourierVolume.from_volume(density, padding)
    radius = (box - 1) // 2
    coarse, fine = disc(box, min(12, radius)), disc(box, max(2, 2 * radius // 3))
    whole = disc(box, radius)
    turns = torch.as_tensor(random_rotations(draw, 8 * VIEWS), dtype=torch.float32, device=device)
    shifts = disc_of_shifts(2.2, 1.0)[:SHIFTS].to(device)
    prior = torch.zeros(len(shifts), device=device)

    def images(where: Any, count: int) -> Whitened:
        data = torch.randn(count, where.size, dtype=torch.complex64, device=device)
        return Whitened(data, torch.rand(count, where.size, device=device), where, None)

    slices = ReferenceSlices.of(volume, turns[:VIEWS], coarse, None)
    narrow, wide = images(coarse, IMAGES), images(fine, IMAGES)
    rows = torch.arange(8 * VIEWS, device=device) % IMAGES
    rows, centre = rows.sort()[0], torch.zeros(8 * VIEWS, 2, device=device)
    accumulator = SliceAccumulator.empty(box, padding=padding, device=device)
    inserted = images(whole, 4 * IMAGES)
    return {
        "gemm": (
            float(IMAGES * coarse.size * VIEWS * (4 * len(shifts) + 2)),
            lambda: global_scores(narrow, slices, shifts, prior),
        ),
        "local": (
            float(8 * VIEWS * fine.size), lambda: local_scores(wide, volume, rows, turns, centre, 0.5)
        ),
        "insert": (
            float(4 * IMAGES * whole.size),
            lambda: accumulator.insert(inserted.data, inserted.weight, turns[: 4 * IMAGES], whole),
        ),
        "transform": (float((padding * box) ** 3), lambda: FourierVolume.from_volume(density, padding)),
    }  # fmt: skip


def _reading(p: Problem, device: str) -> Timed:
    """Transform and CTF; the disk's part is not in it."""
    from cryoiso.core.types import OpticsGroup, Particles
    from cryoiso.physics.ctf import ctf_for
    from cryoiso.physics.fourier import disc, images_to_fourier

    pixels = torch.randn(IMAGES, p.box_px, p.box_px, device=device)
    where = disc(p.box_px, (p.box_px - 1) // 2)
    particles = _particles(p, OpticsGroup, Particles)
    frequency = where.frequencies(p.pixel_size_A)

    def prepare() -> Any:
        made = where.gather(images_to_fourier(pixels)).to(torch.complex64)
        return made, ctf_for(particles, np.arange(IMAGES), p.box_px, freq_invA=frequency, device=device)

    return {"read": (float(IMAGES * p.box_px**2), prepare)}


def _particles(p: Problem, OpticsGroup: Any, Particles: Any) -> Any:
    n = IMAGES
    return Particles(
        groups=(OpticsGroup(1, "", p.pixel_size_A, p.box_px, 300.0, 2.7, 0.1),),
        uid=np.arange(n, dtype=np.uint64), optics=np.zeros(n, np.int32), stack=np.full(n, "none"), index=np.arange(n),
        defocus_u_A=np.full(n, 15000.0), defocus_v_A=np.full(n, 14500.0), defocus_angle_deg=np.full(n, 30.0),
        phase_shift_deg=np.zeros(n), ctf_bfactor_A2=np.zeros(n), ctf_scale=np.ones(n),
    )  # fmt: skip


def _generator(p: Problem, device: str) -> Timed:
    """A training step (forward, loss, backward) and generation, of the job's network."""
    from cryoiso.methods.auxiliary.settings import network, training
    from cryoiso.methods.auxiliary.training import few_threads
    from cryoiso.nets.hvae import ConditionalHvae
    from cryoiso.nets.losses import negative_elbo

    if p.job.auxiliary.generators == "white-noise":
        return {}
    settings, name = training(p.job.auxiliary, device), _preset(p, device)
    config = network(settings, p.box_px)
    module = ConditionalHvae(config).to(device)
    n = settings.batch
    images, condition = torch.randn(2, n, 1, p.box_px, p.box_px, device=device)
    pose, noise = torch.randn(n, 6, device=device), torch.randn(n, config.latent_size, device=device)

    def step() -> None:
        with few_threads(settings.preset), torch.autocast(torch.device(device).type, enabled=device != "cpu",
                                                          dtype=torch.bfloat16):  # fmt: skip
            out = module(images, condition, pose, noise)
            negative_elbo(out, images, settings.likelihood_sd, 1.0).loss.backward()

    @torch.no_grad()
    def sample() -> Any:
        return module.sample(condition, pose, noise)

    units = float(n * p.box_px**2)
    return {f"train_{name}": (units, step), f"generate_{name}": (units, sample)}


def _unet(p: Problem, device: str) -> Timed:
    """A training step of the anisotropy network on a sub-map."""
    from cryoiso.methods.anisotropy.settings import resolve
    from cryoiso.nets.unet import Unet3d

    settings = resolve(p.job.correct, device)
    module = Unet3d(settings.network).to(device)
    n = 1 if device == "cpu" else settings.batch
    cubes = torch.randn(n, 1, *[settings.cube_px] * 3, device=device)

    def step() -> None:
        with torch.autocast(torch.device(device).type, enabled=settings.bfloat16, dtype=torch.bfloat16):
            out = module(cubes)
        (out - cubes).float().abs().mean().backward()

    return {f"unet_{settings.preset}": (float(n * settings.cube_px**3), step)}
