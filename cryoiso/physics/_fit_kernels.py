"""CPU kernel (numba) that samples a transform at rotated points; the plain torch version is in ``fit_search.py``."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from cryoiso.physics._kernels import EXACT, _sample

_U = np.uintp


@njit(parallel=True, **EXACT)
def extract_points(grid, rows, rotation, points, scale, out):
    """Trilinear values at R^T k.

    grid: flat float32 view of (rows, rows, (rows+1)/2) complex64, all points inside it; rotation (J, 3, 3) float32;
    points (K, 3) float32 (kx, ky, kz); scale: grid units per unit of k; out (J, 2K) float32, pairs.
    """
    row = _U(rows + 1)
    plane = row * _U(rows)
    h = np.float32((rows - 1) // 2)
    for j in prange(rotation.shape[0]):
        turn = rotation[j] * scale
        for i in range(points.shape[0]):
            u, v, w = points[i, 0], points[i, 1], points[i, 2]
            x = u * turn[0, 0] + v * turn[1, 0] + w * turn[2, 0]
            y = u * turn[0, 1] + v * turn[1, 1] + w * turn[2, 1]
            z = u * turn[0, 2] + v * turn[1, 2] + w * turn[2, 2]
            re, im = _sample(grid, row, plane, h, x, y, z)
            out[j, 2 * i] = re
            out[j, 2 * i + 1] = im


@njit(parallel=True, **EXACT)
def normal_equations(grid, rows, rotation, cycles, points, scale, target, weight, conjugate, turn, sums, normal, slope):
    """Terms of a least-squares step: target - factor * moving, linear in small rotations and shifts.

    With y = M(R^T k) exp(-2 pi i k.c), its derivatives y_a by the six parameters (rotations about x, y, z by finite
    differences, then shifts in units of the box) and sums over k with ``weight``.

    grid, rows, points, scale: as above; rotation (n, 7, 3, 3) float32: R, then R rotated by +turn about x, y, z and by
    -turn; cycles (n, 3): shift as a fraction of the box; target (K,) complex64; weight (K,) float32; conjugate: take
    conj(M). Into sums (n, 2): Re <t, y> and |y|^2; normal (n, 6, 6): Re <y_a, y_b>; slope (n, 2, 6): Re <y_a, t> and Re
    <y_a, y>. All float64.
    """
    row = _U(rows + 1)
    plane = row * _U(rows)
    h = np.float32((rows - 1) // 2)
    for j in prange(rotation.shape[0]):
        move = rotation[j] * scale
        y_a = np.zeros(6, np.complex64)
        value = np.zeros(7, np.complex64)
        for i in range(points.shape[0]):
            u, v, w = points[i, 0], points[i, 1], points[i, 2]
            angle = np.float32(-2 * np.pi) * np.float32((u * cycles[j, 0] + v * cycles[j, 1] + w * cycles[j, 2]) % 1.0)
            phase = np.complex64(complex(np.cos(angle), np.sin(angle)))
            for a in range(7):
                x = u * move[a, 0, 0] + v * move[a, 1, 0] + w * move[a, 2, 0]
                y = u * move[a, 0, 1] + v * move[a, 1, 1] + w * move[a, 2, 1]
                z = u * move[a, 0, 2] + v * move[a, 1, 2] + w * move[a, 2, 2]
                re, im = _sample(grid, row, plane, h, x, y, z)
                value[a] = complex(re, -im if conjugate else im) * phase
            here, t, share = value[0], target[i], weight[i]
            for a in range(3):
                y_a[a] = (value[1 + a] - value[4 + a]) / (np.float32(2) * turn)
                y_a[3 + a] = complex(here.imag, -here.real) * (np.float32(2 * np.pi) * points[i, a])
            sums[j, 0] += share * (t.real * here.real + t.imag * here.imag)
            sums[j, 1] += share * (here.real * here.real + here.imag * here.imag)
            for a in range(6):
                p, q = share * y_a[a].real, share * y_a[a].imag
                slope[j, 0, a] += p * t.real + q * t.imag
                slope[j, 1, a] += p * here.real + q * here.imag
                for b in range(a + 1):
                    normal[j, a, b] += p * y_a[b].real + q * y_a[b].imag
        for a in range(6):
            for b in range(a):
                normal[j, b, a] = normal[j, a, b]
