"""GPU kernels (Triton) for local scoring and insertion. The plain torch versions, which they must agree with, are in
``refine/likelihood.py`` and ``backproject.py``; ``_kernels.py`` has the same for CPUs.

A grid of complex numbers is read as 64-bit integers, one load for a pair (re, im). Eight corners are 64 B a sample; the
image's coefficients and weights are read once for all the views of a program.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _pair(pointer, inside):
    """Real and imaginary part of complex64 values."""
    bits = tl.load(pointer, mask=inside, other=0)
    re = (bits & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
    im = (bits >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return re, im


@triton.jit
def _along_x(grid, at, fx, inside):
    """Values between two x neighbours."""
    re0, im0 = _pair(grid + at, inside)
    re1, im1 = _pair(grid + at + 1, inside)
    return re0 + fx * (re1 - re0), im0 + fx * (im1 - im0)


@triton.jit
def _position(rotation, view, kx, ky, scale):
    """Grid coordinates (x, y, z) of a view's frequencies ``kx``, ``ky`` in the half space, and the Friedel flag."""
    ax, ay, az = (tl.load(rotation + 9 * view), tl.load(rotation + 9 * view + 1), tl.load(rotation + 9 * view + 2))
    bx, by, bz = (tl.load(rotation + 9 * view + 3), tl.load(rotation + 9 * view + 4), tl.load(rotation + 9 * view + 5))
    x = (kx * ax + ky * bx) * scale
    y = (kx * ay + ky * by) * scale
    z = (kx * az + ky * bz) * scale
    flip = x < 0
    return tl.where(flip, -x, x), tl.where(flip, -y, y), tl.where(flip, -z, z), flip


@triton.jit
def score_local(
    grid, rotation, kx, ky, turns, particle, data, weight, shift, out,
    n_samples, h, scale, unit,
    VIEWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Log-likelihood of views with a 3 x 3 lattice of shifts each; a program does VIEWS views of one image.

    grid: (2h+1, 2h+1, h+1) complex64 as int64; rotation (R, 3, 3); kx, ky (K,); turns (4, K) cosine and sine of a
    step of the lattice along x, then along y; particle (R,) int64 row of data (B, K) complex64 as int64 and of weight
    (B, K); shift (R, 2) px; out (R, 9), y slow. Rows of a program share particle and shift. ``unit`` is 2 pi / D,
    ``scale`` the padding.
    """
    first = tl.program_id(0).to(tl.int64) * VIEWS
    image = tl.load(particle + first) * n_samples
    sx, sy = tl.load(shift + 2 * first) * unit, tl.load(shift + 2 * first + 1) * unit
    view = first + tl.arange(0, VIEWS)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    row, plane = h + 1, (2 * h + 1) * (h + 1)
    zero = tl.zeros((VIEWS, BLOCK), tl.float32)
    norm, middle, side, turn = zero, zero, zero, zero
    middle_up, side_up, turn_up = zero, zero, zero
    middle_down, side_down, turn_down = zero, zero, zero
    for start in range(0, n_samples, BLOCK):
        k = start + lane
        inside = k < n_samples
        u, v = tl.load(kx + k, mask=inside, other=0.0), tl.load(ky + k, mask=inside, other=0.0)
        x, y, z, flip = _position(rotation, view, u, v, scale)
        y += h
        z += h
        x0, y0, z0 = x.to(tl.int32), y.to(tl.int32), z.to(tl.int32)
        fx, fy, fz = x - x0, y - y0, z - z0
        at = z0 * plane + y0 * row + x0
        re0, im0 = _along_x(grid, at, fx, inside)
        re1, im1 = _along_x(grid, at + row, fx, inside)
        re2, im2 = _along_x(grid, at + plane, fx, inside)
        re3, im3 = _along_x(grid, at + plane + row, fx, inside)
        re0, im0 = re0 + fy * (re1 - re0), im0 + fy * (im1 - im0)
        re2, im2 = re2 + fy * (re3 - re2), im2 + fy * (im3 - im2)
        re, im = re0 + fz * (re2 - re0), im0 + fz * (im2 - im0)
        im = tl.where(flip, -im, im)
        dr, di = _pair(data + image + k, inside)
        w = tl.load(weight + image + k, mask=inside, other=0.0)
        norm += w * (re * re + im * im)
        # the image is moved to the middle of the lattice once for all views
        angle = sx * u + sy * v
        p, q = tl.cos(angle), tl.sin(angle)
        mr, mi = dr * p - di * q, dr * q + di * p
        tr, ti = re * mr + im * mi, re * mi - im * mr
        # Re t exp(i (a sx kx + b sy ky)) for a, b = -1, 0, 1, from the factors of x and y
        cx = tl.load(turns + k, mask=inside, other=0.0)
        gx = tl.load(turns + n_samples + k, mask=inside, other=0.0)
        cy = tl.load(turns + 2 * n_samples + k, mask=inside, other=0.0)
        gy = tl.load(turns + 3 * n_samples + k, mask=inside, other=0.0)
        middle += tr
        side += tr * cx
        turn += ti * gx
        ur, ui = tr * cy - ti * gy, tr * gy + ti * cy
        middle_up += ur
        side_up += ur * cx
        turn_up += ui * gx
        lr, li = tr * cy + ti * gy, ti * cy - tr * gy
        middle_down += lr
        side_down += lr * cx
        turn_down += li * gx
    half = 0.5 * tl.sum(norm, 1)
    to = out + 9 * (first + tl.arange(0, VIEWS))
    a, b, c = tl.sum(middle_down, 1) - half, tl.sum(side_down, 1) - half, tl.sum(turn_down, 1)
    tl.store(to, b + c)
    tl.store(to + 1, a)
    tl.store(to + 2, b - c)
    a, b, c = tl.sum(middle, 1) - half, tl.sum(side, 1) - half, tl.sum(turn, 1)
    tl.store(to + 3, b + c)
    tl.store(to + 4, a)
    tl.store(to + 5, b - c)
    a, b, c = tl.sum(middle_up, 1) - half, tl.sum(side_up, 1) - half, tl.sum(turn_up, 1)
    tl.store(to + 6, b + c)
    tl.store(to + 7, a)
    tl.store(to + 8, b - c)


@triton.jit
def _add(grid, at, share, re, im, weight, inside):
    tl.atomic_add(grid + 3 * at, (re * share).to(tl.int64), mask=inside, sem="relaxed")
    tl.atomic_add(grid + 3 * at + 1, (im * share).to(tl.int64), mask=inside, sem="relaxed")
    tl.atomic_add(grid + 3 * at + 2, (weight * share).to(tl.int64), mask=inside, sem="relaxed")


@triton.jit
def insert_slices(
    grid, rotation, kx, ky, data, weight, n_samples, h, scale, unit,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Trilinear insertion into a fixed-point grid (2h+1, 2h+1, h+1, 3) int64 of (re, im, weight) x ``unit``.

    rotation (J, 3, 3); kx, ky (K,); data (J, K) complex64 as int64; weight (J, K) float32. The launch has slices in
    its first dimension and blocks of samples in the second. Integers make the sum independent of their order.
    """
    view = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < n_samples
    u, v = tl.load(kx + k, mask=inside, other=0.0), tl.load(ky + k, mask=inside, other=0.0)
    x, y, z, flip = _position(rotation, view, u, v, scale)
    y += h
    z += h
    x0, y0, z0 = x.to(tl.int32), y.to(tl.int32), z.to(tl.int32)
    fx, fy, fz = x - x0, y - y0, z - z0
    re, im = _pair(data + view * n_samples + k, inside)
    im = tl.where(flip, -im, im) * unit
    re *= unit
    w = tl.load(weight + view * n_samples + k, mask=inside, other=0.0) * unit
    row, plane = h + 1, (2 * h + 1) * (h + 1)
    at = (z0 * plane + y0 * row + x0).to(tl.int64)
    for corner in tl.static_range(8):
        share = fx if corner % 2 else 1 - fx
        share *= fy if corner // 2 % 2 else 1 - fy
        share *= fz if corner // 4 else 1 - fz
        to = at + corner % 2 + (corner // 2 % 2) * row + (corner // 4) * plane
        _add(grid, to, share, re, im, w, inside)
