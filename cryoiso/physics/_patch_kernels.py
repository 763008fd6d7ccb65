"""CPU kernels (numba) that compare images with slices of a reference: scores of many views, and the model's terms at
the views of a posterior. The plain torch versions are ``local_scores_torch`` of ``refine/likelihood.py`` and
``model_terms_torch`` of ``refine/maximise.py``.

Coefficients are taken in patches of 8 x 8 neighbours, and a patch is finished for all views of a particle before the
next one begins: the voxels that neighbouring views share are then in the cache, and so is the image. Within a patch
each step is a loop over consecutive numbers, which the compiler turns into vector instructions. Sums run over ``LANES``
fixed lanes, so that the bits do not depend on the length of the machine's vectors.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from cryoiso.physics._kernels import EXACT, _powers, blend_rows

_U = np.uintp
_ONE, _TWO = np.uintp(1), np.uintp(2)
PATCH, LANES, SUMS = 64, 16, 10
"""Coefficients per patch; numbers of a sum that are added side by side; sums per view."""

# Places in the working space of a patch, PATCH numbers each: fractions and Friedel sign in the grid, the reference, the
# image, the image shifted to the centre, its weight or CTF, frequencies, a lattice step's cosine and sine, two sums.
# The sign, re and im are adjacent.
_FX, _FY, _FZ, _SIGN, _RE, _IM = (np.uintp(i * PATCH) for i in range(6))
_DATA_RE, _DATA_IM, _MOVED_RE, _MOVED_IM, _WEIGHT, _KX, _KY = (np.uintp(i * PATCH) for i in range(6, 13))
_COS_X, _SIN_X, _COS_Y, _SIN_Y, _CROSS, _NORM = (np.uintp(i * PATCH) for i in range(13, 19))
_PLACES = 19


@njit(**EXACT)
def _locate(f, corner, turn, h):
    """Lower corner (x, y, z) of each coefficient's cell in the grid, the fractions, and -1 for Friedel mates."""
    ax, ay, az, bx, by, bz = turn[0, 0], turn[0, 1], turn[0, 2], turn[1, 0], turn[1, 1], turn[1, 2]
    for i in range(PATCH):
        k = _U(i)
        u, v = f[_KX + k], f[_KY + k]
        x, y, z = u * ax + v * bx, u * ay + v * by, u * az + v * bz
        sign = np.float32(-1) if x < np.float32(0) else np.float32(1)
        x, y, z = sign * x, sign * y + h, sign * z + h
        x0, y0, z0 = np.int32(x), np.int32(y), np.int32(z)
        corner[k], corner[_U(PATCH) + k], corner[_U(2 * PATCH) + k] = x0, y0, z0
        f[_FX + k], f[_FY + k], f[_FZ + k] = x - np.float32(x0), y - np.float32(y0), z - np.float32(z0)
        f[_SIGN + k] = sign


@njit(**EXACT)
def _interpolate(grid, row, plane, f, corner):
    """Trilinear values, without the sign of Friedel mates."""
    for i in range(PATCH):
        k = _U(i)
        at = _U(corner[_U(2 * PATCH) + k]) * plane + _U(corner[_U(PATCH) + k]) * row + _TWO * _U(corner[k])
        re, im = blend_rows(grid, at, row, plane, f[_FX + k], f[_FY + k], f[_FZ + k])
        f[_RE + k] = re
        f[_IM + k] = im


@njit(**EXACT)
def _load(f, data, weight, member, frequency):
    """An image's coefficients of a patch; zero where the last patch is not full."""
    for i in range(PATCH):
        k, j = _U(i), member[i]
        f[_KX + k], f[_KY + k] = frequency[0, i], frequency[1, i]
        if j >= 0:
            f[_DATA_RE + k], f[_DATA_IM + k], f[_WEIGHT + k] = data[_TWO * _U(j)], data[_TWO * _U(j) + _ONE], weight[j]
        else:
            f[_DATA_RE + k], f[_DATA_IM + k], f[_WEIGHT + k] = 0, 0, 0


@njit(**EXACT)
def _move(f, of_x, of_y, reach):
    """Multiply the image by a shift's factors of x and y, which begin at -reach."""
    for i in range(PATCH):
        k = _U(i)
        c, line = _U(np.int32(f[_KX + k]) + reach[0]), _U(np.int32(f[_KY + k]) + reach[1])
        p = of_x[c, _U(0)] * of_y[line, _U(0)] - of_x[c, _ONE] * of_y[line, _ONE]
        q = of_x[c, _ONE] * of_y[line, _U(0)] + of_x[c, _U(0)] * of_y[line, _ONE]
        re, im = f[_DATA_RE + k], f[_DATA_IM + k]
        f[_MOVED_RE + k], f[_MOVED_IM + k] = re * p - im * q, re * q + im * p


@njit(**EXACT)
def _same_shift(shift, r, first):
    """Whether a view has the shift of the view before, and is not the first of its task."""
    return r > first and shift[r, 0] == shift[r - 1, 0] and shift[r, 1] == shift[r - 1, 1]


@njit(**EXACT)
def _add_scores(f, total, first):
    """Add a patch to the sums of a view, which begin at ``first`` of ``total``: with t = conj(P) y, Re t; Re t cos x,
    Im t sin x; Re t cos y, Im t sin y; Re t cos x cos y, Re t sin x sin y, Im t sin x cos y, Im t cos x sin y; w |P|^2.
    """
    for part in range(PATCH // LANES):
        for lane in range(LANES):
            k, s = _U(part * LANES + lane), first + _U(lane)
            re, im = f[_RE + k], f[_IM + k] * f[_SIGN + k]
            dr, di = f[_MOVED_RE + k], f[_MOVED_IM + k]
            tr, ti = re * dr + im * di, re * di - im * dr
            cx, sx, cy, sy = f[_COS_X + k], f[_SIN_X + k], f[_COS_Y + k], f[_SIN_Y + k]
            total[s] += tr
            total[s + _U(LANES)] += tr * cx
            total[s + _U(2 * LANES)] += ti * sx
            total[s + _U(3 * LANES)] += tr * cy
            total[s + _U(4 * LANES)] += ti * sy
            total[s + _U(5 * LANES)] += tr * (cx * cy)
            total[s + _U(6 * LANES)] += tr * (sx * sy)
            total[s + _U(7 * LANES)] += ti * (sx * cy)
            total[s + _U(8 * LANES)] += ti * (cx * sy)
            total[s + _U(9 * LANES)] += f[_WEIGHT + k] * (re * re + im * im)


@njit(**EXACT)
def _nine_scores(total, first, out):
    """The scores of a view at the nine shifts, y slow, from its sums."""
    sums = np.zeros(SUMS)
    for s in range(SUMS):
        for lane in range(LANES):
            sums[s] += np.float64(total[first + _U(s * LANES + lane)])
    for b in range(-1, 2):
        for a in range(-1, 2):
            if a != 0 and b != 0:
                value = sums[5] - a * b * sums[6] - a * sums[7] - b * sums[8]
            elif a != 0:
                value = sums[1] - a * sums[2]
            elif b != 0:
                value = sums[3] - b * sums[4]
            else:
                value = sums[0]
            out[3 * (b + 1) + a + 1] = value - 0.5 * sums[9]


@njit(parallel=True, **EXACT)
def score_local(grid, rows, rotation, member, frequency, wave, scale, task, particle, data, weight, shift, reach, out):
    """Log-likelihood (up to a constant of the particle) of R views with a 3 x 3 lattice of shifts each.

    Re sum_k conj(P_k) y_k exp(i k.s) - sum_k w_k |P_k|^2 / 2. The lattice costs ten sums, which the products of sines
    and cosines of its steps along x and y make of one slice.

    grid: flat float32 view of (rows, rows, (rows+1)/2) complex64; rotation (R, 3, 3) float32; member (patches, PATCH)
    and frequency (patches, 2, PATCH): ``Disc.patches``; wave (patches, 4 PATCH) float32: cosine and sine of a lattice
    step along x, along y; scale: grid units per frequency unit; task (T+1,): first view of each group of views of one
    particle; particle (R,) row of data (B, 2K), float32 pairs (2 x c / sigma^2), and of weight (B, K) (2 c^2 /
    sigma^2); shift (R, 2) float64 centre of the lattice (x, y) in radians per frequency unit (2 pi s / D); reach (x, y)
    of the frequencies; out (R, 9), y slow.
    """
    row = _U(rows + 1)
    plane = row * _U(rows)
    h = np.float32((rows - 1) // 2)
    width = SUMS * LANES
    for t in prange(len(task) - 1):
        first, last = task[t], task[t + 1]
        i = particle[first]
        f, corner = np.empty(_PLACES * PATCH, np.float32), np.empty(3 * PATCH, np.int32)
        total = np.zeros((last - first) * width, np.float32)
        turn = rotation[first:last, :2] * scale
        of_x, of_y = _factors(shift, first, last, reach)
        for patch in range(member.shape[0]):
            _load(f, data[i], weight[i], member[patch], frequency[patch])
            for k in range(4 * PATCH):
                f[_COS_X + _U(k)] = wave[patch, k]
            for r in range(first, last):
                if not _same_shift(shift, r, first):
                    _move(f, of_x[r - first], of_y[r - first], reach)
                _locate(f, corner, turn[r - first], h)
                _interpolate(grid, row, plane, f, corner)
                _add_scores(f, total, _U((r - first) * width))
        for r in range(first, last):
            _nine_scores(total, _U((r - first) * width), out[r])


@njit(parallel=True, **EXACT)
def score_lattices(grid, rows, rotation, member, frequency, wave, scale, data, weight, centre, reach, at_once, out):
    """The same for J views of each of B images, at 3 x 3 lattices around several centres, from one slice per view.

    rotation (B, J, 3, 3); data (B, 2K), weight (B, K); centre (lattices, 2) float64, as shift above; at_once: views
    that are scored together; out (B, J, lattices, 9).
    """
    row = _U(rows + 1)
    plane = row * _U(rows)
    h = np.float32((rows - 1) // 2)
    width, lattices = SUMS * LANES, len(centre)
    for i in prange(rotation.shape[0]):
        f, corner = np.empty(_PLACES * PATCH, np.float32), np.empty(3 * PATCH, np.int32)
        slices = np.empty((at_once, 3 * PATCH), np.float32)
        of_x, of_y = _factors(centre, 0, lattices, reach)
        for first in range(0, rotation.shape[1], at_once):
            last = min(first + at_once, rotation.shape[1])
            turn = rotation[i, first:last, :2] * scale
            total = np.zeros((last - first) * lattices * width, np.float32)
            for patch in range(member.shape[0]):
                _load(f, data[i], weight[i], member[patch], frequency[patch])
                for k in range(4 * PATCH):
                    f[_COS_X + _U(k)] = wave[patch, k]
                for r in range(last - first):
                    _locate(f, corner, turn[r], h)
                    _interpolate(grid, row, plane, f, corner)
                    for k in range(3 * PATCH):
                        slices[r, k] = f[_SIGN + _U(k)]
                for c in range(lattices):
                    _move(f, of_x[c], of_y[c], reach)
                    for r in range(last - first):
                        for k in range(3 * PATCH):
                            f[_SIGN + _U(k)] = slices[r, k]
                        _add_scores(f, total, _U((r * lattices + c) * width))
            for r in range(last - first):
                for c in range(lattices):
                    _nine_scores(total, _U((r * lattices + c) * width), out[i, first + r, c])


@njit(**EXACT)
def _factors(shift, first, last, reach):
    """exp(i c s) for c = -reach..reach along x and y of each of the views first..last that does not share the shift of
    the one before."""
    of_x = np.empty((last - first, 2 * reach[0] + 1, 2), np.float32)
    of_y = np.empty((last - first, 2 * reach[1] + 1, 2), np.float32)
    for r in range(first, last):
        if not _same_shift(shift, r, first):
            _powers(shift[r, 0], reach[0], of_x[r - first])
            _powers(shift[r, 1], reach[1], of_y[r - first])
    return of_x, of_y


@njit(parallel=True, **EXACT)
def model_terms(
    grid, rows, rotation, member, frequency, scale, task, particle, data, ctf, shift, factor, reach, cross, norm
):
    """Weighted sums over each particle's views of Re conj(M) x and |M|^2, M = c P exp(-i k.s).

    As ``score_local``, with the images x in data (B, 2K) and their CTF c (B, K); task: all views of a particle in one;
    factor (R,) float32: weights of the views. Into cross, norm (B, k) float32, which stay as they are for images
    without views.
    """
    row = _U(rows + 1)
    plane = row * _U(rows)
    h = np.float32((rows - 1) // 2)
    for t in prange(len(task) - 1):
        first, last = task[t], task[t + 1]
        i = particle[first]
        f, corner = np.empty(_PLACES * PATCH, np.float32), np.empty(3 * PATCH, np.int32)
        turn = rotation[first:last, :2] * scale
        of_x, of_y = _factors(shift, first, last, reach)
        for patch in range(member.shape[0]):
            _load(f, data[i], ctf[i], member[patch], frequency[patch])
            f[_CROSS : _CROSS + _U(2 * PATCH)] = 0
            for r in range(first, last):
                if not _same_shift(shift, r, first):
                    _move(f, of_x[r - first], of_y[r - first], reach)
                _locate(f, corner, turn[r - first], h)
                _interpolate(grid, row, plane, f, corner)
                _add_terms(f, factor[r])
            for k in range(PATCH):
                j = member[patch, k]
                if j >= 0:
                    cross[i, j], norm[i, j] = f[_CROSS + _U(k)], f[_NORM + _U(k)]


@njit(**EXACT)
def _add_terms(f, factor):
    for i in range(PATCH):
        k = _U(i)
        c = f[_WEIGHT + k]
        re, im = c * f[_RE + k], c * (f[_IM + k] * f[_SIGN + k])
        f[_CROSS + k] += factor * (re * f[_MOVED_RE + k] + im * f[_MOVED_IM + k])
        f[_NORM + k] += factor * (re * re + im * im)
