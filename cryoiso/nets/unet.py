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

import torch
from torch import Tensor, nn
from torch.nn import functional

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


def _in_slabs(x: Tensor, unit: int) -> bool:
    """Is this one volume on a CPU, whose lower and upper half are whole multiples of ``unit``?

    torch leaves a small volume alone in its batch to convolutions that take five times as long as those it uses for two
    (``use_mkldnn`` in its Convolution.cpp). So one volume is convolved as a batch of two slabs.
    """
    return len(x) == 1 and x.device.type == "cpu" and x.shape[2] % (2 * unit) == 0


def _stacked(slabs: Tensor) -> Tensor:
    """(2, C, d, h, w) -> (1, C, 2 d, h, w)."""
    return torch.cat(slabs.chunk(2), 2)


class Same(nn.Conv3d):
    """3x3x3, to the same size."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if not _in_slabs(x, 1):
            return super().forward(x)
        half = x.shape[2] // 2
        padded = functional.pad(x, (0, 0, 0, 0, 1, 1))
        slabs = torch.cat([padded[:, :, : half + 2], padded[:, :, half:]])
        return _stacked(functional.conv3d(slabs, self.weight, padding=(0, 1, 1)))


class Halve(nn.Conv3d):
    """2x2x2, to half the edge."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 2, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return _stacked(super().forward(torch.cat(x.chunk(2, 2)))) if _in_slabs(x, 2) else super().forward(x)


class Double(nn.ConvTranspose3d):
    """2x2x2, to twice the edge."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 2, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # no output_size
        return _stacked(super().forward(torch.cat(x.chunk(2, 2)))) if _in_slabs(x, 1) else super().forward(x)


def _convolution(inputs: int, outputs: int) -> nn.Conv3d:
    layer = Same(inputs, outputs)
    nn.init.kaiming_normal_(layer.weight, a=SLOPE)
    return layer


class Block(nn.Sequential):
    """Convolutions, each followed by a leaky rectifier: (B, inputs, d, h, w) -> (B, outputs, d, h, w)."""

    def __init__(self, inputs: int, outputs: int, convolutions: int) -> None:
        layers: list[nn.Module] = []
        for number in range(convolutions):
            layers += [_convolution(outputs if number else inputs, outputs), nn.LeakyReLU(SLOPE, inplace=True)]
        super().__init__(*layers)


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

    def forward(self, x: Float[Tensor, "n 1 box box box"]) -> Float[Tensor, "n 1 box box box"]:
        return x + self.change(x)

    def change(self, x: Float[Tensor, "n 1 box box box"]) -> Float[Tensor, "n 1 box box box"]:
        """What the network adds to its input, (B, 1, D, D, D); D a multiple of ``config.multiple``."""
        skips: list[Tensor] = []
        y = x
        for block, shrink in zip(self.down, self.shrink, strict=True):
            y = block(y)
            skips.append(y)
            y = shrink(y)
        y = self.bottom(y)
        for block, grow in zip(reversed(self.up), reversed(self.grow), strict=True):
            y = block(torch.cat([skips.pop(), grow(y)], 1))
        volume: Tensor = self.last(y).float()
        return volume
