"""CPU kernels (numba) for slice extraction and insertion; ``project.py`` and ``backproject.py`` hold their torch twins.

The half-space grid has shape (2h+1, 2h+1, h+1) for (z, y, x) with the origin at (h, h, 0): x >= 0 only, the rest by Friedel.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

_OPTIONS = {"cache": True, "fastmath": {"contract", "nsz", "arcp", "reassoc"}, "error_model": "numpy"}


@njit(parallel=True, **_OPTIONS)
def extract_slices(grid, rotation, ky, kx, scale, out):
    """Trilinear central slices.

    grid (Z, Y, X) complex64; rotation (J, 3, 3) float32; ky, kx (K,) float32; scale: grid units per frequency unit;
    out (J, K) complex64.
    """
    h = (grid.shape[0] - 1) // 2
    for j in prange(rotation.shape[0]):
        ax, ay, az = rotation[j, 0, 0] * scale, rotation[j, 0, 1] * scale, rotation[j, 0, 2] * scale
        bx, by, bz = rotation[j, 1, 0] * scale, rotation[j, 1, 1] * scale, rotation[j, 1, 2] * scale
        for k in range(kx.shape[0]):
            x = kx[k] * ax + ky[k] * bx
            y = kx[k] * ay + ky[k] * by
            z = kx[k] * az + ky[k] * bz
            flip = x < 0
            if flip:
                x, y, z = -x, -y, -z
            y += h
            z += h
            x0, y0, z0 = int(x), int(y), int(z)
            fx, fy, fz = x - np.float32(x0), y - np.float32(y0), z - np.float32(z0)
            gx, gy, gz = np.float32(1) - fx, np.float32(1) - fy, np.float32(1) - fz
            v = (
                (grid[z0, y0, x0] * gx + grid[z0, y0, x0 + 1] * fx) * gy
                + (grid[z0, y0 + 1, x0] * gx + grid[z0, y0 + 1, x0 + 1] * fx) * fy
            ) * gz + (
                (grid[z0 + 1, y0, x0] * gx + grid[z0 + 1, y0, x0 + 1] * fx) * gy
                + (grid[z0 + 1, y0 + 1, x0] * gx + grid[z0 + 1, y0 + 1, x0 + 1] * fx) * fy
            ) * fz
            out[j, k] = np.conj(v) if flip else v


@njit(inline="always")
def _add(grid, z, y, x, w, re, im, weight):
    grid[z, y, x, 0] += np.int64(w * re)
    grid[z, y, x, 1] += np.int64(w * im)
    grid[z, y, x, 2] += np.int64(w * weight)


@njit(**_OPTIONS)
def _insert_slab(grid, rotation, ky, kx, scale, data, weight, unit, lowest, highest):
    """Adds every sample's share of the rows lowest <= z < highest."""
    h = (grid.shape[0] - 1) // 2
    for j in range(rotation.shape[0]):
        ax, ay, az = rotation[j, 0, 0] * scale, rotation[j, 0, 1] * scale, rotation[j, 0, 2] * scale
        bx, by, bz = rotation[j, 1, 0] * scale, rotation[j, 1, 1] * scale, rotation[j, 1, 2] * scale
        for k in range(kx.shape[0]):
            z = kx[k] * az + ky[k] * bz
            x = kx[k] * ax + ky[k] * bx
            flip = x < 0
            if flip:
                z = -z
            z += h
            z0 = int(z)
            if z0 + 1 < lowest or z0 >= highest:
                continue
            y = kx[k] * ay + ky[k] * by
            re, im, w = data[j, k].real * unit, data[j, k].imag * unit, weight[j, k] * unit
            if flip:
                x, y, im = -x, -y, -im
            y += h
            x0, y0 = int(x), int(y)
            fx, fy, fz = x - np.float32(x0), y - np.float32(y0), z - np.float32(z0)
            gx, gy, gz = np.float32(1) - fx, np.float32(1) - fy, np.float32(1) - fz
            if z0 >= lowest:
                _add(grid, z0, y0, x0, gz * gy * gx, re, im, w)
                _add(grid, z0, y0, x0 + 1, gz * gy * fx, re, im, w)
                _add(grid, z0, y0 + 1, x0, gz * fy * gx, re, im, w)
                _add(grid, z0, y0 + 1, x0 + 1, gz * fy * fx, re, im, w)
            if z0 + 1 < highest:
                _add(grid, z0 + 1, y0, x0, fz * gy * gx, re, im, w)
                _add(grid, z0 + 1, y0, x0 + 1, fz * gy * fx, re, im, w)
                _add(grid, z0 + 1, y0 + 1, x0, fz * fy * gx, re, im, w)
                _add(grid, z0 + 1, y0 + 1, x0 + 1, fz * fy * fx, re, im, w)


@njit(parallel=True, cache=True)
def insert_slices(grid, rotation, ky, kx, scale, data, weight, unit, n_threads):
    """Trilinear insertion into a fixed-point grid (Z, Y, X, 3) int64 holding (re, im, weight) in multiples of 1/unit.

    Threads own slabs of z, so no two write to one voxel; integers make the sum independent of threads and order.
    """
    for t in prange(n_threads):
        lowest = grid.shape[0] * t // n_threads
        highest = grid.shape[0] * (t + 1) // n_threads
        _insert_slab(grid, rotation, ky, kx, scale, data, weight, unit, lowest, highest)


@njit(parallel=True, **_OPTIONS)
def score_local(grid, rotation, ky, kx, scale, particle, data, weight, shift, spacing, out):
    """Log-likelihood (up to a constant of the particle) of R views with a 3 x 3 lattice of shifts each.

    Re sum_k conj(P_k) y_k exp(2 pi i k.s) - sum_k w_k |P_k|^2 / 2, the shift factor taken apart into x and y so that nine
    shifts cost little more than one.

    rotation (R, 3, 3); particle (R,) row of data (B, K) complex64 = x c / sigma^2 and weight (B, K) = c^2 / sigma^2;
    shift (R, 2) centre of the lattice (x, y) in radians per frequency unit (2 pi s / D), spacing likewise; out (R, 9),
    y slow, x fast.
    """
    h = (grid.shape[0] - 1) // 2
    reach = int(np.max(np.abs(kx))) + 1
    for r in prange(rotation.shape[0]):
        ax, ay, az = rotation[r, 0, 0] * scale, rotation[r, 0, 1] * scale, rotation[r, 0, 2] * scale
        bx, by, bz = rotation[r, 1, 0] * scale, rotation[r, 1, 1] * scale, rotation[r, 1, 2] * scale
        i = particle[r]
        columns = np.zeros((3, 2 * reach + 1), np.complex64)
        phase_x = np.empty((3, reach + 1), np.complex64)
        for s in range(3):
            for c in range(reach + 1):
                a = (shift[r, 0] + np.float32(s - 1) * spacing) * np.float32(c)
                phase_x[s, c] = np.complex64(np.cos(a) + 1j * np.sin(a))
        norm = np.float32(0)
        for k in range(kx.shape[0]):
            x = kx[k] * ax + ky[k] * bx
            y = kx[k] * ay + ky[k] * by
            z = kx[k] * az + ky[k] * bz
            flip = x < 0
            if flip:
                x, y, z = -x, -y, -z
            y += h
            z += h
            x0, y0, z0 = int(x), int(y), int(z)
            fx, fy, fz = x - np.float32(x0), y - np.float32(y0), z - np.float32(z0)
            gx, gy, gz = np.float32(1) - fx, np.float32(1) - fy, np.float32(1) - fz
            v = (
                (grid[z0, y0, x0] * gx + grid[z0, y0, x0 + 1] * fx) * gy
                + (grid[z0, y0 + 1, x0] * gx + grid[z0, y0 + 1, x0 + 1] * fx) * fy
            ) * gz + (
                (grid[z0 + 1, y0, x0] * gx + grid[z0 + 1, y0, x0 + 1] * fx) * gy
                + (grid[z0 + 1, y0 + 1, x0] * gx + grid[z0 + 1, y0 + 1, x0 + 1] * fx) * fy
            ) * fz
            if not flip:
                v = np.conj(v)
            t = v * data[i, k]
            norm += weight[i, k] * (v.real * v.real + v.imag * v.imag)
            c, row = int(kx[k]), int(ky[k]) + reach
            columns[0, row] += t * phase_x[0, c]
            columns[1, row] += t * phase_x[1, c]
            columns[2, row] += t * phase_x[2, c]
        for sy in range(3):
            total = np.zeros(3, np.float32)
            for row in range(2 * reach + 1):
                a = (shift[r, 1] + np.float32(sy - 1) * spacing) * np.float32(row - reach)
                p = np.complex64(np.cos(a) + 1j * np.sin(a))
                for sx in range(3):
                    total[sx] += (columns[sx, row] * p).real
            for sx in range(3):
                out[r, 3 * sy + sx] = total[sx] - np.float32(0.5) * norm
