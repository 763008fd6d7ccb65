"""The network over a whole map: overlapping tiles, blended smoothly, shared by the ranks of a group."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cryoiso.nets.unet import Unet3d
from cryoiso.parallel.partition import owned_rows

if TYPE_CHECKING:
    from jaxtyping import Float

MARGIN = 8
"""A tile is trusted from this part of its edge inwards; beyond the box there is solvent."""


def tile_starts(box_px: int, tile_px: int, margin_px: int) -> list[int]:
    """First voxels of tiles along an axis (negative: outside the box); each overlaps the next by half what it shows.

    Every voxel of the box lies at least ``margin_px`` inside some tile, weights add up to more than zero.
    """
    shown = tile_px - 2 * margin_px
    if box_px <= shown:
        return [(box_px - tile_px) // 2]
    count = 1 + -(-2 * (box_px - shown) // shown)
    return [round(i * (box_px - shown) / (count - 1)) - margin_px for i in range(count)]


def window(tile_px: int, margin_px: int) -> np.ndarray:
    """(T,) weight of a tile along an axis: 0 in the margin, a raised cosine inside, positive wherever it shows."""
    x = (np.arange(tile_px) - margin_px + 0.5) / (tile_px - 2 * margin_px)
    return np.where((x > 0) & (x < 1), np.sin(np.pi * np.clip(x, 0, 1)) ** 2, 0.0)


def predict(
    network: Unet3d, data: Float[np.ndarray, "box box box"], tile_px: int, group: Any, bfloat16: bool,
    between: Callable[[], None] = lambda: None,
) -> Float[np.ndarray, "box box box"]:  # fmt: skip
    """f(x) of a whole map.

    What the network adds is blended, not its output: a network that changes nothing gives back the same bits.

    Args:
        network: on the device of this rank.
        data: (D, D, D) float32, solvent at 0.
        tile_px: edge of the tiles, a multiple of ``network.config.multiple``.
        group: a ``parallel.ddp.TrainingGroup``; its ranks share the tiles (collective over it).
        between: called before every tile, equally often on every rank.

    Returns:
        (D, D, D) float32, the same on all ranks of the group.
    """
    box, margin = data.shape[0], max(1, tile_px // MARGIN)
    starts = tile_starts(box, tile_px, margin)
    line = window(tile_px, margin)
    weight = (line[:, None, None] * line[None, :, None] * line).astype(np.float32)
    corners = list(product(starts, repeat=3))
    change = np.zeros(data.shape, np.float64)
    own_tiles = owned_rows(len(corners), 1, group.index, group.size)
    for turn in range(-(-len(corners) // group.size)):
        between()
        if turn >= len(own_tiles):
            continue
        number = own_tiles[turn]
        here, there = _overlap(corners[number], tile_px, box)
        tile = np.zeros((tile_px,) * 3, np.float32)
        tile[there] = data[here]
        change[here] += (_change(network, tile, group.device, bfloat16) * weight)[there]
    total = np.zeros(box)
    for start in starts:
        along, inside = _overlap((start,), tile_px, box)
        total[along] += line[inside]
    change /= total[:, None, None] * total[None, :, None] * total
    summed = group.all_sum(torch.from_numpy(change))
    corrected: np.ndarray = (data + summed.numpy()).astype(np.float32)
    return corrected


def _overlap(corner: tuple[int, ...], tile_px: int, box_px: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Slices of box and tile that lie on each other."""
    ranges = [(max(c, 0), min(c + tile_px, box_px)) for c in corner]
    here = tuple(slice(a, b) for a, b in ranges)
    return here, tuple(slice(a - c, b - c) for (a, b), c in zip(ranges, corner, strict=True))


@torch.no_grad()
def _change(network: Unet3d, tile: np.ndarray, device: str, bfloat16: bool) -> np.ndarray:
    x = torch.from_numpy(tile)[None, None].to(device)
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bfloat16):
        return network.change(x)[0, 0].float().cpu().numpy()
