"""CPU kernels (numba) for slices: extraction, insertion, local scoring. ``project.py``, ``backproject.py`` and
``refine/likelihood.py`` hold their plain torch twins.

The half-space grid has shape (2h+1, 2h+1, h+1) for (z, y, x) with the origin at (h, h, 0): x >= 0 only, the rest by
Friedel. Here it is a flat array of float32 pairs (re, im). Indices are unsigned, which spares numba's test for
negative ones; the four floats of two x neighbours lie together, which lets the compiler load them as one vector.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

_FAST: Any = {"cache": True, "fastmath": True, "error_model": "numpy"}
_U = np.uintp
_ONE, _TWO, _THREE = np.uintp(1), np.uintp(2), np.uintp(3)


@njit(inline="always")
def _sample(grid, row, plane, h, x, y, z):
    """Trilinear value (re, im) at (x, y, z); ``row`` and ``plane`` are strides in floats."""
    flip = x < np.float32(0)
    if flip:
        x, y, z = -x, -y, -z
    y += h
    z += h
    x0, y0, z0 = np.int32(x), np.int32(y), np.int32(z)
    fx, fy, fz = x - np.float32(x0), y - np.float32(y0), z - np.float32(z0)
    gy, gz = np.float32(1) - fy, np.float32(1) - fz
    i = _U(z0) * plane + _U(y0) * row + _TWO * _U(x0)
    j = i + row
    k = i + plane
    m = k + row
    a, b, c, d = gz * gy, gz * fy, fz * gy, fz * fy
    v0 = a * grid[i] + b * grid[j] + c * grid[k] + d * grid[m]
    v1 = a * grid[i + _ONE] + b * grid[j + _ONE] + c * grid[k + _ONE] + d * grid[m + _ONE]
    v2 = a * grid[i + _TWO] + b * grid[j + _TWO] + c * grid[k + _TWO] + d * grid[m + _TWO]
    v3 = a * grid[i + _THREE] + b * grid[j + _THREE] + c * grid[k + _THREE] + d * grid[m + _THREE]
    re = v0 + fx * (v2 - v0)
    im = v1 + fx * (v3 - v1)
    if flip:
        im = -im
    return re, im


@njit(parallel=True, **_FAST)
def extract_slices(grid, rows, rotation, ky, kx, scale, out):
    """Trilinear central slices.

    grid: flat float32 view of (rows, rows, (rows+1)/2) complex64; rotation (J, 3, 3) float32; ky, kx (K,) float32;
    scale: grid units per frequency unit; out (J, 2K) float32, pairs.
    """
    row = _U(rows + 1)
    plane = row * _U(rows)
    h = np.float32((rows - 1) // 2)
    for j in prange(rotation.shape[0]):
        ax, ay, az = rotation[j, 0, 0] * scale, rotation[j, 0, 1] * scale, rotation[j, 0, 2] * scale
        bx, by, bz = rotation[j, 1, 0] * scale, rotation[j, 1, 1] * scale, rotation[j, 1, 2] * scale
        for k in range(kx.shape[0]):
            u, v = kx[k], ky[k]
            re, im = _sample(grid, row, plane, h, u * ax + v * bx, u * ay + v * by, u * az + v * bz)
            out[j, _TWO * _U(k)] = re
            out[j, _TWO * _U(k) + _ONE] = im


@njit(inline="always")
def _add(grid, at, w, re, im, weight):
    grid[at] += np.int64(w * re)
    grid[at + _ONE] += np.int64(w * im)
    grid[at + _TWO] += np.int64(w * weight)


@njit(inline="always")
def _add_pair(grid, at, w, fx, re, im, weight):
    """The two x neighbours of one row."""
    _add(grid, at, w * (np.float32(1) - fx), re, im, weight)
    _add(grid, at + _THREE, w * fx, re, im, weight)


@njit(**_FAST)
def _insert_slab(grid, rows, rotation, ky, kx, scale, data, weight, unit, lowest, highest):
    """Adds every sample's share of the planes lowest <= z < highest."""
    row = _THREE * _U((rows + 1) // 2)
    plane = row * _U(rows)
    h = np.float32((rows - 1) // 2)
    for j in range(rotation.shape[0]):
        ax, ay, az = rotation[j, 0, 0] * scale, rotation[j, 0, 1] * scale, rotation[j, 0, 2] * scale
        bx, by, bz = rotation[j, 1, 0] * scale, rotation[j, 1, 1] * scale, rotation[j, 1, 2] * scale
        for k in range(kx.shape[0]):
            u, v = kx[k], ky[k]
            x, y, z = u * ax + v * bx, u * ay + v * by, u * az + v * bz
            re, im = data[j, _TWO * _U(k)] * unit, data[j, _TWO * _U(k) + _ONE] * unit
            w = weight[j, k] * unit
            if x < np.float32(0):
                x, y, z, im = -x, -y, -z, -im
            y += h
            z += h
            x0, y0, z0 = np.int32(x), np.int32(y), np.int32(z)
            if z0 + 1 < lowest or z0 >= highest:
                continue
            fx, fy, fz = x - np.float32(x0), y - np.float32(y0), z - np.float32(z0)
            gy, gz = np.float32(1) - fy, np.float32(1) - fz
            i = _U(z0) * plane + _U(y0) * row + _THREE * _U(x0)
            if z0 >= lowest:
                _add_pair(grid, i, gz * gy, fx, re, im, w)
                _add_pair(grid, i + row, gz * fy, fx, re, im, w)
            if z0 + 1 < highest:
                _add_pair(grid, i + plane, fz * gy, fx, re, im, w)
                _add_pair(grid, i + plane + row, fz * fy, fx, re, im, w)


@njit(parallel=True, cache=True)
def insert_slices(grid, rows, rotation, ky, kx, scale, data, weight, unit, n_threads):
    """Trilinear insertion into a fixed-point grid: flat int64 view of (rows, rows, (rows+1)/2, 3) holding (re, im,
    weight) in multiples of 1/unit. data (J, 2K) float32 pairs, weight (J, K) float32.

    Threads own slabs of z, so no two write to one voxel; integers make the sum independent of threads and order.
    """
    for t in prange(n_threads):
        _insert_slab(
            grid, rows, rotation, ky, kx, scale, data, weight, unit, rows * t // n_threads, rows * (t + 1) // n_threads
        )


@njit(inline="always")
def _lattice_sums(column, angle, spacing, norm, out, r):
    """Finishes the 3 x 3 shifts: column (rows, 6) holds, for three x shifts, the sums over kx of each ky (re, im)."""
    reach = (column.shape[0] - 1) // 2
    for s in range(3):
        t0, t1, t2 = np.float32(0), np.float32(0), np.float32(0)
        for c in range(column.shape[0]):
            a = (angle + np.float32(s - 1) * spacing) * np.float32(c - reach)
            p, q = np.cos(a), np.sin(a)
            t0 += column[c, 0] * p - column[c, 3] * q
            t1 += column[c, 1] * p - column[c, 4] * q
            t2 += column[c, 2] * p - column[c, 5] * q
        out[r, 3 * s] = t0 - np.float32(0.5) * norm
        out[r, 3 * s + 1] = t1 - np.float32(0.5) * norm
        out[r, 3 * s + 2] = t2 - np.float32(0.5) * norm


@njit(parallel=True, **_FAST)
def score_local(grid, rows, rotation, ky, kx, scale, particle, data, weight, shift, spacing, out):
    """Log-likelihood (up to a constant of the particle) of R views with a 3 x 3 lattice of shifts each.

    Re sum_k conj(P_k) y_k exp(i k.s) - sum_k w_k |P_k|^2 / 2; the shift factor is taken apart into x and y, so that
    nine shifts cost little more than one.

    rotation (R, 3, 3); particle (R,) row of data (B, 2K) float32 pairs (2 x c / sigma^2) and weight (B, K) (2 c^2 /
    sigma^2); shift (R, 2) centre of the lattice (x, y) in radians per frequency unit (2 pi s / D), spacing likewise;
    out (R, 9), y slow.
    """
    stride = _U(rows + 1)
    plane = stride * _U(rows)
    h = np.float32((rows - 1) // 2)
    reach = int(np.max(np.abs(ky))) + 1
    reach_x = int(np.max(kx)) + 1
    for r in prange(rotation.shape[0]):
        ax, ay, az = rotation[r, 0, 0] * scale, rotation[r, 0, 1] * scale, rotation[r, 0, 2] * scale
        bx, by, bz = rotation[r, 1, 0] * scale, rotation[r, 1, 1] * scale, rotation[r, 1, 2] * scale
        i = particle[r]
        column = np.zeros((2 * reach + 1, 6), np.float32)
        phase = np.empty((reach_x, 6), np.float32)
        for c in range(reach_x):
            for s in range(3):
                a = (shift[r, 0] + np.float32(s - 1) * spacing) * np.float32(c)
                phase[c, s], phase[c, 3 + s] = np.cos(a), np.sin(a)
        norm = np.float32(0)
        for k in range(kx.shape[0]):
            u, v = kx[k], ky[k]
            re, im = _sample(grid, stride, plane, h, u * ax + v * bx, u * ay + v * by, u * az + v * bz)
            norm += weight[i, k] * (re * re + im * im)
            dr, di = data[i, _TWO * _U(k)], data[i, _TWO * _U(k) + _ONE]
            tr, ti = re * dr + im * di, re * di - im * dr
            at, line = _U(np.int32(u)), _U(np.int32(v) + reach)
            for s in range(3):
                p, q = phase[at, _U(s)], phase[at, _U(3 + s)]
                column[line, _U(s)] += tr * p - ti * q
                column[line, _U(3 + s)] += tr * q + ti * p
        _lattice_sums(column, shift[r, 1], spacing, norm, out, r)
