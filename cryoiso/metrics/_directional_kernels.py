"""CPU kernels (numba) of correlations by direction: sums of the coefficients of a shell over double cones.

A coefficient k and its Friedel mate -k are equivalent, so a direction and its opposite are identified, and directions
are folded to z >= 0. The half sphere is divided into cells about the nodes (i, j) at tilt i * 90 / (rings - 1) and
azimuth j * 360 / columns degrees; a node is the centre of its cell. Coefficients at the Nyquist frequency are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from math import acos, atan2, exp, pi, sqrt
from typing import Any

import numpy as np
from numba import config, njit

from cryoiso.physics._kernels import EXACT

# Not numba's own threads: a process that used them cannot be forked (the child is ended), and measuring is done in
# processes that may be.
FREE: Any = {**EXACT, "nogil": True}


def in_threads(kernel: Callable[..., None], count: int, *arguments: Any) -> None:
    """Run ``kernel(start, stop, *arguments)`` on parts of 0..count, in as many threads as numba is configured for."""
    threads = int(vars(config)["NUMBA_NUM_THREADS"])
    if threads == 1:
        kernel(0, count, *arguments)
        return
    edges = np.linspace(0, count, min(count, 4 * threads) + 1).astype(int).tolist()
    with ThreadPoolExecutor(threads) as pool:
        parts = [pool.submit(kernel, a, b, *arguments) for a, b in pairwise(edges)]
        for part in parts:
            part.result()


@njit(**FREE)
def double_cone_ratios(start, stop, points, values, centres, cosine, least, out):
    """Correlation of the points within the double cone about the centres start..stop, one shell at a time.

    points (n, 3) and centres (m, 3) float64 unit vectors; values (3, n) float64: Re(A conj B), |A|^2, |B|^2; least
    (2,): smallest powers of A and of B that count; out (m,) float64, 0 where a cone has less.
    """
    x, y, z = points[:, 0].copy(), points[:, 1].copy(), points[:, 2].copy()
    cross, power1, power2 = values[0], values[1], values[2]
    for i in range(start, stop):
        u, v, w = centres[i, 0], centres[i, 1], centres[i, 2]
        a = b = c = 0.0
        for j in range(len(x)):
            if abs(u * x[j] + v * y[j] + w * z[j]) >= cosine:
                a += cross[j]
                b += power1[j]
                c += power2[j]
        out[i] = a / sqrt(b * c) if b > least[0] and c > least[1] else 0.0


@njit(inline="always")
def _on_sphere(kz, ky, kx, radius):
    """Tilt (0 .. pi/2) and azimuth (0 .. 2 pi) of the direction, folded to z >= 0."""
    if kz < 0:
        kz, ky, kx = -kz, -ky, -kx
    azimuth = atan2(np.float64(ky), np.float64(kx))
    return acos(kz / radius), azimuth + 2 * pi if azimuth < 0 else azimuth


@njit(**EXACT)
def bin_directions(fa, fb, first, last, cells):
    """Add Re(A conj B), |A|^2 and |B|^2 of the shells first..last to the cells of their directions.

    fa, fb (D, D, D//2+1) complex: half of a transform, which stands for both halves; cells (last-first+1, rings,
    columns, 3) float32.
    """
    box = fa.shape[0]
    half = box // 2
    rings, columns = cells.shape[1], cells.shape[2]
    per_tilt, per_azimuth = (rings - 1) / (pi / 2), columns / (2 * pi)
    low, high = (first - 0.5) ** 2, (last + 0.5) ** 2
    for iz in range(box):
        kz = iz if iz < box - half else iz - box
        for iy in range(box):
            ky = iy if iy < box - half else iy - box
            across = kz * kz + ky * ky
            if across >= high:
                continue
            for kx in range((box + 1) // 2):
                k2 = across + kx * kx
                if k2 < low or k2 >= high or 2 * max(abs(kz), abs(ky)) == box:
                    continue
                radius = sqrt(np.float64(k2))
                tilt, azimuth = _on_sphere(kz, ky, kx, radius)
                ring, column = int(tilt * per_tilt + 0.5), int(azimuth * per_azimuth + 0.5)
                if column >= columns:
                    column -= columns
                weight = np.float32(1.0 if kx == 0 else 2.0)
                a, b = fa[iz, iy, kx], fb[iz, iy, kx]
                cell = cells[int(radius + 0.5) - first, ring, column]
                cell[0] += weight * (a.real * b.real + a.imag * b.imag)
                cell[1] += weight * (a.real * a.real + a.imag * a.imag)
                cell[2] += weight * (b.real * b.real + b.imag * b.imag)


@njit(**FREE)
def mix_rings(start, stop, shares, rings, out):
    """out[m] = shares[m] @ rings[m] for the orders m in start..stop.

    shares (orders, i, j), rings (orders, j, n), out (orders, i, n), float64. Not delegated to a BLAS library, whose
    threads synchronise at each of these small products.
    """
    for m in range(start, stop):
        for i in range(shares.shape[1]):
            row = out[m, i]
            row[:] = 0.0
            for j in range(shares.shape[2]):
                share, ring = shares[m, i, j], rings[m, j]
                for n in range(len(row)):
                    row[n] += share * ring[n]


@njit(**FREE)
def paint_shells(start, stop, nodes, first, out):
    """Write every voxel of the shells first..first+len(nodes)-1, bilinear between the nodes of its shell.

    Planes start..stop of 0..D//2, and the corresponding planes of opposite sign.

    nodes (shells, rings, columns) float32; out (D, D, D) float32, origin at D//2.
    """
    shells, rings, columns = nodes.shape
    box = out.shape[0]
    centre = box // 2
    per_tilt, per_azimuth = (rings - 1) / (pi / 2), columns / (2 * pi)
    low, high = (first - 0.5) ** 2, (first + shells - 0.5) ** 2
    for kz in range(start, stop):
        for ky in range(-centre, centre + 1):
            for kx in range(-centre, centre + 1):
                k2 = kz * kz + ky * ky + kx * kx
                if k2 < low or k2 >= high or (kz == 0 and (ky < 0 or (ky == 0 and kx < 0))):
                    continue
                radius = sqrt(np.float64(k2))
                tilt, azimuth = _on_sphere(kz, ky, kx, radius)
                s, t = tilt * per_tilt, azimuth * per_azimuth
                i, j = min(int(s), rings - 2), int(t)
                u, v = s - i, t - j
                j = j % columns
                after = j + 1 if j + 1 < columns else 0
                shell = nodes[int(radius + 0.5) - first]
                here = (1 - v) * shell[i, j] + v * shell[i, after]
                below = (1 - v) * shell[i + 1, j] + v * shell[i + 1, after]
                value = np.float32((1 - u) * here + u * below)
                if kz < box - centre and ky < box - centre and kx < box - centre:
                    out[centre + kz, centre + ky, centre + kx] = value
                if max(-kz, -ky, -kx) < box - centre:
                    out[centre - kz, centre - ky, centre - kx] = value


@njit(**FREE)
def sums_about_axes(start, stop, fa, fb, axes, cosine, falloff, sums):
    """Sums over the double cone about each axis, shell by shell; parts start..stop of them.

    fa, fb (D, D, D//2+1) complex; axes (3, n) float64 as x, y, z; a coefficient at cosine c of the angle to the axis
    has the weight exp(-falloff ((c - 1) / (cosine - 1))^2); sums (parts, D//2+1, 4, n) float64: Re(A conj B), |A|^2,
    |B|^2, and the number of coefficients (k and -k are one), one part per slab.
    """
    box = fa.shape[0]
    half = box // 2
    n, parts = axes.shape[1], len(sums)
    for part in range(start, stop):
        cosines = np.empty(n)
        for iz in range(box * part // parts, box * (part + 1) // parts):
            kz = iz if iz < box - half else iz - box
            for iy in range(box):
                ky = iy if iy < box - half else iy - box
                for kx in range((box + 1) // 2):
                    k2 = kz * kz + ky * ky + kx * kx
                    if k2 == 0 or k2 >= (half + 0.5) ** 2 or 2 * max(abs(kz), abs(ky)) == box:
                        continue
                    radius = sqrt(np.float64(k2))
                    x, y, z = kx / radius, ky / radius, kz / radius
                    for j in range(n):
                        cosines[j] = abs(x * axes[0, j] + y * axes[1, j] + z * axes[2, j])
                    a, b = fa[iz, iy, kx], fb[iz, iy, kx]
                    weight = 1.0 if kx == 0 else 2.0
                    cross = weight * (a.real * b.real + a.imag * b.imag)
                    power1 = weight * (a.real * a.real + a.imag * a.imag)
                    power2 = weight * (b.real * b.real + b.imag * b.imag)
                    shell = sums[part, int(radius + 0.5)]
                    for j in range(n):
                        if cosines[j] >= cosine:
                            off = (cosines[j] - 1) / (cosine - 1)
                            w = exp(-falloff * off * off) if falloff > 0 else 1.0
                            shell[0, j] += w * cross
                            shell[1, j] += w * power1
                            shell[2, j] += w * power2
                            shell[3, j] += 0.5 * weight


@njit(**FREE)
def count_near_planes(start, stop, points, views, limit, counts):
    """Number of views within ``limit`` (as a sine) of the plane perpendicular to each of the points start..stop.

    points (n, 3), views (m, 3) float64 unit vectors; counts (n,) int64.
    """
    x, y, z = views[:, 0].copy(), views[:, 1].copy(), views[:, 2].copy()
    for i in range(start, stop):
        u, v, w = points[i, 0], points[i, 1], points[i, 2]
        near = 0
        for j in range(len(x)):
            near += abs(u * x[j] + v * y[j] + w * z[j]) < limit
        counts[i] = near


@njit(**EXACT)
def connected_to_centre(values, threshold, known_radius, out):
    """Mark the voxels connected to the centre through values that reach a threshold.

    The path moves one step nearer along every axis at once, as long as that axis has a step left. Voxels nearer than
    ``known_radius`` to the centre count as reaching the threshold. values, out: (D, D, D), centre at D//2; out bool.
    """
    box = values.shape[0]
    centre = box // 2
    for a in range(centre + 1):
        for b in range(centre + 1):
            for c in range(centre + 1):
                near = a * a + b * b + c * c < known_radius * known_radius or a + b + c == 0
                for octant in range(8):
                    z = centre + (a if octant & 1 else -a)
                    y = centre + (b if octant & 2 else -b)
                    x = centre + (c if octant & 4 else -c)
                    if max(z, y, x) >= box:
                        continue
                    inner = (_nearer(z, centre), _nearer(y, centre), _nearer(x, centre))
                    out[z, y, x] = near or (values[z, y, x] >= threshold and out[inner])


@njit(inline="always")
def _nearer(at, centre):
    return at - 1 if at > centre else at + 1 if at < centre else at


@njit(inline="always")
def _triangle(p, q, r):
    ux, uy, uz = q[0] - p[0], q[1] - p[1], q[2] - p[2]
    vx, vy, vz = r[0] - p[0], r[1] - p[1], r[2] - p[2]
    x, y, z = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
    return 0.5 * sqrt(x * x + y * y + z * z)


@njit(inline="always")
def _cut(level, corner_a, value_a, corner_b, value_b):
    """Position of the level between two corners of a unit cell, which are numbered 4 z + 2 y + x."""
    t = (level - value_a) / (value_b - value_a)
    return (
        (1 - t) * (corner_a >> 2) + t * (corner_b >> 2),
        (1 - t) * ((corner_a >> 1) & 1) + t * ((corner_b >> 1) & 1),
        (1 - t) * (corner_a & 1) + t * (corner_b & 1),
    )


# The six tetrahedra about the diagonal 0-7 of a cell.
_TETRAHEDRA = np.array([[0, 1, 3, 7], [0, 1, 5, 7], [0, 2, 3, 7], [0, 2, 6, 7], [0, 4, 5, 7], [0, 4, 6, 7]])


@njit(**EXACT)
def surface_area(values, level):
    """Area of the surface where a field, linear within each of the six tetrahedra of a cell, has this level."""
    area = 0.0
    corner = np.empty(8)
    above, under = np.empty(4, np.int64), np.empty(4, np.int64)
    for z in range(values.shape[0] - 1):
        for y in range(values.shape[1] - 1):
            for x in range(values.shape[2] - 1):
                n = 0
                for i in range(8):
                    corner[i] = values[z + (i >> 2), y + ((i >> 1) & 1), x + (i & 1)]
                    n += corner[i] >= level
                if n == 0 or n == 8:
                    continue
                for tetrahedron in _TETRAHEDRA:
                    a = u = 0
                    for i in tetrahedron:
                        if corner[i] >= level:
                            above[a] = i
                            a += 1
                        else:
                            under[u] = i
                            u += 1
                    if a == 0 or u == 0:
                        continue
                    if a == 2:
                        i, j, k, m = above[0], above[1], under[0], under[1]
                        p, q = _cut(level, i, corner[i], k, corner[k]), _cut(level, i, corner[i], m, corner[m])
                        r, s = _cut(level, j, corner[j], m, corner[m]), _cut(level, j, corner[j], k, corner[k])
                        area += _triangle(p, q, r) + _triangle(p, r, s)
                    else:
                        tip, rest = (above[0], under) if a == 1 else (under[0], above)
                        p = _cut(level, tip, corner[tip], rest[0], corner[rest[0]])
                        q = _cut(level, tip, corner[tip], rest[1], corner[rest[1]])
                        r = _cut(level, tip, corner[tip], rest[2], corner[rest[2]])
                        area += _triangle(p, q, r)
    return area
