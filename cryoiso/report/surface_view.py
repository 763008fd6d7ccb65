"""A map's surface with colours that say something: a still picture, and the triangles that the page turns."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np

from cryoiso.core.types import DensityMap
from cryoiso.report.mesh import MOST_VOXELS, packed, surface_mesh
from cryoiso.report.surface import drawn_part, resize, shown_density, surface_png

INFERRED, BETWEEN, MEASURED = (213, 94, 0), (232, 232, 228), (0, 114, 178)
SHARE_STOPS = (INFERRED, BETWEEN, MEASURED)
"""Of the measured share, from 0 to 1."""
RESOLUTION_STOPS = ((0, 114, 178), (120, 190, 210), (240, 228, 120), (213, 94, 0))
"""Of the local resolution, from fine to coarse."""
LEAST_RANGE = 1.15
"""The coarsest colour is at least this many times the finest one's resolution: noise is not shown as differences."""


@dataclass(frozen=True)
class Surface:
    """What is drawn."""

    density: DensityMap
    level: float
    mask: np.ndarray | None
    values: np.ndarray | None
    """(D, D, D) what colours mean; None: one colour"""
    ends: tuple[float, float] = (0.0, 1.0)
    """the values of the first and last colour"""
    stops: tuple[tuple[int, int, int], ...] = SHARE_STOPS
    words: tuple[str, str] = ("inferred", "measured")

    def at(self, zyx_px: np.ndarray) -> np.ndarray:
        """Values (n,) at places (3, n) of the map, between 0 and 1."""
        from scipy.ndimage import map_coordinates

        assert self.values is not None
        low, high = self.ends
        values = map_coordinates(np.asarray(self.values, np.float32), zyx_px, order=1, mode="nearest")
        scaled: np.ndarray = np.clip((values - low) / max(high - low, 1e-9), 0, 1)
        return scaled

    def colours(self, zyx_px: np.ndarray) -> np.ndarray:
        """Colours (n, 3) at places (3, n)."""
        at, stops = self.at(zyx_px), np.array(self.stops) / 255
        where = np.linspace(0, 1, len(stops))
        return np.stack([np.interp(at, where, stops[:, k]) for k in range(3)], -1)


def still(surface: Surface) -> str:
    """The picture as a data: address."""
    png = surface_png(surface.density, surface.level, surface.mask, None if surface.values is None else surface.colours)
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def turning(surface: Surface) -> dict[str, Any] | None:
    """The triangles for `assets/report.js`, with ``stops`` (colours) and ``ends`` (words); None without a surface."""
    data = shown_density(surface.density.data, surface.mask)
    low, edge = drawn_part(data, surface.level)
    part = data[(slice(low, low + edge),) * 3].astype(np.float64)
    if edge > MOST_VOXELS:
        part = resize(part, MOST_VOXELS)
    mesh = surface_mesh(part, surface.level)
    if not len(mesh.triangles):
        return None
    places = low + mesh.vertices[:, ::-1].T * (edge / len(part))
    values = None if surface.values is None else surface.at(places)
    return {
        **packed(mesh, values),
        "stops": [list(colour) for colour in surface.stops],
        "ends": list(surface.words) if values is not None else [],
    }
