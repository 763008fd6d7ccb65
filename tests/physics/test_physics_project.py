"""Projection: against closed forms, against its own adjoint, and against relion_project."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from analytic_helper import Gaussians, correlations, displacements, relative, some_gaussians
from errors_helper import raises_code

from cryoiso.core.errors import CryoisoError, InputError
from cryoiso.core.types import DensityMap
from cryoiso.physics import padded_transform
from cryoiso.physics.backproject import SliceAccumulator
from cryoiso.physics.fourier import fourier_disc, images_to_fourier, shift_phases
from cryoiso.physics.fourier_sums import half_space_to_volume
from cryoiso.physics.projection import FourierVolume, magnified, project, scatter_to_half_plane
from cryoiso.physics.resample import resample_map
from cryoiso.physics.simulation import Projector, make_particles
from cryoiso.physics.so3 import euler_to_matrix, random_rotations
from cryoiso.physics.symmetry import point_group

RNG = np.random.default_rng(3)


def tensor(a) -> torch.Tensor:
    return torch.as_tensor(np.asarray(a, np.float32))


def generic_rotations(n: int) -> torch.Tensor:
    """Random rotations and the axis-parallel ones, where samples lie on the grid and on its x = 0 plane."""
    return tensor(np.concatenate([random_rotations(np.random.default_rng(1), n), point_group("O")]))


# --- closed forms


@pytest.mark.parametrize("box", [32, 33, 48, 49])
def test_projections_of_gaussians(box):
    """Trilinear at padding 2: relative error 0.019 to 0.026 (0.06 without the division by the sinc^2 envelope)."""
    object_ = some_gaussians(box)
    rotation, shift = random_rotations(RNG, 24), RNG.normal(0, 2, (24, 2))
    truth = object_.images(box, rotation, shift)
    volume = torch.as_tensor(object_.volume(box))
    errors = {}
    for padding in (1, 2, 3):
        images = project(volume, torch.as_tensor(rotation), torch.as_tensor(shift) * 3.0, 3.0, padding).numpy()
        errors[padding] = relative(images, truth)
        if padding == 2:
            assert correlations(images, truth).min() > 0.999
            moved = displacements(truth, images)
            assert np.abs(moved).max() < 0.04 and np.abs(moved.mean(0)).max() < 0.01
    assert errors[2] < 0.03 and errors[3] < 0.016 and errors[3] < errors[2] < errors[1] < 0.15


def test_slices_are_the_transform_of_the_line_integrals():
    """Coefficient by coefficient, scale and phase included, at every frequency.

    Zero frequency lies on a grid point, where the division by the envelope is too much of a good thing: 4 %.
    """
    box = 40
    object_, rotation, disc = (
        some_gaussians(box, sigma=1.0),
        random_rotations(RNG, 20),
        fourier_disc(40, 19, with_dc=True),
    )
    volume = FourierVolume.from_volume(tensor(object_.volume(box)))
    truth = object_.transform(rotation, disc.ky / box, disc.kx / box) / box
    slices = volume.slices(tensor(rotation), disc).numpy()
    for shell in (0, 1, 4, 10, 16):  # beyond, the sampled Gaussians themselves are aliased
        here = disc.shell == shell
        assert relative(slices[:, here], truth[:, here]) < (0.03 if shell else 0.05)


@pytest.mark.parametrize("box", [32, 33])
def test_centre_of_rotation_is_pixel_half_the_box(box):
    """A blob at the centre stays at D//2 in 100 poses; one elsewhere lands at (A v)_xy - origin / pixel size."""
    rotation = random_rotations(RNG, 100)
    blob = Gaussians(np.zeros((1, 3)), np.ones(1), 2.0)
    images = project(tensor(blob.volume(box)), tensor(rotation)).numpy()
    assert all(np.unravel_index(i.argmax(), i.shape) == (box // 2, box // 2) for i in images)
    assert np.abs(displacements(blob.images(box, rotation), images)).max() < 1e-3
    aside = Gaussians(np.array([[6.0, -3.0, 4.5]]), np.ones(1), 2.0)
    shift_A = RNG.normal(0, 8, (100, 2))
    images = project(tensor(aside.volume(box)), tensor(rotation), tensor(shift_A), 4.0).numpy()
    moved = displacements(aside.images(box, rotation, shift_A / 4), images)
    assert np.abs(moved).max() < 0.05 and np.abs(moved.mean(0)).max() < 0.005


@pytest.mark.parametrize("name", ["C4", "D2", "O", "C3"])
def test_symmetric_copies_give_identical_projections(name):
    """To rounding where the group maps the lattice onto itself, to the interpolation's error for C3."""
    ops, box = point_group(name), 33
    one = some_gaussians(box, 8)
    object_ = Gaussians(np.concatenate([one.centres @ s.T for s in ops]), np.tile(one.weights, len(ops)), 1.5)
    rotation, volume = random_rotations(RNG, 10), tensor(object_.volume(box))
    first = project(volume, tensor(rotation)).numpy()
    for s in ops[1:]:
        copy = project(volume, tensor(rotation @ s)).numpy()
        assert relative(copy, first) < (0.03 if name == "C3" else 2e-5)
        assert correlations(copy, first).min() > 0.999
    other = project(volume, tensor(rotation @ euler_to_matrix(37.0, 20.0, 0.0)[0])).numpy()
    assert relative(other, first) > 0.08


# --- magnified images


def test_magnified_slices_sample_the_object_at_m_k():
    """Anisotropic magnification with shear: image frequency k sees the object at M k."""
    box, matrix = 40, np.array([[1.06, 0.03], [-0.02, 0.95]])
    object_, rotation = some_gaussians(box), random_rotations(RNG, 20)
    disc = fourier_disc(box, 17)
    volume = FourierVolume.from_volume(tensor(object_.volume(box)))
    turned = magnified(tensor(rotation), torch.as_tensor(matrix))
    kx, ky = matrix @ np.stack([disc.kx, disc.ky]).astype(float)
    truth = object_.transform(rotation, ky / box, kx / box) / box
    assert relative(volume.slices(turned, disc), truth) < 0.03
    assert relative(volume.slices(tensor(rotation), disc), truth) > 0.1
    np.testing.assert_array_equal(turned[:, 2], tensor(rotation)[:, 2])


def test_a_ratio_of_pixel_sizes_is_a_magnification():
    """Images of 4 Å pixels from a map of 5 Å pixels equal images of the map brought onto 4 Å pixels."""
    coarse = some_gaussians(40, sigma=2.0).volume(40)
    fine = resample_map(coarse, 5.0, 40, 4.0)
    rotation, disc = tensor(random_rotations(RNG, 10)), fourier_disc(40, 15)
    ours = FourierVolume.from_volume(tensor(coarse)).slices(magnified(rotation, torch.eye(2) * 5.0 / 4.0), disc)
    truth = FourierVolume.from_volume(tensor(fine)).slices(rotation, disc)
    # a projection is a sum over voxels, of which the finer grid has (5/4)^3 times as many
    assert relative(ours * (5 / 4) ** 3, truth) < 0.03


def test_samples_beyond_the_grid_are_refused():
    """Rather than read from and written to memory that belongs to somebody else."""
    volume = FourierVolume.from_volume(tensor(some_gaussians(24).volume(24)))
    rotation, disc = tensor(random_rotations(RNG, 3)), fourier_disc(24, 11)
    far = magnified(rotation, torch.eye(2) * 1.6)
    values = torch.ones(3, disc.size)
    with raises_code("grid-too-coarse", CryoisoError, match="grid ends at 11"):
        volume.slices(far, disc)
    with raises_code("grid-too-coarse", CryoisoError, match="grid ends at 11"):
        SliceAccumulator.empty(24).insert(values.to(torch.complex64), values, far, disc)
    with pytest.raises(CryoisoError):
        volume.slices(rotation * float("nan"), disc)


def test_simulated_images_of_a_large_magnification():
    """The simulator leaves out what lies beyond the map's Nyquist circle."""
    object_ = some_gaussians(32, sigma=2.0)
    p = make_particles(6, 32, 3.0, seed=1)
    p = replace(p, groups=(replace(p.groups[0], magnification=(1.4, 0.0, 0.0, 1.3)),))
    images = Projector(DensityMap(object_.volume(32).astype(np.float32), 3.0), with_ctf=False).images(p, np.arange(6))
    disc = fourier_disc(32, 11)
    truth = object_.transform(p.rotation, 1.3 * disc.ky / 32, 1.4 * disc.kx / 32) / 32
    assert relative(disc.gather(images_to_fourier(images)), truth) < 0.03


# --- Friedel's law, twins, derivatives, adjoint


@pytest.mark.parametrize("box", [24, 25])
def test_friedel_symmetry(box):
    volume = FourierVolume.from_volume(tensor(RNG.normal(size=(box,) * 3)))
    plane = volume.grid[:, :, 0]
    assert relative(plane.flip(0, 1).conj(), plane) < 1e-5
    disc, rotation = fourier_disc(box, (box - 1) // 2, with_dc=True), generic_rotations(20)
    opposite = replace(disc, ky=-disc.ky, kx=-disc.kx)
    slices = volume.slices(rotation, disc)
    assert relative(volume.slices(rotation, opposite).conj(), slices) < 1e-5
    # the whole plane, made of the half-plane, is the transform of a real image
    half = scatter_to_half_plane(slices, disc)
    whole = torch.zeros(len(half), box, box, dtype=half.dtype)
    whole[:, :, : box // 2 + 1] = half
    index = -torch.arange(box) % box
    whole[:, :, box // 2 + 1 :] = half[:, index][:, :, index[box // 2 + 1 :]].conj()
    images = torch.fft.ifft2(whole)
    assert images.imag.abs().max() < 1e-5 * images.real.abs().max()


@pytest.mark.parametrize("padding", [1, 2, 3])
def test_kernel_and_its_torch_twin_agree(padding):
    volume = FourierVolume.from_volume(tensor(RNG.normal(size=(30,) * 3)), padding)
    rotation, disc = generic_rotations(60), fourier_disc(30, 14, with_dc=True)
    fast, plain = volume.slices(rotation, disc), volume.slices_torch(rotation, disc)
    assert relative(fast, plain) < 1e-5
    exact = FourierVolume(volume.grid.to(torch.complex128), 30, padding, volume.radius_px)
    assert relative(fast, exact.slices(rotation.double(), disc)) < 1e-5


@pytest.mark.parametrize("box, padding, radius", [(20, 2, 9), (21, 2, 10), (21, 1, 10), (20, 3, 5)])
def test_the_transform_slab_by_slab_is_that_of_the_padded_cube(monkeypatch, box, padding, radius):
    """With gradients the padded cube is transformed as a whole, without them axis by axis, here a plane at a time."""
    monkeypatch.setattr(padded_transform, "SLAB", 1)
    volume = torch.as_tensor(RNG.normal(size=(box,) * 3))
    in_parts = FourierVolume.from_volume(volume, padding, radius)
    whole = FourierVolume.from_volume(volume.clone().requires_grad_(), padding, radius)
    assert in_parts.grid.shape == whole.grid.shape
    assert relative(in_parts.grid, whole.grid.detach()) < 1e-12


@pytest.mark.gpu
def test_slices_on_a_gpu_agree():
    volume = FourierVolume.from_volume(tensor(RNG.normal(size=(30,) * 3)))
    rotation, disc = generic_rotations(60), fourier_disc(30, 14, with_dc=True)
    there = FourierVolume(volume.grid.cuda(), 30, 2, volume.radius_px)
    assert relative(there.slices(rotation.cuda(), disc), volume.slices(rotation, disc)) < 1e-5


def test_gradients():
    """Of the slices in volume and rotation, of whole images in the shift too (finite differences, float64)."""
    volume = torch.as_tensor(RNG.normal(size=(6, 6, 6))).requires_grad_()
    rotation = torch.as_tensor(random_rotations(np.random.default_rng(5), 2)).requires_grad_()
    disc = fourier_disc(6, 2, with_dc=True)

    def slices(v, r):
        return FourierVolume.from_volume(v).slices_torch(r, disc)

    assert torch.autograd.gradcheck(slices, (volume, rotation), fast_mode=True)
    shift = torch.as_tensor(RNG.normal(0, 2, (2, 2))).requires_grad_()
    assert torch.autograd.gradcheck(lambda v, r, s: project(v, r, s, 1.5), (volume, rotation, shift), fast_mode=True)


def test_gradients_reach_single_precision_too():
    """The CPU kernel has no derivative: whoever asks for one gets the torch twin."""
    volume, rotation = tensor(some_gaussians(16).volume(16)).requires_grad_(), tensor(random_rotations(RNG, 2))
    project(volume, rotation.requires_grad_()).square().sum().backward()
    assert volume.grad.abs().max() > 0 and rotation.grad.abs().max() > 0


@pytest.mark.parametrize("box", [20, 21])
def test_projection_and_its_automatic_adjoint(box):
    """<P x, y> = <x, P* y> in float64, through half-planes, crops and paddings."""
    x = torch.as_tensor(RNG.normal(size=(box,) * 3)).requires_grad_()
    rotation, shift = torch.as_tensor(random_rotations(RNG, 12)), torch.as_tensor(RNG.normal(0, 2, (12, 2)))
    images = project(x, rotation, shift)
    y = torch.as_tensor(RNG.normal(size=images.shape))
    forward = (images * y).sum()
    (adjoint,) = torch.autograd.grad(forward, x)
    other = torch.as_tensor(RNG.normal(size=x.shape))
    left = (project(other, rotation, shift) * y).sum()
    scale = float(images.detach().norm() * y.norm())
    assert float(left - (other * adjoint).sum()) == pytest.approx(0, abs=1e-10 * scale)


@pytest.mark.parametrize("box", [24, 25])
@pytest.mark.parametrize("twin", ["numba", "torch"])
def test_insertion_is_the_adjoint_of_slicing(box, twin):
    """In Fourier space: insertion skips kx = 0, ky < 0 and mirrors the x = 0 plane, and so counts every voxel once.

    The inner product of Hermitian grids runs over the whole space: twice the half-space, the x = 0 plane once.
    """
    disc, rotation = fourier_disc(box, (box - 1) // 2), generic_rotations(20)
    volume = FourierVolume.from_volume(tensor(RNG.normal(size=(box,) * 3)))
    y = torch.as_tensor(RNG.normal(size=(2, len(rotation), disc.size)), dtype=torch.float32)
    y = torch.complex(*y)
    accumulator = SliceAccumulator.empty(box)
    insert = accumulator.insert if twin == "numba" else accumulator.insert_torch
    insert(y, torch.ones(y.shape), rotation, disc)
    sums = accumulator.finish()
    slices = volume.slices(rotation, disc)
    left = 2 * (slices.conj() * y).real.double().sum()
    product = (volume.grid.conj() * sums.numerator).real.double()
    right = product[:, :, 0].sum() + 2 * product[:, :, 1:].sum()
    assert float(left - right) == pytest.approx(0, abs=1e-6 * 2 * float(slices.norm() * y.norm()))
    plane = sums.numerator[:, :, 0]
    assert relative(plane.flip(0, 1).conj(), plane) < 1e-6


@pytest.mark.parametrize("box", [24, 25])
def test_back_projection_is_the_adjoint_of_projection(box):
    """<P x, y> = <x, P* y> for real maps and images with shifts: P* by insertion, inverse transform and cropping.

    From P = S F G / D with G the division by the envelope: P* = G F* S* / D, and F* is (2 D)^3 times the inverse
    transform that ``half_space_to_volume`` (which multiplies by D) takes.
    """
    rotation, shift = tensor(random_rotations(RNG, 16)), tensor(RNG.normal(0, 2, (16, 2)))
    x, y = tensor(RNG.normal(size=(box,) * 3)), tensor(RNG.normal(size=(16, box, box)))
    y = y - y.mean((1, 2), keepdim=True)  # insertion would mirror the zero frequency onto itself
    disc = fourier_disc(box, (box - 1) // 2)
    ky, kx = disc.frequencies(1.0)
    data = disc.gather(images_to_fourier(y)) * shift_phases(ky, kx, -shift.double()).conj().to(torch.complex64)
    accumulator = SliceAccumulator.empty(box)
    accumulator.insert(data, torch.ones(data.shape), rotation, disc)
    adjoint = half_space_to_volume(accumulator.finish().numerator, box, 2) * (2 * box) ** 3 / box**2
    images = project(x, rotation, shift)
    left, right = (images * y).double().sum(), (x * adjoint).double().sum()
    assert float(left - right) == pytest.approx(0, abs=1e-6 * float(images.norm() * y.norm()))
    assert abs(float(left)) > 100 * abs(float(left - right))


@pytest.mark.parametrize("shape", [(32, 32, 20), (32, 32), (1, 8, 8, 8)])
def test_a_map_that_is_no_cube_is_named_as_such(shape):
    with raises_code("map-not-cubic", InputError, match=r"a map is a cube.*\(D, D, D\)"):
        FourierVolume.from_volume(torch.zeros(shape))
