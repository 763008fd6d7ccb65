"""Back-projection: its sums, the map made of them, and relion_reconstruct."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from analytic_helper import relative
from errors_helper import raises_code
from mixed_helper import two_microscopes

from cryoiso.core.errors import CryoisoError, InputError
from cryoiso.core.types import DensityMap, Particles
from cryoiso.io.sources import ArraySource
from cryoiso.metrics.fsc_curve import fsc
from cryoiso.parallel.context import Context
from cryoiso.physics import backproject
from cryoiso.physics.backproject import UNIT, SliceAccumulator
from cryoiso.physics.fourier import divide_by_gridding, fourier_disc, pad_volume
from cryoiso.physics.fourier_sums import FourierSums, rotate_half_space, to_transform, transform_to_volume
from cryoiso.physics.phantom import phantom_map
from cryoiso.physics.projection import FourierVolume
from cryoiso.physics.simulation import Projector, SimulatedSource, make_particles
from cryoiso.physics.so3 import random_rotations
from cryoiso.physics.symmetry import point_group
from cryoiso.physics.views import Views
from cryoiso.refine.batches import BatchReader
from cryoiso.refine.likelihood import shift_factors
from cryoiso.refine.reconstruct import reconstruct_halves, weigh

RNG = np.random.default_rng(4)
phantom = lru_cache(phantom_map)


def tensor(a) -> torch.Tensor:
    return torch.as_tensor(np.asarray(a, np.float32))


def slices_to_insert(box: int, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, object]:
    """(data, weight, rotation, where) of n random slices, axis-parallel ones among them."""
    rotation = tensor(np.concatenate([random_rotations(RNG, n - 24), point_group("O")]))
    disc = fourier_disc(box, (box - 1) // 2, with_dc=True)
    data = torch.complex(*tensor(RNG.normal(size=(2, n, disc.size))))
    return data, tensor(RNG.random((n, disc.size))), rotation, disc


def noise_free_map(truth: DensityMap, n: int, *, with_ctf: bool, symmetry: str = "C1", **views) -> np.ndarray:
    """The map that comes back from n exact projections with their true poses."""
    particles = make_particles(n, truth.box_px, truth.pixel_size_A, shift_sd_A=6.0, seed=3, **views)
    particles = replace(particles, half=np.ones(n, np.int8))
    images = Projector(truth, with_ctf=with_ctf).images(particles, np.arange(n)).numpy()
    if not with_ctf:
        particles = without_ctf(particles)
    found = reconstruct_halves(ArraySource(images, particles), particles, Context(), symmetry=symmetry, halves=(1,))
    return found[1].data


def without_ctf(particles: Particles) -> Particles:
    """The same with CTF 1 everywhere: amplitude contrast 1, no defocus, no Cs."""
    group = replace(particles.groups[0], amplitude_contrast=1.0, spherical_aberration_mm=0.0)
    zero = np.zeros(len(particles))
    return replace(particles, groups=(group,), defocus_u_A=zero, defocus_v_A=zero)


# --- the sums


@pytest.mark.parametrize("box, padding", [(24, 2), (25, 2), (24, 1), (21, 3)])
def test_kernel_and_its_torch_twin_agree(box, padding):
    data, weight, rotation, disc = slices_to_insert(box, 60)
    fast, plain = SliceAccumulator.empty(box, padding=padding), SliceAccumulator.empty(box, padding=padding)
    fast.insert(data, weight, rotation, disc)
    plain.insert_torch(data, weight, rotation, disc)
    for i in range(3):
        a, b = fast.grid[..., i].double(), plain.grid[..., i].double()
        assert relative(a, b) < 5e-6
        assert float((a - b).abs().max()) < 1e-5 * float(b.abs().max())
    assert fast.bound == pytest.approx(plain.bound, rel=1e-5)


def some_sums(box: int, padding: int, n: int = 60) -> SliceAccumulator:
    data, weight, rotation, disc = slices_to_insert(box, n)
    accumulator = SliceAccumulator.empty(box, padding=padding)
    accumulator.insert(data, weight, rotation, disc)
    return accumulator


@pytest.mark.parametrize("box, padding", [(24, 2), (25, 2), (24, 1), (21, 3)])
def test_grid_kernels_and_their_torch_twins_agree(box, padding):
    """Conversion, shell means, symmetrisation and division: all that is between the sums and the map."""
    accumulator = some_sums(box, padding)
    fast, plain = accumulator.finish(), accumulator.finish_torch()
    assert relative(fast.numerator, plain.numerator) < 1e-6 and relative(fast.weight, plain.weight) < 1e-6
    shells, radius = fast.shells(), fast.radius_px
    for s in range(radius + 1):
        by_hand = float(fast.weight[shells == s].double().mean())
        assert float(fast.shell_mean_weight()[s]) == pytest.approx(by_hand, rel=1e-6)
    ops = point_group("C3")
    numerator, weight = fast.numerator.clone(), fast.weight.clone()
    for s in ops[1:]:
        rotated = rotate_half_space(fast.numerator, fast.weight, s)
        numerator, weight = numerator + rotated[0], weight + rotated[1]
    symmetrised = fast.symmetrised(ops)
    assert relative(symmetrised.numerator, numerator) < 1e-5 and relative(symmetrised.weight, weight) < 1e-5
    term, floor = torch.rand(radius + 1), torch.rand(radius + 1) * 0.5 * float(fast.weight.mean())
    transform = to_transform(fast.divide_torch(term, floor), box * padding) * box
    for first, last in ((0, 1), (3, transform.shape[2])):
        assert relative(fast._divide_numba(term, floor, first, last), transform[:, :, first:last]) < 1e-5


def test_sums_whose_memory_is_given_back_have_the_same_bits(monkeypatch):
    """Converted a plane at a time; on Linux the grid is empty afterwards, up to the last page."""
    monkeypatch.setattr(backproject, "RELEASED_VOXELS", 1)
    accumulator = some_sums(24, 2)
    kept = accumulator.finish()
    given_back = accumulator.finish(release=True)
    np.testing.assert_array_equal(given_back.numerator, kept.numerator)
    np.testing.assert_array_equal(given_back.weight, kept.weight)
    assert kept.weight.any()
    if sys.platform == "linux":
        assert not accumulator.grid[:-1].any()


@pytest.mark.parametrize("box, padding", [(20, 2), (21, 2), (21, 1), (20, 3)])
def test_the_inverse_transform_keeps_the_inner_cube(box, padding):
    """Axis by axis with early cropping, against the whole transform cropped at the end."""
    size = box * padding
    half = torch.complex(*tensor(RNG.normal(size=(2, size, size, size // 2 + 1))))
    whole = torch.fft.fftshift(torch.fft.irfftn(half, s=(size,) * 3))
    expected = divide_by_gridding(pad_volume(whole, box), padding)
    assert relative(transform_to_volume(half, box, padding), expected) < 1e-5


def test_images_are_centred_and_weighted_alike_by_kernel_and_torch():
    """x c exp(2 pi i k.s / D) and c^2, the CPU kernel against plain torch."""
    particles = make_particles(20, 24, 4.0, seed=1)
    source = ArraySource(RNG.normal(size=(20, 24, 24)).astype(np.float32), particles)
    batch = BatchReader(source, particles, 4.0, with_dc=True).read(np.arange(20), 11)
    shift = torch.as_tensor(RNG.normal(0, 3, (20, 2)))
    data, weight = torch.empty_like(batch.coefficients), torch.empty_like(batch.ctf)
    weigh(batch, shift, data, weight)
    assert relative(data, batch.coefficients * batch.ctf * shift_factors(batch.disc, shift.float())) < 1e-5
    assert relative(weight, batch.ctf.square()) < 1e-6


@pytest.mark.gpu
def test_insertion_on_a_gpu_agrees():
    data, weight, rotation, disc = slices_to_insert(24, 60)
    here, there = SliceAccumulator.empty(24), SliceAccumulator.empty(24, device="cuda")
    here.insert(data, weight, rotation, disc)
    there.insert(data.cuda(), weight.cuda(), rotation.cuda(), disc)
    assert relative(there.grid.double(), here.grid.double()) < 1e-6
    a, b = there.finish().reconstruct(), here.finish().reconstruct()
    assert relative(a, b) < 1e-4


def test_sums_keep_every_sample():
    """All eight shares of a sample sum to it, to the rounding towards zero of each: no weight is lost or made."""
    data, weight, rotation, disc = slices_to_insert(24, 60)
    accumulator = SliceAccumulator.empty(24)
    accumulator.insert(data, weight, rotation, disc)
    assert float(accumulator.grid[..., 2].sum()) / UNIT == pytest.approx(float(weight.double().sum()), rel=1e-6)


def test_sums_have_the_same_bits_in_any_order_and_on_any_number_of_threads():
    """Threads, order of the particles, size of the batches, and partial sums of ranks."""
    import numba

    data, weight, rotation, disc = slices_to_insert(32, 200)

    def grid(order: np.ndarray, batches: int, threads: int) -> torch.Tensor:
        accumulator = SliceAccumulator.empty(32)
        numba.set_num_threads(threads)
        for rows in np.array_split(order, batches):
            accumulator.insert(data[rows], weight[rows], rotation[rows], disc)
        return accumulator.grid

    most = numba.config.NUMBA_NUM_THREADS
    order = np.arange(200)
    try:
        first = grid(order, 1, most)
        for batches, threads in ((1, 1), (7, most), (200, 1)):
            assert torch.equal(grid(RNG.permutation(200), batches, threads), first)
        assert torch.equal(grid(order[:77], 2, 1) + grid(order[77:], 3, most), first)
    finally:
        numba.set_num_threads(most)


FIVE_THREADS = """
import numba, sys
sys.path.insert(0, sys.argv[1])
import test_physics_backproject as t
assert numba.get_num_threads() == 5
print(t.digest_of_sums())
"""


def digest_of_sums() -> str:
    """SHA-256 of the sums of slices that are the same in every process."""
    rng = np.random.default_rng(8)
    disc, rotation = fourier_disc(32, 15), tensor(random_rotations(rng, 150))
    data = torch.complex(*tensor(rng.normal(size=(2, 150, disc.size))))
    accumulator = SliceAccumulator.empty(32)
    accumulator.insert(data, tensor(rng.random((150, disc.size))), rotation, disc)
    return hashlib.sha256(accumulator.grid.numpy().tobytes()).hexdigest()


def test_five_threads_make_the_same_bits():
    """In a process of its own, because numba fixes the number when it starts."""
    command = [sys.executable, "-c", FIVE_THREADS, str(Path(__file__).parent)]
    env = {**os.environ, "NUMBA_NUM_THREADS": "5"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest_of_sums()


def test_overflow_is_seen():
    """Of a single huge value, of many large ones, and of sums from other ranks; not of what still fits."""
    data, weight, rotation, disc = slices_to_insert(24, 30)
    accumulator = SliceAccumulator.empty(24)
    accumulator.insert(data * 1e5, weight, rotation, disc)
    accumulator.finish()
    for twin in ("insert", "insert_torch"):
        single = SliceAccumulator.empty(24)
        values = data.clone()
        values[3, 5] = 3e9
        getattr(single, twin)(values, weight, rotation, disc)
        with raises_code("images-not-normalised", CryoisoError):
            single.finish()
    many = SliceAccumulator.empty(24)
    for _ in range(5):
        many.insert(data * 1e6, weight, rotation, disc)
    with raises_code("images-not-normalised", CryoisoError):
        many.finish()
    with raises_code("images-not-normalised", CryoisoError):
        replace(accumulator, bound=accumulator.bound + 2.0**31).finish()


def test_the_bound_is_one():
    """No voxel exceeds what the overflow guard believes."""
    for padding in (1, 2):
        data, weight, rotation, disc = slices_to_insert(24, 100)
        rotation = rotation[:1].expand(100, 3, 3).contiguous()  # all on one plane
        accumulator = SliceAccumulator.empty(24, padding=padding)
        accumulator.insert(torch.ones_like(data), torch.ones_like(weight), rotation, disc)
        sums = accumulator.finish()
        assert float(sums.weight.max()) <= accumulator.bound


# --- the map


@pytest.mark.parametrize("box, with_ctf", [(48, False), (48, True), (47, True)])
def test_projections_go_back_to_the_map(box, with_ctf):
    """1,500 views, shifted: FSC > 0.998 to 0.9 Nyquist, and the same grey values within 1.5 %."""
    truth = phantom(box, 4.0, 8.8)
    found = noise_free_map(truth, 1500, with_ctf=with_ctf)
    curve = fsc(found, truth.data)
    assert curve[1 : int(0.9 * box / 2) + 1].min() > 0.998
    slope = float(np.vdot(truth.data, found) / np.vdot(truth.data, truth.data))
    assert slope == pytest.approx(1.0, abs=0.015)


def test_symmetrising_the_sums_equals_inserting_all_copies():
    """C3 by interpolation of the sums against every view inserted three times; 80 views alone leave gaps."""
    truth = phantom(44, 4.5, 11.0)
    disc, rotation = fourier_disc(44, 21), random_rotations(RNG, 80)
    volume = FourierVolume.from_volume(tensor(truth.data))
    one, all_ = SliceAccumulator.empty(44), SliceAccumulator.empty(44)
    data, ones = volume.slices(tensor(rotation), disc), torch.ones(80, disc.size)
    one.insert(data, ones, tensor(rotation), disc)
    for s in point_group("C3"):
        all_.insert(data, ones, tensor(rotation @ s), disc)
    symmetrised, whole = one.finish().symmetrised(point_group("C3")), all_.finish()
    a, b, alone = symmetrised.reconstruct(), whole.reconstruct(), one.finish().reconstruct()
    curve = fsc(a.numpy(), b.numpy())
    assert curve[1:20].min() > 0.998
    assert fsc(a.numpy(), truth.data)[1:20].min() > 0.998 and fsc(alone.numpy(), truth.data)[19] < 0.97
    assert float(symmetrised.weight.sum()) == pytest.approx(float(whole.weight.sum()), rel=1e-2)


@pytest.mark.parametrize("name", ["D2", "C4"])
def test_symmetrising_is_exact_where_the_group_maps_the_lattice_onto_itself(name):
    data, weight, rotation, disc = slices_to_insert(24, 60)
    ops = point_group(name)
    one, all_ = SliceAccumulator.empty(24), SliceAccumulator.empty(24)
    one.insert(data, weight, rotation, disc)
    for s in ops:
        all_.insert(data, weight, rotation @ tensor(s), disc)
    a, b = one.finish().symmetrised(ops), all_.finish()
    inside = a.shells() <= 11
    assert relative(a.numerator[inside], b.numerator[inside]) < 1e-4
    assert relative(a.weight[inside], b.weight[inside]) < 1e-4


def test_directions_that_were_not_seen_stay_empty():
    """A missing cone of 30 degrees: weights and numerator are zero inside, and the map has no power there."""
    box, cone = 48, 30.0
    truth = phantom(box, 4.0, 8.8)
    rotation = make_particles(600, box, 4.0, views=Views("missing-cone", cone_deg=cone), seed=2).rotation
    disc = fourier_disc(box, 23)
    accumulator = SliceAccumulator.empty(box)
    data = FourierVolume.from_volume(tensor(truth.data)).slices(tensor(rotation), disc)
    accumulator.insert(data, torch.ones(data.shape), tensor(rotation), disc)
    sums = accumulator.finish()
    h = (sums.weight.shape[0] - 1) // 2
    z, y, x = np.meshgrid(np.arange(-h, h + 1), np.arange(-h, h + 1), np.arange(h + 1), indexing="ij")
    radius, angle = np.sqrt(z**2 + y**2 + x**2), np.degrees(np.arctan2(np.hypot(x, y), np.abs(z)))
    # one grid step of interpolation reaches into the cone
    empty = torch.as_tensor((radius > 12) & (radius < 46) & (radius * np.sin(np.radians(cone - angle)) > 1.8))
    seen = torch.as_tensor((radius > 12) & (radius < 40) & (angle > cone + 5))
    assert int(empty.sum()) > 1000
    assert float(sums.weight[empty].abs().max()) == 0 and float(sums.numerator[empty].abs().max()) == 0
    assert float((sums.weight[seen] > 0).float().mean()) > 0.99
    power, whole = (cone_power(v, 15.0) for v in (sums.reconstruct().numpy(), truth.data))
    assert power < 0.01 * whole


def cone_power(volume: np.ndarray, half_angle_deg: float) -> float:
    """Power beyond shell 5 within an angle of the z axis."""
    k = np.fft.fftfreq(len(volume)) * len(volume)
    z, y, x = np.meshgrid(k, k, k, indexing="ij")
    there = np.degrees(np.arctan2(np.hypot(x, y), np.abs(z))) < half_angle_deg
    there &= (np.sqrt(x**2 + y**2 + z**2) > 5) & (np.sqrt(x**2 + y**2 + z**2) < 20)
    return float((np.abs(np.fft.fftn(volume)) ** 2)[there].sum())


def random_sums(spread: float = 1.0) -> FourierSums:
    """Sums whose weights span a factor of exp(spread) in every shell."""
    weight = torch.exp(spread * (torch.rand(21, 21, 11) - 0.5))
    return FourierSums(torch.complex(torch.randn(21, 21, 11), torch.randn(21, 21, 11)), weight, 9, 2, 4)


def test_wiener_term():
    """Each coefficient is divided by its weight plus the term of its shell."""
    sums = random_sums()
    mean, shells = sums.shell_mean_weight(), sums.shells()
    for s in range(5):
        assert float(mean[s]) == pytest.approx(float(sums.weight[shells == s].double().mean()), rel=1e-6)
    term = torch.tensor([0.0, 0.5, 1.0, 2.0, 10.0])
    expected = sums.numerator / (sums.weight + term[shells.clamp(max=4)])
    by_hand = FourierSums(expected, torch.ones_like(sums.weight), 9, 2, 4).reconstruct()
    assert relative(sums.reconstruct(term), by_hand) < 1e-5
    assert relative(sums.reconstruct(torch.zeros(5)), sums.reconstruct()) < 1e-6


def test_what_a_division_passes():
    """Kernel and torch twin against the definition, with and without a term."""
    sums, shells = random_sums(3.0), None
    shells = sums.shells()
    for term in (None, torch.tensor([0.1, 0.5, 1.0, 2.0, 10.0])):
        signal, noise = sums.passed(term)
        twin = sums.passed_torch(torch.zeros(5) if term is None else term, sums.floor())
        for s in range(5):
            w = sums.weight[shells == s].double()
            f = 1 / (w + (0.0 if term is None else float(term[s]))).clamp(min=float(sums.floor()[s]))
            by_hand = (w * f).square().sum(), (w * f * f).sum()
            assert [float(signal[s]), float(noise[s])] == pytest.approx([float(v) for v in by_hand], rel=1e-5)
            assert [float(t[s]) for t in twin] == pytest.approx([float(v) for v in by_hand], rel=1e-5)


@pytest.mark.parametrize("uneven", [True, False])
def test_signal_power_from_the_fsc(uneven):
    """Two half-sets of known signal power whose weights differ a thousandfold within a shell: the term found from their
    FSC is the true 1 / tau^2, with or without a filter; the mean weight makes it many times too large."""
    rng = np.random.default_rng(1)
    rows, tau2 = 61, 2.0
    weight = torch.as_tensor(np.exp(rng.uniform(np.log(0.01), np.log(10), (rows, rows, 31))).astype(np.float32))
    signal = np.sqrt(tau2 / 2) * (rng.normal(size=weight.shape) + 1j * rng.normal(size=weight.shape))
    halves = []
    for _ in range(2):
        noise = (rng.normal(size=weight.shape) + 1j * rng.normal(size=weight.shape)) / np.sqrt(2)
        numerator = weight.numpy() * signal + np.sqrt(weight.numpy()) * noise
        halves.append(FourierSums(torch.as_tensor(numerator.astype(np.complex64)), weight, 29, 2, 14))
    shells = halves[0].shells().numpy()
    for wiener in (None, torch.full((15,), 1 / tau2)):
        term = torch.zeros(15) if wiener is None else wiener
        maps = [h.divide_torch(term, h.floor()).numpy() for h in halves]
        sums = [
            np.bincount(shells.ravel(), v.ravel(), 99)[:15]
            for v in ((maps[0] * maps[1].conj()).real, abs(maps[0]) ** 2, abs(maps[1]) ** 2)
        ]
        found = halves[0].wiener_term(sums[0] / np.sqrt(sums[1] * sums[2]), wiener, uneven=uneven).numpy()[5:]
        if uneven:  # unfiltered maps tell it with far more scatter
            assert found.mean() == pytest.approx(1 / tau2, rel=0.1 if wiener is None else 0.03)
            np.testing.assert_allclose(found, 1 / tau2, rtol=0.5 if wiener is None else 0.1)
        elif wiener is None:
            assert (found > 5 / tau2).all()


def test_tiny_weights_do_not_blow_up():
    """A voxel with a millionth of its shell's weight counts as if it had a thousandth."""
    weight = torch.ones(21, 21, 11)
    weight[10, 10, 5] = 1e-6
    numerator = torch.zeros(21, 21, 11, dtype=torch.complex64)
    numerator[10, 10, 5] = 1e-6
    peak = FourierSums(numerator, weight, 9, 2, 4).reconstruct().abs().max()
    weight[10, 10, 5] = 1.0
    alone = FourierSums(numerator * 1e6, weight, 9, 2, 4).reconstruct().abs().max()
    assert 0 < float(peak) < 1.1e-3 * float(alone)


def test_maps_end_at_the_sphere_that_every_view_contains():
    data, weight, rotation, disc = slices_to_insert(32, 100)
    accumulator = SliceAccumulator.empty(32)
    accumulator.insert(data, weight, rotation, disc)
    volume = accumulator.finish().reconstruct().numpy()
    axis = np.arange(32) - 16
    radius = np.sqrt(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2)
    assert np.abs(volume[radius > 19]).max() == 0 < np.abs(volume[radius < 16]).min()


def test_images_of_another_pixel_size_and_distorted_ones_fall_into_place():
    """4.5 and 5 Å a pixel, the second kind with beam tilt and anisotropic magnification: one CTF-corrected map."""
    tilt, distortion = (30.0, 10.0), (0.96, 0.02, 0.03, 1.05)
    source = two_microscopes(
        600, 44, 4.5, 5.0, snr_db=None, shift_sd_A=15.0, beam_tilt_mrad=tilt, magnification=distortion
    )
    particles = replace(source.particles, half=np.ones(1200, np.int8))
    found = reconstruct_halves(source, particles, Context(), halves=(1,), pixel_size_A=4.5)[1]
    assert found.pixel_size_A == 4.5
    assert fsc(found.data, source.truth.data)[1:16].min() > 0.999
    only = particles.take(particles.optics == 1)
    rows = np.flatnonzero(particles.optics == 1)
    second = reconstruct_halves(ArraySource(source.read(rows), only), only, Context(), halves=(1,), pixel_size_A=4.5)[1]
    assert fsc(second.data, source.truth.data)[1:16].min() > 0.998


def test_halves_are_kept_apart_and_missing_ones_named():
    truth = phantom(44, 4.5, 11.0)
    particles = make_particles(200, 44, 4.5, seed=3)
    source = SimulatedSource(truth, particles, noise=False)
    images = source.read(np.arange(200))
    maps = reconstruct_halves(ArraySource(images, particles), particles, Context())
    changed = np.where((particles.half == 2)[:, None, None], 7 * images[::-1], images)
    again = reconstruct_halves(ArraySource(changed, particles), particles, Context())
    np.testing.assert_array_equal(maps[1].data, again[1].data)
    assert relative(again[2].data, maps[2].data) > 0.5
    with raises_code("half-set-empty", InputError, match="half-set 2 is empty"):
        reconstruct_halves(source, replace(particles, half=np.ones(200, np.int8)), Context())
    with raises_code("poses-missing", InputError):
        reconstruct_halves(source, replace(particles, rotation=None), Context())
