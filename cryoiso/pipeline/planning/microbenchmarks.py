"""The program's inner loops on made-up data of a job's size, to be timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from cryoiso.pipeline.planning.job_size import Problem, preset_of
from cryoiso.pipeline.workflow import CO_REFINEMENTS

Timed = dict[str, tuple[float, Callable[[], Any]]]
"""Kernel -> (units that a call does, the call)."""
IMAGES = 64
VIEWS = 256
SHIFTS = 16
WRITTEN_BYTES = 64 << 20
MEASURED_PX, PREPARED_PX = 32, 64
"""Edges of the maps that are measured and prepared; both take the same time a voxel in larger ones."""


def timings(p: Problem, device: str) -> Timed:
    """The kernels that the job's workflow uses."""
    times = _search(p, device) | _reading(p, device) | _on_cpu(p)
    if p.job.run.workflow in CO_REFINEMENTS:
        times |= _generator(p, device)
    if p.job.run.workflow in ("realign", "both"):
        times |= _unet(p, device)
    return times


def _search(p: Problem, device: str) -> Timed:
    from cryoiso.physics.backproject import SliceAccumulator
    from cryoiso.physics.fourier import fourier_disc
    from cryoiso.physics.projection import FourierVolume
    from cryoiso.physics.so3 import random_rotations
    from cryoiso.refine.likelihood import ReferenceSlices, Whitened, global_scores, local_scores
    from cryoiso.refine.schedule import disc_of_shifts
    from cryoiso.refine.search import cell_children

    draw = np.random.default_rng(1)
    box, padding = p.box_px, p.job.refine.padding
    density = torch.from_numpy(draw.standard_normal((box,) * 3).astype(np.float32)).to(device)
    volume = FourierVolume.from_volume(density, padding)
    radius = (box - 1) // 2
    coarse, fine = fourier_disc(box, min(12, radius)), fourier_disc(box, max(2, 2 * radius // 3))
    full_disc = fourier_disc(box, radius)
    turns = torch.as_tensor(random_rotations(draw, 8 * VIEWS), dtype=torch.float32, device=device)
    shifts = disc_of_shifts(2.2, 1.0)[:SHIFTS].to(device)
    prior = torch.zeros(len(shifts), device=device)

    def images(disc: Any, count: int) -> Whitened:
        data = torch.randn(count, disc.size, dtype=torch.complex64, device=device)
        return Whitened(data, torch.rand(count, disc.size, device=device), disc, None)

    slices = ReferenceSlices.of(volume, turns[:VIEWS], coarse, None)
    narrow, wide = images(coarse, IMAGES), images(fine, IMAGES)
    children = cell_children(1.0).to(device)  # views come in eights of neighbours in the search too
    kids = torch.einsum("cij,rjk->rcik", children, turns[:VIEWS]).reshape(-1, 3, 3)
    rows = torch.arange(8 * VIEWS, device=device) * IMAGES // (8 * VIEWS)
    centre = torch.zeros(8 * VIEWS, 2, device=device)
    accumulator = SliceAccumulator.empty(box, padding=padding, device=device)
    inserted = images(full_disc, 4 * IMAGES)
    return {
        "gemm": (
            float(IMAGES * coarse.size * VIEWS * (4 * len(shifts) + 2)),
            lambda: global_scores(narrow, slices, shifts, prior),
        ),
        "local": (
            float(8 * VIEWS * fine.size), lambda: local_scores(wide, volume, rows, kids, centre, 0.5, 8)
        ),
        "insert": (
            float(4 * IMAGES * full_disc.size),
            lambda: accumulator.insert(inserted.data, inserted.weight, turns[: 4 * IMAGES], full_disc),
        ),
        "transform": (float((padding * box) ** 3), lambda: FourierVolume.from_volume(density, padding)),
    }  # fmt: skip


def _reading(p: Problem, device: str) -> Timed:
    """Transform and CTF; the disk's part is not in it."""
    from cryoiso.core.types import OpticsGroup, Particles
    from cryoiso.physics.contrast_transfer import ctf_for
    from cryoiso.physics.fourier import fourier_disc, images_to_fourier

    pixels = torch.randn(IMAGES, p.box_px, p.box_px, device=device)
    disc = fourier_disc(p.box_px, (p.box_px - 1) // 2)
    particles = _particles(p, OpticsGroup, Particles)
    frequency = disc.frequencies(p.pixel_size_A)

    def prepare() -> Any:
        coefficients = disc.gather(images_to_fourier(pixels)).to(torch.complex64)
        return coefficients, ctf_for(particles, np.arange(IMAGES), p.box_px, freq_invA=frequency, device=device)

    return {"read": (float(IMAGES * p.box_px**2), prepare)}


def _on_cpu(p: Problem) -> Timed:
    """What runs on CPUs wherever the rest does. Files go into the temporary folder and are removed."""
    from cryoiso.methods.assess.measure import diagnose

    draw = np.random.default_rng(1)
    images = draw.standard_normal((IMAGES, p.box_px, p.box_px), np.float32)
    times = max(1, WRITTEN_BYTES // images.nbytes)
    small, edge = min(p.box_px, MEASURED_PX), min(p.box_px, PREPARED_PX)
    first, second, density = _noisy_ball(small, draw), _noisy_ball(small, draw), _noisy_ball(edge, draw)
    return {
        "write": (float(times * images.nbytes), lambda: _write(images, times, p.job.particles)),
        "prepare": (float(edge**3), lambda: _prepare(density, p.pixel_size_A)),
        "measure": (6.0 * small**3, lambda: diagnose(first, second, _ball(small), p.pixel_size_A, None)),
    }


def _ball(edge: int) -> np.ndarray:
    axis = np.arange(edge) - edge // 2
    return (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2 < (0.35 * edge) ** 2).astype(np.float32)


def _noisy_ball(edge: int, draw: np.random.Generator) -> np.ndarray:
    return 5 * _ball(edge) + draw.standard_normal((edge,) * 3, np.float32)


def _write(images: np.ndarray, times: int, section: Any) -> None:
    """As ``io.ingest`` does with images that it has read."""
    from cryoiso.io.imageprep import IngestSettings, normalise
    from cryoiso.io.shard_writer import write_shard_file

    settings = IngestSettings.of(section)

    def blocks() -> Iterator[np.ndarray]:
        for _ in range(times):
            normalised = normalise(images, settings.background_fraction)[0] if settings.normalise else images
            np.abs(normalised).max((1, 2))
            yield normalised.astype(settings.storage)

    with TemporaryDirectory() as folder:
        count, box = times * len(images), images.shape[-1]
        write_shard_file(Path(folder) / "shard.h5", blocks(), count, box, settings.storage, {}, {})


def _prepare(density: np.ndarray, pixel_size_A: float) -> None:
    from cryoiso.io.mrc import write_map
    from cryoiso.pipeline.inputs.reference import prepare_reference

    with TemporaryDirectory() as folder:
        path = Path(folder) / "density.mrc"
        write_map(path, density, pixel_size_A)
        prepare_reference(path, len(density), pixel_size_A, 10 * pixel_size_A)


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
    from cryoiso.nets.precision import fast_bfloat16

    if not p.job.auxiliary.has_network:
        return {}
    settings, name = training(p.job.auxiliary, device), preset_of(p.job.auxiliary.preset, device)
    config = network(settings, p.box_px)
    module = ConditionalHvae(config).to(device)
    n = settings.batch
    images, condition = torch.randn(2, n, 1, p.box_px, p.box_px, device=device)
    pose, noise = torch.randn(n, 6, device=device), torch.randn(n, config.latent_size, device=device)

    def low() -> Any:
        return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=fast_bfloat16(device))

    def step() -> None:
        with few_threads(settings.preset):
            with low():
                out = module(images, condition, pose, noise)
            negative_elbo(out, images, settings.likelihood_sd, 1.0).loss.backward()

    @torch.no_grad()
    def sample() -> Any:
        with few_threads(settings.preset):
            return module.sample(condition, pose, noise)

    units = float(n * p.box_px**2)
    return {f"train_{name}": (units, step), f"generate_{name}": (units, sample)}


def _unet(p: Problem, device: str) -> Timed:
    """A training step of the anisotropy network on a sub-map."""
    from cryoiso.methods.anisotropy.settings import resolve
    from cryoiso.methods.anisotropy.submaps import EDGE
    from cryoiso.nets.unet import Unet3d, inner

    settings = resolve(p.job.correct, device)
    module = Unet3d(settings.network).to(device)
    module = module.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    n, margin = 1 if device == "cpu" else settings.batch, settings.cube_px // EDGE
    cubes = torch.randn(n, 1, *[settings.cube_px] * 3, device=device).contiguous(memory_format=torch.channels_last_3d)

    def step() -> None:
        with torch.autocast(torch.device(device).type, enabled=settings.bfloat16, dtype=torch.bfloat16):
            out = module(cubes, margin)
        (out - inner(cubes, margin)).float().abs().mean().backward()

    return {f"unet_{settings.preset}": (float(n * settings.cube_px**3), step)}
