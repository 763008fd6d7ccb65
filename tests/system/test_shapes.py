"""Shapes that signatures name: they can be evaluated, they hold, and other ones are refused."""

from __future__ import annotations

import importlib
import inspect
from types import FunctionType

import jaxtyping
import numpy as np
import pytest
import torch
from shapes_helper import checked, resolved, shaped
from test_library import FACES, exported

from cryoiso.core.errors import InputError
from cryoiso.core.types import DensityMap
from cryoiso.metrics import (
    conical_fsc,
    fourier_sampling,
    fsc,
    fsc3d,
    fsc_corrected,
    pose_errors,
    resolved_region,
    sphericity,
    transform,
    view_distribution,
)  # fmt: skip
from cryoiso.nets import ConditionalHvae, HvaeConfig, Unet3d, UnetConfig, pose_vector
from cryoiso.physics import (
    angular_distance_deg,
    apply_bfactor,
    circle_mask,
    ctf,
    frequency_grid,
    highpass,
    lowpass,
    matrix_to_euler,
    normalise_background,
    phantom_map,
    place_map,
    point_group,
    power_spectrum,
    project,
    random_rotations,
    resample_map,
    simulate,
    soft_mask_from_map,
    symmetrise_rotations,
    to_asymmetric_unit,
)  # fmt: skip

BOX = 20
MAP = phantom_map(BOX, 8.0, resolution_A=20.0).data
NOISY = MAP + np.random.default_rng(1).normal(size=MAP.shape).astype(np.float32)
SLAB, SMALL = MAP[:, :, :10], MAP[:12, :12, :12]
TURNS = random_rotations(np.random.default_rng(2), 5)
FLAT = TURNS[0]
TENSOR, TURNED = torch.as_tensor(MAP), torch.as_tensor(TURNS, dtype=torch.float32)
IMAGES = np.random.default_rng(3).normal(size=(4, BOX, BOX)).astype(np.float32)
NYQUIST = {"box_px": BOX, "pixel_size_A": 8.0}

CASES = [
    (project, (TENSOR, TURNED), (TENSOR[:, :, :10], TURNED)),
    (project, (TENSOR, TURNED), (TENSOR, TURNED[:, :2])),
    (project, (TENSOR, TURNED, torch.zeros(5, 2)), (TENSOR, TURNED, torch.zeros(4, 2))),
    (lowpass, (MAP, 8.0, 30.0), (SLAB, 8.0, 30.0)),
    (highpass, (MAP, 8.0, 30.0), (SLAB, 8.0, 30.0)),
    (apply_bfactor, (MAP, 8.0, 50.0), (SLAB, 8.0, 50.0)),
    (power_spectrum, (IMAGES,), (IMAGES[:, :, :9],)),
    (normalise_background, (IMAGES, 6.0), (IMAGES[0], 6.0)),
    (soft_mask_from_map, (MAP, 8.0), (SLAB, 8.0)),
    (resample_map, (MAP, 8.0, 24, 6.4), (SLAB, 8.0, 24, 6.4)),
    (place_map, (MAP, 8.0, FLAT, np.zeros(3)), (SLAB, 8.0, FLAT, np.zeros(3))),
    (symmetrise_rotations, (TURNS, "C3"), (FLAT, "C3")),
    (fsc, (MAP, NOISY), (MAP, SMALL)),
    (fsc3d, (MAP, NOISY), (MAP, SLAB)),
    (fsc_corrected, (MAP, NOISY, np.ones_like(MAP)), (MAP, NOISY, np.ones_like(SMALL))),
    (resolved_region, (MAP, 8.0), (SLAB, 8.0)),
    (conical_fsc, (transform(MAP), transform(NOISY), BOX, 8.0), (transform(MAP), transform(SMALL), BOX, 8.0)),
    (pose_errors, (TURNS, TURNS), (TURNS, TURNS[:4])),
    (view_distribution, (TURNS,), (TURNS[:, :2],)),
    (fourier_sampling, (TURNS,), (TURNS[:, :2],)),
]
"""(function, arguments that it takes, arguments of another shape)."""
MORE = [
    (matrix_to_euler, (TURNS,), (TURNS[:, :2],)),
    (angular_distance_deg, (TURNS, FLAT), (TURNS, TURNS[:3])),
    (to_asymmetric_unit, (TURNS[:, 2], "C3"), (TURNS[:, 2, :2], "C3")),
    (sphericity, (MAP.mean() < MAP,), (SLAB > 0,)),
    (pose_vector, (TURNED, torch.zeros(5, 2), BOX), (TURNED, torch.zeros(3, 2), BOX)),
]
"""The same, of functions that leave it to numpy and torch to refuse."""


@pytest.mark.parametrize("function, right, wrong", CASES + MORE, ids=lambda x: getattr(x, "__name__", ""))
def test_other_shapes_than_the_signature_says_are_refused(function, right, wrong):
    strict = checked(function)
    strict(*right)
    with pytest.raises(jaxtyping.TypeCheckError):
        strict(*wrong)


@pytest.mark.parametrize("function, right, wrong", CASES, ids=lambda x: getattr(x, "__name__", ""))
def test_without_the_checker_one_clear_error_says_what_was_expected_and_what_was_found(function, right, wrong):
    with pytest.raises(InputError) as caught:
        function(*wrong)
    assert caught.value.expected is not None and caught.value.found is not None


def test_a_result_of_another_shape_is_refused():
    def curve(box_px: int) -> Float[np.ndarray, " {box_px}//2+1"]:  # noqa: F821
        return np.zeros(box_px)

    with pytest.raises(jaxtyping.TypeCheckError):
        checked(curve)(8)


def test_networks_check_their_batches():
    network = Unet3d(UnetConfig(widths=(4, 8)))
    strict = checked(type(network).forward)
    assert strict(network, torch.zeros(2, 1, 8, 8, 8)).shape == (2, 1, 8, 8, 8)
    with pytest.raises(jaxtyping.TypeCheckError):
        strict(network, torch.zeros(2, 1, 8, 8, 6))
    assert {"images", "condition", "pose", "noise"} == set(shaped(ConditionalHvae.forward))
    assert HvaeConfig is not None


def test_shapes_that_depend_on_a_number():
    fy, fx = checked(frequency_grid)(BOX, 8.0)
    values = checked(ctf)(
        fy, fx, defocus_u_A=1e4, defocus_v_A=1e4, defocus_angle_deg=0.0, voltage_kV=300.0,
        spherical_aberration_mm=2.7, amplitude_contrast=0.1,
    )  # fmt: skip
    assert values.shape == (BOX, BOX // 2 + 1)
    assert checked(circle_mask)(BOX, 4.0).shape == (BOX, BOX)
    assert checked(point_group)("C3").shape == (3, 3, 3)


def test_simulated_images_have_the_shape_that_sources_promise():
    source = simulate(DensityMap(MAP, 8.0), 3, snr_db=None)
    read = checked(type(source).read)
    assert read(source, np.arange(2)).shape == (2, BOX, BOX)


def arrays_without_shapes() -> list[str]:
    """Exported functions with an array in their signature that names no shape."""
    found = []
    for package in FACES:
        for name, value in exported(package).items():
            if isinstance(value, FunctionType) and value.__module__.startswith("cryoiso."):
                texts = {k: v for k, v in inspect.get_annotations(value).items() if isinstance(v, str)}
                bare = [k for k, v in texts.items() if ("ndarray" in v or "Tensor" in v) and k not in shaped(value)]
                found += [f"{package}.{name}: {k}" for k in bare]
    return found


def test_every_exported_function_names_the_shapes_of_its_arrays():
    assert arrays_without_shapes() == []


def test_every_annotation_with_a_shape_can_be_evaluated():
    count = 0
    for package in FACES:
        for value in exported(package).values():
            if not (isinstance(value, FunctionType) or inspect.isclass(value)):
                continue
            module = importlib.import_module(value.__module__)
            owners = [value, *vars(value).values()] if inspect.isclass(value) else [value]
            for function in (f for f in owners if isinstance(f, FunctionType) and f.__module__ == module.__name__):
                count += len(resolved(function))
    assert count > 100
