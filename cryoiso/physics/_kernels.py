"""CPU kernels (numba) for slices: extraction, insertion, local scoring. The plain torch versions are in ``project.py``,
``backproject.py`` and ``refine/likelihood.py``.

The half-space grid has shape (2h+1, 2h+1, h+1) for (z, y, x) with the origin at (h, h, 0): x >= 0 only, the rest by
Friedel symmetry. Here it is a flat array of float32 pairs (re, im). Indices are unsigned, which avoids numba's test for
negative ones; the four floats of two x neighbours are adjacent, so that the compiler can load them as one vector.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

# No fastmath, not even fused multiply-add: with it, a kernel that was just compiled and the same kernel from numba's
# cache gave other last bits (the cached code is optimised once more), hence other results after a resume.
EXACT: Any = {"cache": True, "fastmath": False, "error_model": "numpy"}
_U = np.uintp
_ONE, _TWO, _THREE = np.uintp(1), np.uintp(2), np.uintp(3)


@intrinsic
def blend_rows(typing, grid, at, row, plane, fx, fy, fz):
    """Trilinear value (re, im) inside the cell whose lower corner is at float ``at`` of a grid with strides ``row`` and
    ``plane``, for fractions fx, fy, fz.

    The four floats of two x neighbours are one vector: numba does not find such vectors by itself. The operations and
    their order are those of the plain formula, for each of the four, and so are the bits.
    """

    def generate(context, builder, signature, arguments):
        flat, at, row, plane, fx, fy, fz = arguments
        unit, data = ir.Constant(fx.type, 1), context.make_array(signature.args[0])(context, builder, flat).data
        four, two = ir.VectorType(fx.type, 4), ir.VectorType(fx.type, 2)

        def spread(value, kind):
            first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
            zeros = ir.Constant(ir.VectorType(ir.IntType(32), kind.count), [0] * kind.count)
            return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), zeros)

        def weighted(place, weight):
            start = builder.bitcast(builder.gep(data, [place]), four.as_pointer())
            return builder.fmul(spread(weight, four), builder.load(start, align=4))

        gy, gz = builder.fsub(unit, fy), builder.fsub(unit, fz)
        above = builder.add(at, plane)
        value = weighted(at, builder.fmul(gz, gy))
        value = builder.fadd(value, weighted(builder.add(at, row), builder.fmul(gz, fy)))
        value = builder.fadd(value, weighted(above, builder.fmul(fz, gy)))
        value = builder.fadd(value, weighted(builder.add(above, row), builder.fmul(fz, fy)))
        none = ir.Constant(four, ir.Undefined)
        low, high = (
            builder.shuffle_vector(value, none, ir.Constant(ir.VectorType(ir.IntType(32), 2), places))
            for places in ([0, 1], [2, 3])
        )
        result = builder.fadd(low, builder.fmul(spread(fx, two), builder.fsub(high, low)))
        parts = [builder.extract_element(result, ir.Constant(ir.IntType(32), i)) for i in range(2)]
        return context.make_tuple(builder, signature.return_type, parts)

    number, place = types.float32, types.uintp
    return types.UniTuple(number, 2)(grid, place, place, place, number, number, number), generate


@njit(inline="always")
def _sample(grid, row, plane, h, x, y, z):
    """Trilinear value (re, im) at (x, y, z); ``row`` and ``plane`` are strides in floats."""
    flip = x < np.float32(0)
    if flip:
        x, y, z = -x, -y, -z
    y += h
    z += h
    x0, y0, z0 = np.int32(x), np.int32(y), np.int32(z)
    at = _U(z0) * plane + _U(y0) * row + _TWO * _U(x0)
    re, im = blend_rows(grid, at, row, plane, x - np.float32(x0), y - np.float32(y0), z - np.float32(z0))
    if flip:
        im = -im
    return re, im


@njit(parallel=True, **EXACT)
def extract_slices(grid, rows, rotation, ky, kx, order, scale, out):
    """Trilinear central slices.

    grid: flat float32 view of (rows, rows, (rows+1)/2) complex64; rotation (J, 3, 3) float32; ky, kx (K,) float32;
    order (K,): in which coefficients are visited, neighbours together, since whole rings would leave the cache; scale:
    grid units per frequency unit; out (J, 2K) float32, pairs.
    """
    row = _U(rows + 1)
    plane = row * _U(rows)
    h = np.float32((rows - 1) // 2)
    for j in prange(rotation.shape[0]):
        ax, ay, az = rotation[j, 0, 0] * scale, rotation[j, 0, 1] * scale, rotation[j, 0, 2] * scale
        bx, by, bz = rotation[j, 1, 0] * scale, rotation[j, 1, 1] * scale, rotation[j, 1, 2] * scale
        for n in range(order.shape[0]):
            k = _U(order[n])
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


TILE_BITS = 3
"""Tiles of insertion are 2^TILE_BITS rows high and deep, and as long as a row of the grid."""


@njit(**EXACT)
def _find_tiles(rotation, ky, kx, scale, rows, first, last, tile, count):
    """Write the tile of every sample of the slices first..last, and count how many fall into each."""
    n = kx.shape[0]
    across = np.int32((rows >> TILE_BITS) + 1)
    h = np.float32((rows - 1) // 2)
    for j in range(first, last):
        ax, ay, az = rotation[j, 0, 0] * scale, rotation[j, 0, 1] * scale, rotation[j, 0, 2] * scale
        bx, by, bz = rotation[j, 1, 0] * scale, rotation[j, 1, 1] * scale, rotation[j, 1, 2] * scale
        for k in range(n):
            u, v = kx[k], ky[k]
            x, y, z = u * ax + v * bx, u * ay + v * by, u * az + v * bz
            if x < np.float32(0):
                y, z = -y, -z
            tile[j * n + k] = (np.int32(z + h) >> TILE_BITS) * across + (np.int32(y + h) >> TILE_BITS)
    for i in range(first * n, last * n):
        count[_U(tile[i])] += 1


@njit(cache=True)
def _to_places(count):
    """Counts (threads, tiles) become the place of each thread's first sample in each tile; returns the tiles' ends."""
    total = 0
    ends = np.empty(count.shape[1], np.int64)
    for i in range(count.shape[1]):
        for t in range(count.shape[0]):
            here = count[t, i]
            count[t, i] = total
            total += here
        ends[i] = total
    return ends


@njit(**EXACT)
def _largest(values):
    largest = np.float32(0)
    for i in range(values.shape[0]):
        largest = max(largest, abs(values[i]))
    return largest


@njit(**EXACT)
def _sort_samples(rotation, ky, kx, scale, rows, data, weight, unit, first, last, tile, place, sample):
    """Write each sample (x, y, z, re, im, weight) to its tile's place; return the sum of the slices' largest."""
    n = kx.shape[0]
    h = np.float32((rows - 1) // 2)
    bound = 0.0
    for j in range(first, last):
        ax, ay, az = rotation[j, 0, 0] * scale, rotation[j, 0, 1] * scale, rotation[j, 0, 2] * scale
        bx, by, bz = rotation[j, 1, 0] * scale, rotation[j, 1, 1] * scale, rotation[j, 1, 2] * scale
        bound += max(_largest(data[j]), _largest(weight[j]))
        for k in range(n):
            u, v = kx[k], ky[k]
            x, y, z = u * ax + v * bx, u * ay + v * by, u * az + v * bz
            re, im, w = data[j, _TWO * _U(k)], data[j, _TWO * _U(k) + _ONE], weight[j, k]
            if x < np.float32(0):
                x, y, z, im = -x, -y, -z, -im
            t = _U(tile[j * n + k])
            i = _U(place[t])
            place[t] += 1
            sample[i, _U(0)], sample[i, _ONE], sample[i, _TWO] = x, y + h, z + h
            sample[i, _THREE], sample[i, _U(4)], sample[i, _U(5)] = re * unit, im * unit, w * unit
    return bound


@njit(**EXACT)
def _fetch_tile(grid, rows, z, y):
    """Read a tile in the order of memory, so that it is in the cache when samples come in any order."""
    row = 3 * ((rows + 1) // 2)
    reach = (1 << TILE_BITS) + 1
    seen = np.int64(0)
    for plane in range(z, min(z + reach, rows)):
        for i in range((plane * rows + y) * row, (plane * rows + min(y + reach, rows)) * row, 8):
            seen ^= grid[i]
    return seen


@njit(**EXACT)
def _add_samples(grid, rows, sample, first, last):
    """Trilinear insertion of sorted samples."""
    row = _THREE * _U((rows + 1) // 2)
    plane = row * _U(rows)
    for s in range(first, last):
        i = _U(s)
        x, y, z = sample[i, _U(0)], sample[i, _ONE], sample[i, _TWO]
        re, im, w = sample[i, _THREE], sample[i, _U(4)], sample[i, _U(5)]
        x0, y0, z0 = np.int32(x), np.int32(y), np.int32(z)
        fx, fy, fz = x - np.float32(x0), y - np.float32(y0), z - np.float32(z0)
        gy, gz = np.float32(1) - fy, np.float32(1) - fz
        at = _U(z0) * plane + _U(y0) * row + _THREE * _U(x0)
        _add_pair(grid, at, gz * gy, fx, re, im, w)
        _add_pair(grid, at + row, gz * fy, fx, re, im, w)
        _add_pair(grid, at + plane, fz * gy, fx, re, im, w)
        _add_pair(grid, at + plane + row, fz * fy, fx, re, im, w)


@njit(parallel=True, cache=True)
def insert_slices(grid, rows, rotation, ky, kx, scale, data, weight, unit, n_threads, tile, sample):
    """Trilinear insertion into a fixed-point grid: flat int64 view of (rows, rows, (rows+1)/2, 3) with (re, im, weight)
    in multiples of 1/unit. data (J, 2K) float32 pairs, weight (J, K) float32.

    The samples are first sorted by tiles of the grid: inserted slice by slice, nearly every sample would wait for six
    cache lines from memory. Each thread owns layers of tiles, every second one at a time, since a sample extends into
    the plane above its layer; integers make the sum independent of threads and order.

    tile (J K,) int32 and sample (J K, 6) float32 are working space. Returns the sum of the slices' largest values.
    """
    across = (rows >> TILE_BITS) + 1
    slices = rotation.shape[0]
    place = np.zeros((n_threads, across * across), np.int64)
    for t in prange(n_threads):
        first, last = slices * t // n_threads, slices * (t + 1) // n_threads
        _find_tiles(rotation, ky, kx, scale, rows, first, last, tile, place[t])
    ends = _to_places(place)
    bound = np.zeros(n_threads)
    for t in prange(n_threads):
        first, last = slices * t // n_threads, slices * (t + 1) // n_threads
        bound[t] = _sort_samples(rotation, ky, kx, scale, rows, data, weight, unit, first, last, tile, place[t], sample)
    for parity in range(2):
        for pair in prange((across + 1 - parity) // 2):
            for t in range((2 * pair + parity) * across, (2 * pair + parity + 1) * across):
                first = ends[t - 1] if t else 0
                if ends[t] - first > rows:
                    place[0, t] = _fetch_tile(grid, rows, t // across << TILE_BITS, t % across << TILE_BITS)
                _add_samples(grid, rows, sample, first, ends[t])
    return bound.sum()


@njit(inline="always")
def _powers(angle, reach, out):
    """exp(i angle c) for c = -reach..reach, into out (2 reach + 1, 2); by multiplication, in float64."""
    re, im = np.cos(angle), np.sin(angle)
    p, q = 1.0, 0.0
    for c in range(reach + 1):
        out[reach + c, 0], out[reach + c, 1] = p, q
        out[reach - c, 0], out[reach - c, 1] = p, -q
        p, q = p * re - q * im, p * im + q * re


@njit(**EXACT)
def centre_and_weigh(data, ctf, ky, kx, shift, out, out_weight):
    """Input of the back-projection: data times CTF times exp(i k.shift), and CTF squared.

    data (B, 2K) float32 pairs; ctf (B, K); shift (B, 2) float64 (x, y) in radians per frequency unit (2 pi s / D); out
    (B, 2K), out_weight (B, K). The shift factor is a product of one for x and one for y, of which there are few.
    """
    reach = int(np.max(np.abs(ky)))
    reach_x = int(np.max(kx))
    of_x = np.empty((2 * reach_x + 1, 2), np.float32)
    of_y = np.empty((2 * reach + 1, 2), np.float32)
    for j in range(data.shape[0]):
        _powers(shift[j, 0], reach_x, of_x)
        _powers(shift[j, 1], reach, of_y)
        for k in range(kx.shape[0]):
            c, line = _U(np.int32(kx[k]) + reach_x), _U(np.int32(ky[k]) + reach)
            p = of_x[c, 0] * of_y[line, 0] - of_x[c, 1] * of_y[line, 1]
            q = of_x[c, 1] * of_y[line, 0] + of_x[c, 0] * of_y[line, 1]
            w = ctf[j, k]
            re, im = w * data[j, _TWO * _U(k)], w * data[j, _TWO * _U(k) + _ONE]
            out[j, _TWO * _U(k)] = re * p - im * q
            out[j, _TWO * _U(k) + _ONE] = re * q + im * p
            out_weight[j, k] = w * w


@njit(parallel=True, **EXACT)
def centre_and_scale(data, weight, particle, factor, ky, kx, shift, out, out_weight):
    """The same for samples of a posterior, of images that are weighed already: row ``particle`` of data (B, 2K) times
    factor times exp(i k.shift), and of weight (B, K) times factor.

    particle (R,); factor (R,) float32; shift (R, 2) as above; out (R, 2K), out_weight (R, K).
    """
    reach = int(np.max(np.abs(ky)))
    reach_x = int(np.max(kx))
    for r in prange(particle.shape[0]):
        of_x = np.empty((2 * reach_x + 1, 2), np.float32)
        of_y = np.empty((2 * reach + 1, 2), np.float32)
        _powers(shift[r, 0], reach_x, of_x)
        _powers(shift[r, 1], reach, of_y)
        j, w = particle[r], factor[r]
        for k in range(kx.shape[0]):
            c, line = _U(np.int32(kx[k]) + reach_x), _U(np.int32(ky[k]) + reach)
            p = of_x[c, 0] * of_y[line, 0] - of_x[c, 1] * of_y[line, 1]
            q = of_x[c, 1] * of_y[line, 0] + of_x[c, 0] * of_y[line, 1]
            re, im = w * data[j, _TWO * _U(k)], w * data[j, _TWO * _U(k) + _ONE]
            out[r, _TWO * _U(k)] = re * p - im * q
            out[r, _TWO * _U(k) + _ONE] = re * q + im * p
            out_weight[r, k] = w * weight[j, k]
