"""A 3D U-Net that maps a density to a density: what it adds to its input is learnt (spIsoNet, Nat. Methods 2024).

Blocks of three 3x3x3 convolutions, strided convolutions on the way down, transposed ones on the way up, skips. On
purpose without normalisation: statistics of a sub-map would make the same density come out differently in two tiles and
blow up the noise of an empty one. And without additive constants: f(a x) = a f(x) for a > 0, so nothing depends on the
grey scale and empty space stays empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from torch import Tensor, nn

from cryoiso.nets.volume_convolutions import Double, Halve, Same

if TYPE_CHECKING:
    from jaxtyping import Float

SLOPE = 0.1
"""Of every leaky rectifier."""


@dataclass(frozen=True)
class UnetConfig:
    """Shape of the network."""

    widths: tuple[int, ...] = (64, 128, 256, 320)
    """Channels from the finest level to the bottom; the published ones."""
    convolutions: int = 3
    """A block."""

    @property
    def multiple(self) -> int:
        """The edge of a volume must be a multiple of this."""
        return 1 << (len(self.widths) - 1)


def _convolution(inputs: int, outputs: int) -> nn.Conv3d:
    layer = Same(inputs, outputs)
    nn.init.kaiming_normal_(layer.weight, a=SLOPE)
    return layer


class Block(nn.Sequential):
    """Convolutions, each followed by a leaky rectifier: (B, inputs, d, h, w) -> (B, outputs, d, h, w).

    The input may come as several tensors with the channels divided among them.
    """

    def __init__(self, inputs: int, outputs: int, convolutions: int) -> None:
        layers: list[nn.Module] = []
        for number in range(convolutions):
            layers += [_convolution(outputs if number else inputs, outputs), nn.LeakyReLU(SLOPE, inplace=True)]
        super().__init__(*layers)

    def forward(self, *parts: Tensor, padding: int = 1) -> Tensor:
        """With ``padding`` 0 each convolution leaves out the outermost voxels."""
        inputs = parts
        for layer in self:
            inputs = (layer(*inputs, padding=padding) if isinstance(layer, Same) else layer(*inputs),)
        return inputs[0]


class Shrink(nn.Sequential):
    """To half the edge by a strided convolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        layer = Halve(inputs, outputs)
        nn.init.kaiming_normal_(layer.weight, a=SLOPE)
        super().__init__(layer, nn.LeakyReLU(SLOPE, inplace=True))


class Grow(nn.Sequential):
    """To twice the edge by a transposed convolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        layer = Double(inputs, outputs)
        # every output voxel sees each input channel once
        nn.init.normal_(layer.weight, std=(2.0 / ((1 + SLOPE**2) * inputs)) ** 0.5)
        super().__init__(layer, nn.LeakyReLU(SLOPE, inplace=True))


class Unet3d(nn.Module):
    """(B, 1, D, D, D) -> the same; starts as the identity."""

    def __init__(self, config: UnetConfig) -> None:
        super().__init__()
        self.config = config
        widths, n = config.widths, config.convolutions
        steps = list(pairwise(widths))
        self.down = nn.ModuleList(Block(1 if not i else w, w, n) for i, w in enumerate(widths[:-1]))
        self.shrink = nn.ModuleList(Shrink(fine, coarse) for fine, coarse in steps)
        self.bottom = Block(widths[-1], widths[-1], n)
        self.grow = nn.ModuleList(Grow(coarse, fine) for fine, coarse in steps)
        self.up = nn.ModuleList(Block(2 * w, w, n) for w in widths[:-1])
        self.last = _convolution(widths[0], 1)
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Float[Tensor, "n 1 box box box"], margin: int = 0) -> Float[Tensor, "n 1 inner inner inner"]:
        """
        Args:
            margin: voxels at each face of the volume that are not wanted: (B, 1, D - 2 margin, ...) come back, the same
                numbers for less work.
        """
        return inner(x, margin) + self.change(x, margin)

    def change(self, x: Float[Tensor, "n 1 box box box"], margin: int = 0) -> Float[Tensor, "n 1 inner inner inner"]:
        """What the network adds to its input, (B, 1, D, D, D); D a multiple of ``config.multiple``.

        Args:
            margin: as for :meth:`forward`.
        """
        skips: list[Tensor] = []
        y = x
        for block, shrink in zip(self.down, self.shrink, strict=True):
            y = block(y)
            skips.append(y)
            y = shrink(y)
        y = self.bottom(y)
        # the last convolutions see so many voxels beyond what is wanted
        seen = self.config.convolutions + 1
        padding = 0 if margin >= seen else 1
        for block, grow in zip(reversed(self.up), reversed(self.grow), strict=True):
            finest = len(skips) == 1
            cut = margin - seen if finest and not padding else 0
            y = block(inner(skips.pop(), cut), inner(grow(y), cut), padding=padding if finest else 1)
        volume: Tensor = self.last(y, padding=padding).float()
        return inner(volume, margin if padding else 0)


def inner(volume: Float[Tensor, "n c box box box"], margin: int) -> Float[Tensor, "n c inner inner inner"]:
    """The volume without so many voxels at each face."""
    if not margin:
        return volume
    z, y, x = (slice(margin, edge - margin) for edge in volume.shape[-3:])
    return volume[..., z, y, x]
