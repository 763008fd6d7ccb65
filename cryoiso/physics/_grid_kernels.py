"""CPU kernels (numba) that pass once over a back-projection grid; the plain torch versions are in ``backproject.py``.

The torch versions allocate a dozen temporaries of the grid's size each; these kernels allocate only the result. Grids
are flat views in the layout of ``_kernels.py``.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from cryoiso.physics._kernels import EXACT


@njit(parallel=True, **EXACT)
def to_float(grid, axis, rows, first_z, last_z, unit, numerator, weight):
    """Fixed-point sums (re, im, weight) times 1/unit into numerator (float32 pairs) and weight (float32), for the
    planes first_z..last_z.

    The plane x = 0 has one of each Friedel pair, depending on the slice; here each gets the sum of both. axis: that
    plane (rows, rows, 3), flat.
    """
    columns = (rows + 1) // 2
    for z in prange(first_z, last_z):
        for y in range(rows):
            first = (z * rows + y) * columns
            mate = (rows - 1 - z) * rows + rows - 1 - y
            for x in range(columns):
                i = first + x
                re, im, w = grid[3 * i], grid[3 * i + 1], grid[3 * i + 2]
                if x == 0:
                    re, im, w = re + axis[3 * mate], im - axis[3 * mate + 1], w + axis[3 * mate + 2]
                numerator[2 * i] = re / unit
                numerator[2 * i + 1] = im / unit
                weight[i] = w / unit


@njit(inline="always")
def _shell(z, y, x, padding):
    """Nearest shell of a voxel, in units of the unpadded grid."""
    return np.int64(np.rint(np.sqrt(np.float32(z * z + y * y + x * x)) / np.float32(padding)))


@njit(**EXACT)
def sum_shells(weight, rows, padding, total, count):
    """Add up weight and voxels of each shell, those beyond in the last one; in memory order, so the bits are
    reproducible."""
    h = (rows - 1) // 2
    last = total.shape[0] - 1
    i = 0
    for z in range(-h, h + 1):
        for y in range(-h, h + 1):
            for x in range(h + 1):
                shell = min(_shell(z, y, x, padding), last)
                total[shell] += weight[i]
                count[shell] += 1
                i += 1


@njit(**EXACT)
def sum_filtered(weight, rows, padding, term, floor, signal, noise):
    """Add up (w f)^2 and w f^2 of each shell, f = 1 / max(w + term, floor): the signal and noise that a division
    passes.

    signal, noise (shells,) float64, one number per shell, as for term and floor; in memory order, so the bits are
    reproducible.
    """
    h = (rows - 1) // 2
    radius = floor.shape[0] - 1
    i = 0
    for z in range(-h, h + 1):
        for y in range(-h, h + 1):
            for x in range(h + 1):
                w = weight[i]
                i += 1
                shell = _shell(z, y, x, padding)
                if shell <= radius and w > 0:
                    f = np.float64(1) / max(w + term[shell], floor[shell])
                    signal[shell] += (w * f) * (w * f)
                    noise[shell] += (w * f) * f


@njit(parallel=True, **EXACT)
def divide(numerator, weight, rows, padding, term, floor, factor, size, first_x, last_x, out):
    """numerator / max(weight + term, floor) * factor; zero where nothing was measured or beyond the shells of floor.

    term, floor: one number per shell. out: flat float32 pairs of the columns first_x..last_x of a (size, size,
    size//2+1) transform with its origin at index 0, initially zero.
    """
    h = (rows - 1) // 2
    reach = min(h, (size - 1) // 2)
    columns, out_columns = h + 1, last_x - first_x
    radius = floor.shape[0] - 1
    for plane in prange(2 * reach + 1):
        z = plane - reach
        for y in range(-reach, reach + 1):
            first = ((z + h) * rows + y + h) * columns
            to = ((z % size) * size + y % size) * out_columns
            for x in range(first_x, min(last_x, reach + 1)):
                shell = _shell(z, y, x, padding)
                w = weight[first + x]
                if shell <= radius and w > 0:
                    scale = factor / max(w + term[shell], floor[shell])
                    at = 2 * (to + x - first_x)
                    out[at] = numerator[2 * (first + x)] * scale
                    out[at + 1] = numerator[2 * (first + x) + 1] * scale


@njit(parallel=True, **EXACT)
def add_rotated(numerator, weight, rows, operations, out, out_weight):
    """Add sum_S old(S k) to every voxel k of the sphere that fits into the grid, by trilinear interpolation; nothing
    from beyond the grid. Slices and their rotated copies leave the corners of the cube empty.

    operations (g, 3, 3) float32; numerator, out: float32 pairs.
    """
    h = (rows - 1) // 2
    columns = h + 1
    limit = np.float32(h - 1)
    for plane in prange(rows):
        z = np.float32(plane - h)
        for line in range(rows):
            y = np.float32(line - h)
            for x in range(columns):
                if np.float32(x) * np.float32(x) + y * y + z * z > np.float32((h + 2) * (h + 2)):
                    continue
                at = (plane * rows + line) * columns + x
                for g in range(operations.shape[0]):
                    s = operations[g]
                    a = s[0, 0] * x + s[0, 1] * y + s[0, 2] * z
                    b = s[1, 0] * x + s[1, 1] * y + s[1, 2] * z
                    c = s[2, 0] * x + s[2, 1] * y + s[2, 2] * z
                    sign = np.float32(1)
                    if a < 0:
                        a, b, c, sign = -a, -b, -c, -sign
                    if a < limit and abs(b) < limit and abs(c) < limit:
                        re, im, w = _interpolate(numerator, weight, rows, columns, a, b + h, c + h)
                        out[2 * at] += re
                        out[2 * at + 1] += sign * im
                        out_weight[at] += w


@njit(inline="always")
def _interpolate(numerator, weight, rows, columns, x, y, z):
    x0, y0, z0 = int(x), int(y), int(z)
    fx, fy, fz = np.float32(x - x0), np.float32(y - y0), np.float32(z - z0)
    re, im, w = np.float32(0), np.float32(0), np.float32(0)
    for dz in range(2):
        gz = fz if dz else np.float32(1) - fz
        for dy in range(2):
            g = gz * (fy if dy else np.float32(1) - fy)
            i = ((z0 + dz) * rows + y0 + dy) * columns + x0
            p, q = g * (np.float32(1) - fx), g * fx
            re += p * numerator[2 * i] + q * numerator[2 * i + 2]
            im += p * numerator[2 * i + 1] + q * numerator[2 * i + 3]
            w += p * weight[i] + q * weight[i + 1]
    return re, im, w
