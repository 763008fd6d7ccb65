"""Contrast transfer function, beam tilt and higher-order aberrations.

CTF = scale exp(-B s^2 / 4) (sqrt(1 - w^2) sin g + w cos g), g = pi lambda df s^2 - pi/2 Cs lambda^3 s^4 + phase shift,
with df > 0 for underfocus and df = (dU + dV)/2 + (dU - dV)/2 cos 2(theta - theta_ast): RELION's formula, positive at
zero frequency for white protein. Phases are computed in float64, for any type of the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from cryoiso.core.errors import InputError
from cryoiso.core.types import OpticsGroup, Particles, Rows

if TYPE_CHECKING:
    from jaxtyping import Complex, Float

Number = torch.Tensor | float
"""A parameter that is the same for all images, or a tensor of one each that broadcasts with the frequencies."""

_BLOCK = 2**17
"""Values of a CTF computed at once: the intermediate float64 phases stay in the cache."""


def wavelength_A(voltage_kV: float) -> float:
    """Relativistic electron wavelength in Å: 12.2643247 / sqrt(V (1 + 0.978466e-6 V)) with V in volts.

    >>> round(wavelength_A(300.0), 7)
    0.0196876
    """
    volts = voltage_kV * 1e3
    return 12.2643247 / math.sqrt(volts * (1 + 0.978466e-6 * volts))


def frequency_grid(
    box_px: int, pixel_size_A: float, device: str | torch.device = "cpu"
) -> tuple[Float[torch.Tensor, "{box_px} 1"], Float[torch.Tensor, "1 {box_px}//2+1"]]:
    """Frequencies of the half-plane in 1/Å: (freq_y (D, 1), freq_x (1, D//2+1)), float64, y in FFT order."""
    fy = torch.fft.fftfreq(box_px, pixel_size_A, dtype=torch.float64, device=device)
    fx = torch.arange(box_px // 2 + 1, dtype=torch.float64, device=device) / (box_px * pixel_size_A)
    return fy[:, None], fx[None, :]


def ctf(
    freq_y_invA: Float[torch.Tensor, "*#plane"],
    freq_x_invA: Float[torch.Tensor, "*#plane"],
    *,
    defocus_u_A: Number,
    defocus_v_A: Number,
    defocus_angle_deg: Number,
    voltage_kV: float,
    spherical_aberration_mm: float,
    amplitude_contrast: float,
    phase_shift_deg: Number = 0.0,
    bfactor_A2: Number = 0.0,
    scale: Number = 1.0,
) -> Float[torch.Tensor, " ..."]:
    """The contrast transfer function at any frequencies; differentiable in every tensor given.

    Args:
        freq_y_invA, freq_x_invA: frequencies, shapes that broadcast with the parameters.
        defocus_u_A, defocus_v_A, defocus_angle_deg: floats or tensors, e.g. (n, 1, 1).
        voltage_kV, spherical_aberration_mm, amplitude_contrast: of the microscope.
        phase_shift_deg, bfactor_A2, scale: floats or tensors.

    Returns:
        Real tensor of the broadcast shape in the frequencies' dtype.
    """
    dtype = torch.promote_types(freq_y_invA.dtype, freq_x_invA.dtype)
    fy, fx = freq_y_invA.double(), freq_x_invA.double()
    du, dv, axis, phase, bfactor, factor = (
        _f64(v, fy.device) for v in (defocus_u_A, defocus_v_A, defocus_angle_deg, phase_shift_deg, bfactor_A2, scale)
    )
    lam = wavelength_A(voltage_kV)
    axis, phase = torch.deg2rad(axis), torch.deg2rad(phase)
    s2 = fx * fx + fy * fy
    # half the difference times s^2 cos 2(theta - axis), written without an arctangent
    astigmatism = torch.cos(2 * axis) * (fx * fx - fy * fy) + torch.sin(2 * axis) * (2 * fx * fy)
    defocus_s2 = 0.5 * (du + dv) * s2 + 0.5 * (du - dv) * astigmatism
    gamma = math.pi * lam * defocus_s2 - _cs_term(lam, spherical_aberration_mm) * s2 * s2 + phase
    # w = sin(asin w) turns the two terms into one sine
    value = torch.sin(gamma + math.asin(amplitude_contrast))
    return (factor * torch.exp(-0.25 * bfactor * s2) * value).to(dtype)


def _f64(value: Number, device: torch.device) -> torch.Tensor:
    # a Python float would become float32 on the way, which costs 1e-5 of the CTF
    return torch.as_tensor(value, dtype=torch.float64, device=device)


def _cs_term(lam: float, spherical_aberration_mm: float) -> float:
    return 0.5 * math.pi * spherical_aberration_mm * 1e7 * lam**3


def ctf_for(
    particles: Particles,
    rows: Rows | None = None,
    box_px: int | None = None,
    *,
    pixel_size_A: float | None = None,
    freq_invA: tuple[Float[torch.Tensor, "*#plane"], Float[torch.Tensor, "*#plane"]] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Float[torch.Tensor, " n *plane"]:
    """CTFs of particles with all parameters of their optics groups (magnification anisotropy, even Zernike terms).

    Groups of phase-flipped images get the absolute value, which is the CTF of those images. Groups of premultiplied
    images get the CTF itself; for the images see ``physics.ctf_applied``.

    Args:
        particles: the set.
        rows: which of them (None: all).
        box_px: image size D (default: the optics group's box).
        pixel_size_A: pixel size (default: each group's own). For Fourier-cropped images give extent / box_px.
        freq_invA: (freq_y, freq_x) to use instead of the half-plane; any shapes that broadcast to one shape P.
        device, dtype: of the result.

    Returns:
        (n, D, D//2+1), or n times the shape P.

    Raises:
        InputError: the groups of these rows have different boxes and none was given.
    """
    rows = np.arange(len(particles)) if rows is None else np.arange(len(particles))[rows]
    groups = np.asarray(particles.optics)[rows]
    shape: tuple[int, ...]
    if freq_invA is None:
        box_px = box_px or _common_box(particles, groups)
        shape = (box_px, box_px // 2 + 1)
    else:
        shape = np.broadcast_shapes(*(f.shape for f in freq_invA))
    out = torch.empty((len(rows), *shape), dtype=dtype, device=device)
    for g in np.unique(groups):
        where = np.flatnonzero(groups == g)
        group = particles.groups[g]
        freq = freq_invA or frequency_grid(shape[0], pixel_size_A or group.pixel_size_A, device)
        _group_ctf(out, where, particles, rows[where], group, freq)
    return out


def _common_box(particles: Particles, groups: np.ndarray) -> int:
    boxes = {particles.groups[g].box_px for g in np.unique(groups)}
    if len(boxes) != 1:
        raise InputError(
            "the optics groups have different box sizes", expected="one", found=sorted(boxes), code="box-mismatch"
        )
    return int(boxes.pop())


def _group_ctf(
    out: torch.Tensor,
    where: np.ndarray,
    particles: Particles,
    rows: np.ndarray,
    group: OpticsGroup,
    freq: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Write the CTFs of one optics group's particles into ``out[where]``.

    Within a group the phase is linear in six numbers per particle, so all phases are one matrix product.
    """
    device = out.device
    fy, fx = magnify(freq[0].to(device, torch.float64), freq[1].to(device, torch.float64), group.magnification)
    fy, fx = fy.reshape(-1), fx.reshape(-1)
    lam = wavelength_A(group.voltage_kV)
    s2 = fx * fx + fy * fy
    fixed = -_cs_term(lam, group.spherical_aberration_mm) * s2 * s2 + math.asin(group.amplitude_contrast)
    if any(group.even_zernike):
        fixed = fixed - zernike_sum(fy, fx, group.even_zernike, odd=False)
    basis = torch.stack([s2, fx * fx - fy * fy, 2 * fx * fy, torch.ones_like(s2), fixed])
    coefficients = torch.from_numpy(_phase_coefficients(particles, rows, lam)).to(device)
    bfactor = torch.from_numpy(np.asarray(particles.ctf_bfactor_A2, np.float64)[rows]).to(device)
    scale = torch.from_numpy(np.asarray(particles.ctf_scale, np.float64)[rows]).to(device, out.dtype)
    block = max(1, _BLOCK // len(s2))
    for i in range(0, len(rows), block):
        part = slice(i, i + block)
        turns = (coefficients[part] @ basis).div_(2 * math.pi)
        value = turns.sub_(turns.round()).mul_(2 * math.pi).to(out.dtype).sin_().mul_(scale[part, None])
        if bool((bfactor[part] != 0).any()):
            value = value * torch.exp(-0.25 * bfactor[part, None] * s2).to(out.dtype)
        if group.ctf_applied == "flipped":
            value = value.abs()
        place = part if len(where) == len(out) else torch.from_numpy(where[part]).to(device)
        out[place] = value.reshape(-1, *out.shape[1:])


def _phase_coefficients(particles: Particles, rows: np.ndarray, lam: float) -> np.ndarray:
    du, dv, axis, phase = (
        np.asarray(getattr(particles, name), np.float64)[rows]
        for name in ("defocus_u_A", "defocus_v_A", "defocus_angle_deg", "phase_shift_deg")
    )
    mean, half = np.pi * lam * (du + dv) / 2, np.pi * lam * (du - dv) / 2
    axis = np.radians(axis)
    ones = np.ones_like(mean)
    return np.stack([mean, half * np.cos(2 * axis), half * np.sin(2 * axis), np.radians(phase), ones], 1)


def magnify(
    freq_y: Float[torch.Tensor, "*#plane"], freq_x: Float[torch.Tensor, "*#plane"], magnification: Sequence[float]
) -> tuple[Float[torch.Tensor, "*plane"], Float[torch.Tensor, "*plane"]]:
    """Frequencies at which an anisotropically magnified image sees the undistorted one: M (x, y), broadcast.

    Args:
        freq_y, freq_x: frequencies of the image.
        magnification: row-major 2x2 matrix (rlnMagMat00, 01, 10, 11).

    Returns:
        (freq_y, freq_x) of the common shape.
    """
    fy, fx = torch.broadcast_tensors(freq_y, freq_x)
    m00, m01, m10, m11 = magnification
    if (m00, m01, m10, m11) == (1.0, 0.0, 0.0, 1.0):
        return fy, fx
    return m10 * fx + m11 * fy, m00 * fx + m01 * fy


def beam_tilt_phase(
    freq_y_invA: Float[torch.Tensor, "*#plane"], freq_x_invA: Float[torch.Tensor, "*#plane"], group: OpticsGroup
) -> Complex[torch.Tensor, "*plane"]:
    """Phase factors of a group's beam tilt and odd Zernike terms (coma, trefoil) on its images.

    Beam tilt gives the phase -2 pi Cs lambda^2 s^2 (tilt . s), Cs in Å and tilt in radians, RELION's sign. An image is
    the true one times these factors; multiply by the conjugate to correct it. (RELION 3.1 overwrites the third-order
    terms of a group with both beam tilt and odd Zernike terms; here, as in RELION 5, they add up.)

    Args:
        freq_y_invA, freq_x_invA: frequencies that broadcast to one shape P, before magnification.
        group: the optics group.

    Returns:
        complex128 of shape P, modulus 1.
    """
    fy, fx = magnify(freq_y_invA.double(), freq_x_invA.double(), group.magnification)
    lam = wavelength_A(group.voltage_kV)
    tilt_x, tilt_y = group.beam_tilt_mrad
    factor = -2 * math.pi * group.spherical_aberration_mm * 1e7 * 1e-3 * lam * lam
    phase = factor * (fx * fx + fy * fy) * (tilt_x * fx + tilt_y * fy)
    if any(group.odd_zernike):
        phase = phase + zernike_sum(fy, fx, group.odd_zernike, odd=True)
    return torch.polar(torch.ones_like(phase), phase)


def zernike_sum(
    freq_y: Float[torch.Tensor, "*#plane"],
    freq_x: Float[torch.Tensor, "*#plane"],
    coefficients: Sequence[float],
    *,
    odd: bool,
) -> Float[torch.Tensor, "*plane"]:
    """Sum of Zernike polynomials Z(m, n) times coefficients, in RELION's order; the radius is the frequency in 1/Å.

    Args:
        freq_y, freq_x: same shape.
        coefficients: radians; even: (m, n) = (0,0); (-2,2), (0,2), (2,2); (-4,4) ...; odd: (-1,1), (1,1); (-3,3) ...
        odd: selects the series.

    Returns:
        The phase in radians, same shape.
    """
    rho, phi = torch.hypot(freq_x, freq_y), torch.atan2(freq_y, freq_x)
    total = torch.zeros_like(rho)
    for i, c in enumerate(coefficients):
        m, n = zernike_index(i, odd)
        if c:
            angular = torch.cos(m * phi) if m >= 0 else torch.sin(-m * phi)
            total = total + c * zernike_radial(abs(m), n, rho) * angular
    return total


def zernike_index(i: int, odd: bool) -> tuple[int, int]:
    """(m, n) of the i-th coefficient of the odd or even series: n = 1, 3, ... or 0, 2, ..., and m = -n, -n + 2, ..., n.

    >>> [zernike_index(i, True) for i in range(3)], [zernike_index(i, False) for i in range(3)]
    ([(-1, 1), (1, 1), (-3, 3)], [(0, 0), (-2, 2), (0, 2)])
    """
    n = 1 if odd else 0
    while i > n:
        i -= n + 1
        n += 2
    return 2 * i - n, n


def zernike_radial(m: int, n: int, rho: Float[torch.Tensor, "*plane"]) -> Float[torch.Tensor, "*plane"]:
    """Radial Zernike polynomial R(m, n) at ``rho``, for m >= 0 and n - m even (Born and Wolf)."""
    total = torch.zeros_like(rho)
    for k in range((n - m) // 2 + 1):
        bottom = math.factorial(k) * math.factorial((n + m) // 2 - k) * math.factorial((n - m) // 2 - k)
        total = total + (-1) ** k * math.factorial(n - k) / bottom * rho ** (n - 2 * k)
    return total
