"""A picture of a map as a surface, 500 x 500 pixels, as EMDB asks for: no 3D program, the same bytes every time."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cryoiso.core.types import DensityMap

SIDE_PX = 500
FINE_PX, COARSE_PX = 128, 208
"""The cube that is drawn is interpolated or reduced to an edge between these."""
SLAB = 16
TURN_DEG, TILT_DEG = 25.0, 68.0
"""The view: turned about z, then z tilted up from the line of sight towards the top of the picture."""
COLOUR = np.array([0.42, 0.62, 0.82])
Colours = Callable[[np.ndarray], np.ndarray]
LIGHTS = (((-0.45, 0.6, 0.65), 0.72), ((0.7, 0.1, 0.5), 0.22))
"""Direction (right, up, towards the viewer) and strength."""
AMBIENT = 0.24


def contour_level(density: DensityMap, mask: np.ndarray | None = None) -> float:
    """A density at which the particle's surface looks right, to begin with.

    Half way between the solvent and the particle's typical density: the median outside the mask, and the mean of the
    densest fifth inside of it; no lower than five robust standard deviations above the solvent.

    Args:
        mask: (D, D, D) in [0, 1]; None: the particle is told from its solvent by its density.
    """
    from cryoiso.physics.masks import density_threshold

    data = np.asarray(density.data, np.float64)
    floor = density_threshold(density.data)
    inside = data[mask > 0.5] if mask is not None and (mask > 0.5).any() else data[data > floor]
    outside = data[mask < 0.01] if mask is not None and (mask < 0.01).any() else data[data <= floor]
    if not inside.size or not outside.size:
        return float(floor)
    solvent = float(np.median(outside))
    noise = 1.4826 * float(np.median(np.abs(outside - solvent)))
    typical = float(np.sort(inside)[-max(1, len(inside) // 5) :].mean())
    return float(max(solvent + 0.5 * (typical - solvent), solvent + 5 * noise))


def surface_png(
    density: DensityMap, level: float, mask: np.ndarray | None = None, colours: Colours | None = None
) -> bytes:
    """The surface of a map at a level, lit from the upper left, with a scale bar, as a PNG of 500 x 500 pixels.

    Args:
        density: the map.
        level: where the surface lies; below the map's highest density.
        mask: (D, D, D); density outside of it is not shown.
        colours: (z, y, x) in voxels of the map, (3, n) -> colours (n, 3) in [0, 1]; None: all blue.
    """
    data = shown_density(density.data, mask)
    low, edge = drawn_part(data, level)
    cube, pixel_A = _cube(data, low, edge, density.pixel_size_A)
    frame = _frame(cube, level)
    depth, points = _first_crossing(cube, level, frame)
    if colours is None:
        colour = np.broadcast_to(COLOUR, (*depth.shape, 3))
    else:
        places = low + points.reshape(3, -1) * (edge / len(cube))
        colour = colours(places).reshape(*depth.shape, 3)
    return _picture(_shade(cube, depth, points, colour), frame.width * pixel_A)


def shown_density(data: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """The density without what is outside of a mask."""
    data = np.asarray(data, np.float32)
    if mask is None:
        return data
    return np.where(mask > 0.01, data, min(0.0, float(np.median(data)))).astype(np.float32)


@dataclass(frozen=True)
class _Frame:
    """What of the cube the picture shows, in voxels along the directions of `_view`."""

    centre: np.ndarray
    """in the middle of the picture, (depth, down, right) from the cube's origin"""
    half: np.ndarray
    """how far from there the surface reaches, along each direction"""

    @property
    def width(self) -> float:
        """Of the whole picture."""
        return 2.24 * float(self.half[1:].max())


def drawn_part(data: np.ndarray, level: float) -> tuple[int, int]:
    """First voxel and edge of the cube about the centre that holds what stands above the level."""
    box = len(data)
    centre = box // 2
    where = np.argwhere(data > level)
    far = float(np.linalg.norm(where - centre, axis=1).max(initial=box / 8))
    half = int(min(np.ceil(1.06 * far) + 2, centre, box - centre))
    return centre - half, 2 * half


def _cube(data: np.ndarray, low: int, edge: int, pixel_A: float) -> tuple[np.ndarray, float]:
    """That part of a map on a grid fine enough to be drawn; its voxel in Å."""
    part = data[(slice(low, low + edge),) * 3].astype(np.float64)
    wanted = int(np.clip(edge, FINE_PX, COARSE_PX))
    return (resize(part, wanted), pixel_A * edge / wanted) if wanted != edge else (part, pixel_A)


def resize(part: np.ndarray, edge: int) -> np.ndarray:
    """Fourier interpolation of an even cube onto another even grid, without overshoot at its own border."""
    old = len(part)
    edge += edge % 2
    spectrum = np.fft.fftshift(np.fft.fftn(part))
    keep = min(old, edge) // 2
    target = np.zeros((edge,) * 3, np.complex128)
    inner = (slice(edge // 2 - keep, edge // 2 + keep),) * 3
    target[inner] = spectrum[(slice(old // 2 - keep, old // 2 + keep),) * 3]
    return np.fft.ifftn(np.fft.ifftshift(target)).real * (edge / old) ** 3


def _view() -> np.ndarray:
    """Rows: the directions of depth (away from the viewer), down and right in the picture, as (z, y, x) of the map."""
    turn, tilt = np.radians(TURN_DEG), np.radians(TILT_DEG)
    right = np.array([0.0, np.sin(turn), np.cos(turn)])
    forward_flat = np.array([0.0, np.cos(turn), -np.sin(turn)])
    up = np.sin(tilt) * np.array([1.0, 0, 0]) + np.cos(tilt) * forward_flat
    depth = -np.cos(tilt) * np.array([1.0, 0, 0]) + np.sin(tilt) * forward_flat
    return np.stack([depth, -up, right])


def _frame(cube: np.ndarray, level: float) -> _Frame:
    """The smallest box along the directions of the view that holds what stands above the level."""
    where = np.argwhere(cube > level)
    seen = where @ _view().T if len(where) else np.array([[0.0, 0, 0], [1.0, 1, 1]]) * len(cube)
    low, high = seen.min(axis=0) - 1.5, seen.max(axis=0) + 1.5
    return _Frame((low + high) / 2, (high - low) / 2)


def _first_crossing(cube: np.ndarray, level: float, frame: _Frame) -> tuple[np.ndarray, np.ndarray]:
    """Marches through the cube from the viewer on, all pixels side by side, a voxel at a time.

    Returns:
        depth of the surface in voxels (inf where there is none), and the surface's points in the cube, (500, 500) and
        (3, 500, 500).
    """
    from scipy.ndimage import affine_transform

    scale = frame.width / SIDE_PX
    matrix = _view().T * np.array([1.0, scale, scale])
    start = frame.centre - np.array([frame.half[0], frame.width / 2, frame.width / 2])
    spare = [int((frame.width / 2 - h) / scale) for h in frame.half[1:]]
    rows, columns = (slice(n, SIDE_PX - n) for n in spare)
    shape = (rows.stop - rows.start, columns.stop - columns.start)
    depth, last = np.full(shape, np.inf), np.full(shape, -np.inf)
    for first in range(0, int(np.ceil(2 * frame.half[0])), SLAB):
        corner = _view().T @ start + matrix @ np.array([first, rows.start + 0.5, columns.start + 0.5])
        block = affine_transform(
            cube, matrix, offset=corner, output_shape=(SLAB, *shape), order=1, mode="constant",
            cval=float(cube.min()), prefilter=False,
        )  # fmt: skip
        for number, plane in enumerate(block):
            hit = (plane > level) & ~np.isfinite(depth)
            rise = np.where(np.isfinite(last[hit]), (level - last[hit]) / np.maximum(plane[hit] - last[hit], 1e-12), 0)
            depth[hit] = first + number - 1 + np.clip(rise, 0, 1)
            last = plane
    depth_map = np.full((SIDE_PX, SIDE_PX), np.inf)
    depth_map[rows, columns] = depth
    grid = np.mgrid[:SIDE_PX, :SIDE_PX] + 0.5
    shown = np.stack([np.where(np.isfinite(depth_map), depth_map, 0.0), *grid])
    return depth_map, (_view().T @ start)[:, None, None] + np.einsum("ij,jrc->irc", matrix, shown)


def _shade(cube: np.ndarray, depth: np.ndarray, points: np.ndarray, own: np.ndarray) -> np.ndarray:
    """(500, 500, 3) colours of a surface that has its own ones: two lights, darker in hollows and in the distance."""
    from scipy.ndimage import gaussian_filter, map_coordinates

    seen = np.isfinite(depth)
    if not seen.any():
        return np.ones((SIDE_PX, SIDE_PX, 3))
    smooth = gaussian_filter(cube, 0.8)
    slope = np.stack([map_coordinates(part, points, order=1) for part in np.gradient(smooth)])
    away, down, right = np.einsum("ij,jrc->irc", _view(), -slope)
    normal = np.stack([right, -down, -away])
    normal /= np.maximum(np.linalg.norm(normal, axis=0), 1e-12)
    light = np.full(seen.shape, AMBIENT)
    for direction, strength in LIGHTS:
        toward = np.asarray(direction) / np.linalg.norm(direction)
        light += strength * np.clip(np.einsum("i,irc->rc", toward, normal), 0, None)
    toward = np.asarray(LIGHTS[0][0]) / np.linalg.norm(LIGHTS[0][0]) + np.array([0, 0, 1.0])
    glint = np.clip(np.einsum("i,irc->rc", toward / np.linalg.norm(toward), normal), 0, 1) ** 40
    near, far = float(depth[seen].min()), float(depth[seen].max())
    shown = np.where(seen, depth, far)
    hollow = np.clip((shown - _blurred(shown, seen, 14)) / (0.06 * len(cube)), 0, 1)
    distance = (shown - near) / max(far - near, 1e-9)
    light *= (1 - 0.45 * hollow) * (1 - 0.3 * distance)
    colour = np.clip(light[..., None] * own * 1.25 + 0.16 * (glint * (1 - hollow))[..., None], 0, 1)
    cover = gaussian_filter(seen.astype(np.float64), 0.7)[..., None]
    # at the silhouette the nearest surface colour is spread outwards, then faded into the white
    spread = np.stack([_blurred(colour[..., k], seen, 1.5) for k in range(3)], axis=-1)
    pixels: np.ndarray = np.clip(np.where(seen[..., None], colour, spread) * cover + (1 - cover), 0, 1)
    return pixels


def _blurred(values: np.ndarray, where: np.ndarray, sigma_px: float) -> np.ndarray:
    """Gaussian mean of values over some pixels; elsewhere than near them the value itself."""
    from scipy.ndimage import gaussian_filter

    weight = gaussian_filter(where.astype(np.float64), sigma_px)
    mean = gaussian_filter(np.where(where, values, 0.0), sigma_px)
    return np.where(weight > 1e-4, mean / np.maximum(weight, 1e-4), values)


def _picture(image: np.ndarray, width_A: float) -> bytes:
    """The picture with its scale bar, without anything that names a time or a program."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from cryoiso.report.canvas import styled

    with styled():
        figure = Figure(figsize=(SIDE_PX / 100, SIDE_PX / 100), dpi=100)
        FigureCanvasAgg(figure)
        ax = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        ax.imshow(image, interpolation="nearest", extent=(0, SIDE_PX, SIDE_PX, 0))
        length_A = next((n for n in (500, 200, 100, 50, 20, 10, 5, 2) if n <= 0.26 * width_A), 1)
        right, y = SIDE_PX - 20, SIDE_PX - 18
        left = right - length_A / width_A * SIDE_PX
        ax.plot([left, right], [y, y], color="#222222", linewidth=3, solid_capstyle="butt")
        ax.text((left + right) / 2, y - 8, f"{length_A} Å", color="#222222", ha="center", va="bottom", fontsize=10)
        ax.set(xlim=(0, SIDE_PX), ylim=(SIDE_PX, 0))
        ax.axis("off")
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=100, metadata={"Software": None})
    return stream.getvalue()
