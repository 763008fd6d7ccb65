"""The best guess of whole maps at some point of a training: what was measured, and the network's part elsewhere.

The equivariance loss turns and filters these, so that a turn is of the whole map and the filter is exact, whatever the
size of the sub-maps. They are made with an earlier state of the network and are constants to the gradient: a target
that gave way would lose whatever is hard to predict.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cryoiso.methods.anisotropy.filter import half_layout, on_grid
from cryoiso.physics.resample import resample_map

SOLVENT_ROUNDS = 30
LARGEST_DOUBLED_PX = 160
"""Maps up to this box are turned from a grid of half the spacing; in larger ones that would take gigabytes."""
_AXES = (-3, -2, -1)


def multiplied(data: Tensor, factor: Tensor) -> Tensor:
    """Maps (..., D, D, D) with their Fourier coefficients multiplied by (D, D, D//2+1)."""
    return torch.fft.irfftn(torch.fft.rfftn(data, dim=_AXES) * factor, s=data.shape[-3:], dim=_AXES)


def completed(given: Tensor, made: Tensor, rest: Tensor, mask: Tensor | None) -> Tensor:
    """given + rest o y with y the network's map, without solvent: y <- mask (given + rest o y), again and again.

    What was measured stays what it is; the rest becomes what fits a particle inside the mask best (Gerchberg 1974,
    Papoulis 1975). Linear, so that independent noise stays independent.

    Args:
        given: (D, D, D) A x, the solvent at 0.
        made: (D, D, D) the network's map.
        rest: (D, D, D//2+1) share of each coefficient that was not measured, B - A.
        mask: (D, D, D) in [0, 1]; None: no knowledge of the solvent.
    """
    y = given + multiplied(made, rest)
    for _ in range(SOLVENT_ROUNDS if mask is not None else 0):
        y = given + multiplied(mask * y, rest)
    return y


class Region:
    """Where a sub-map is turned and filtered: the whole box, or a cube twice as large as the sub-map."""

    def __init__(self, box_px: int, cube_px: int, transfer: np.ndarray, device: str) -> None:
        self.whole = 2 * cube_px >= box_px
        self.size = box_px if self.whole else 2 * cube_px
        self.box, self.cube = box_px, cube_px
        self.filter = half_layout(on_grid(transfer, self.size)).to(device)
        axis = torch.arange(self.size, dtype=torch.float32, device=device) - self.size // 2
        z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
        self._offsets = torch.stack([x, y, z], -1)

    def centre(self, place: np.ndarray) -> np.ndarray:
        """(z, y, x) of the map's voxel about which it is turned, for a sub-map at ``place``."""
        return np.full(3, self.box // 2) if self.whole else place

    def corner(self, place: np.ndarray, rotation: np.ndarray) -> np.ndarray:
        """First voxel (z, y, x) in the region of the cube about where ``place`` comes to lie."""
        offset = rotation @ (place - self.centre(place))[::-1]
        middle = np.rint(offset[::-1]).astype(int) + self.size // 2
        return np.clip(middle - self.cube // 2, 0, self.size - self.cube)

    def turned(self, fine: Tensor, rotation: Tensor, centre: np.ndarray) -> Tensor:
        """(S, S, S): out(o) = map(centre + R^T o), o from the region's middle; 0 outside the map.

        Args:
            fine: (E, E, E) the map, or the map on a grid of half the spacing.
            rotation: (3, 3) R on (x, y, z).
            centre: (z, y, x).
        """
        edge = fine.shape[-1]
        per_px = 2 if edge == 2 * self.box else 1
        shift = torch.tensor((centre - self.box // 2)[::-1].copy(), dtype=torch.float32, device=fine.device)
        at = per_px * (self._offsets @ rotation + shift) + edge // 2
        grid = at * (2 / (edge - 1)) - 1
        return functional.grid_sample(fine[None, None], grid[None], padding_mode="zeros", align_corners=True)[0, 0]

    def embedded(self, cubes: Tensor, corners: list[np.ndarray]) -> Tensor:
        """(B, S, S, S) with the cubes at their corners, 0 around."""
        out = cubes.new_zeros((len(cubes), *(self.size,) * 3))
        parts = [out[i][slices(c, self.cube)] for i, c in enumerate(corners)]
        for part, cube in zip(parts, cubes, strict=True):
            part += cube
        return out


class Estimates:
    """Estimates of some maps, made anew when the training says so."""

    def __init__(
        self, given: list[np.ndarray], transfer: np.ndarray, reach: np.ndarray, mask: np.ndarray | None, device: str
    ) -> None:
        """
        Args:
            given: (D, D, D) maps A x, normalised.
            transfer, reach: (D, D, D) A and B.
            mask: (D, D, D) in [0, 1] or None.
        """
        self.given = [torch.from_numpy(np.ascontiguousarray(data)).to(device) for data in given]
        self._transfer, self._rest = half_layout(transfer).to(device), half_layout(reach - transfer).to(device)
        self.mask = None if mask is None else torch.from_numpy(np.asarray(mask, np.float32)).to(device)
        self.fine: list[Tensor] = []
        """To be turned."""
        self.maps: list[Tensor] = []
        self.seen: list[Tensor] = []
        """A o maps."""

    @torch.no_grad()
    def renew(self, network: Callable[[np.ndarray], np.ndarray]) -> None:
        """Makes the estimates with a network: map -> map, collective over the group."""
        self.maps = [self.complete(data, network(data.cpu().numpy())) for data in self.given]
        self.seen = [multiplied(data, self._transfer) for data in self.maps]
        self.fine = [doubled(data) for data in self.maps]

    def complete(self, given: Tensor, made: np.ndarray) -> Tensor:
        """``completed`` with these filters and mask."""
        return completed(given, torch.from_numpy(made).to(given.device), self._rest, self.mask)


def doubled(data: Tensor) -> Tensor:
    """A small map on a grid of half the spacing, by band-limited interpolation; a large one as it is."""
    box = data.shape[-1]
    if box > LARGEST_DOUBLED_PX:
        return data
    return torch.from_numpy(resample_map(data.cpu().numpy(), 1.0, 2 * box, 0.5)).to(data.device)


def slices(corner: np.ndarray, size: int) -> tuple[slice, ...]:
    """Of a cube in a volume."""
    return tuple(slice(int(c), int(c) + size) for c in corner)
