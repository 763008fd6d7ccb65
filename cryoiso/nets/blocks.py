"""Building blocks of the convolutional networks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from cryoiso.nets.channel_parts import convolved, pointwise_each

if TYPE_CHECKING:
    from jaxtyping import Float

SLOPE = 0.2
"""Of every leaky rectifier."""
RESIDUAL_SHARE = 0.2
"""How much of a dense block's last convolution is added to its input (Wang et al. 2018, ESRGAN)."""
QUIET = 0.1
"""Factor on the starting weights of residual branches: a deep network starts near the identity."""
SIGMA_RANGE = 5.0
"""Logarithms of standard deviations are kept inside plus/minus this, smoothly."""


def convolution(inputs: int, outputs: int, size: int, scale: float = 1.0) -> nn.Conv2d:
    """A convolution that keeps the image's size; He's starting weights (2015) times ``scale``, no starting bias."""
    layer = nn.Conv2d(inputs, outputs, size, padding=size // 2)
    nn.init.kaiming_normal_(layer.weight, a=SLOPE)
    with torch.no_grad():
        layer.weight.mul_(scale)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


class Pointwise(nn.Linear):
    """A 1x1 convolution as one matrix product: (B, inputs, h, w) -> (B, outputs, h, w) in channels_last order.

    He's starting weights times ``scale``, no starting bias. On one CPU thread several times faster than ``nn.Conv2d``.
    """

    def __init__(self, inputs: int, outputs: int, scale: float = 1.0) -> None:
        super().__init__(inputs, outputs)
        nn.init.kaiming_normal_(self.weight, a=SLOPE)
        with torch.no_grad():
            self.weight.mul_(scale)
        nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "n inputs h w"]) -> Float[Tensor, "n outputs h w"]:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def leaky(x: Tensor) -> Tensor:
    """Leaky rectifier that overwrites its argument, which must be fresh from a convolution."""
    return functional.leaky_relu_(x, SLOPE)


class DenseBlock(nn.Module):
    """Residual dense block: each 3x3 convolution sees the input and all outputs before it.

    Shapes: (B, width, h, w) -> the same.
    """

    def __init__(self, width: int, growth: int, convolutions: int) -> None:
        """
        Args:
            width: channels in and out.
            growth: channels that each convolution but the last adds.
            convolutions: how many, the last one included.
        """
        super().__init__()
        inputs = [width + i * growth for i in range(convolutions)]
        outputs = [growth] * (convolutions - 1) + [width]
        self.layers = nn.ModuleList(convolution(i, o, 3, QUIET) for i, o in zip(inputs, outputs, strict=True))

    def forward(self, x: Float[Tensor, "n width h w"]) -> Float[Tensor, "n width h w"]:
        *growing, last = self.layers
        seen = [x]
        for layer in growing:
            seen.append(leaky(self._convolved(layer, seen)))
        return torch.add(x, self._convolved(last, seen), alpha=RESIDUAL_SHARE)

    @staticmethod
    def _convolved(layer: nn.Module, seen: list[Tensor]) -> Tensor:
        conv = cast(nn.Conv2d, layer)
        return convolved(seen, conv.weight, conv.bias, lambda x, w, b: functional.conv2d(x, w, b, padding=1))


class Down(nn.Module):
    """Halves the resolution without losing a pixel: (B, width, 2h, 2w) -> (B, width, h, w)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = convolution(4 * width, width, 3)

    def forward(self, x: Float[Tensor, "n width h w"]) -> Float[Tensor, "n width h//2 w//2"]:
        features: Tensor = self.layer(functional.pixel_unshuffle(x, 2))
        return features


class Up(nn.Module):
    """Doubles the resolution: (B, width, h, w) -> (B, width, 2h, 2w); width is a multiple of 4."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = convolution(width // 4, width, 3)

    def forward(self, x: Float[Tensor, "n width h w"]) -> Float[Tensor, "n width 2*h 2*w"]:
        features: Tensor = self.layer(functional.pixel_shuffle(x, 2))
        return features


class GaussianHead(nn.Module):
    """Mean and log sigma of independent normal numbers: one small trunk, output convolutions that start at zero.

    Shapes: (B, width, h, w) -> two of (B, channels, h, w), float32 under autocast too.
    """

    def __init__(self, width: int, growth: int, channels: int) -> None:
        super().__init__()
        self.trunk = convolution(width, growth, 3)
        # the convolutions of mean and log sigma lie side by side: the first half of the outputs are means
        self.out = Pointwise(width, 2 * channels, 0.0)
        self.bent = Pointwise(growth, 2 * channels, 0.0)

    def forward(
        self, x: Float[Tensor, "n width h w"]
    ) -> tuple[Float[Tensor, "n channels h w"], Float[Tensor, "n channels h w"]]:
        mean, log_sigma = halves((self.out(x) + self.bent(leaky(self.trunk(x)))).float())
        return mean, SIGMA_RANGE * torch.tanh(log_sigma / SIGMA_RANGE)


class _Halves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = (part.contiguous(memory_format=torch.channels_last) for part in x.chunk(2, 1))
        return first, second

    @staticmethod
    def backward(ctx: Any, first: Tensor, second: Tensor) -> Tensor:
        return torch.cat((first, second), 1)


def halves(x: Float[Tensor, "n c h w"]) -> tuple[Tensor, Tensor]:
    """Both halves of the channels, in channels_last order.

    On a CPU as copies: arithmetic on every n-th number is slow, and much of it follows.
    """
    if x.device.type != "cpu":
        first, second = x.chunk(2, 1)
        return first, second
    pair: tuple[Tensor, Tensor] = _Halves.apply(x)  # type: ignore[no-untyped-call]
    return pair


class ImagePyramid(nn.Module):
    """Features of an image at several resolutions, one 1x1 projection a layer: shared strided convolutions."""

    def __init__(self, inputs: int, width: int, layers: tuple[int, ...]) -> None:
        """
        Args:
            inputs: channels of the image.
            width: channels of all features.
            layers: how many layers want features at each resolution, finest first.
        """
        super().__init__()
        self.width = width
        self.first = convolution(inputs, width, 3)
        self.strided = nn.ModuleList(nn.Conv2d(width, width, 4, stride=2, padding=1) for _ in layers[1:])
        self.project = nn.ModuleList(Pointwise(width, n * width, QUIET) for n in layers)

    def forward(self, image: Float[Tensor, "n inputs h w"]) -> list[list[Float[Tensor, "n width _ _"]]]:
        """(B, inputs, h, w) -> of each resolution, finest first, and layer: (B, width, h / 2^level, w / 2^level)."""
        # an image of one channel is in both memory orders, and the convolution would choose the other one
        x = leaky(self.first(image).contiguous(memory_format=torch.channels_last))
        features = [self._projected(0, x)]
        for level, strided in enumerate(self.strided, 1):
            x = leaky(strided(x))
            features.append(self._projected(level, x))
        return features

    def _projected(self, level: int, x: Tensor) -> list[Tensor]:
        project = cast(Pointwise, self.project[level])
        return pointwise_each(x, project.weight, project.bias, self.width)


class PoseEmbedding(nn.Module):
    """Poses as one vector a layer, whatever the box: (B, 6) -> (B, layers * width)."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, features), nn.Linear(features, features)
        self.last = nn.Linear(features, outputs)
        with torch.no_grad():
            self.last.weight.mul_(QUIET)

    def forward(self, pose: Float[Tensor, "n 6"]) -> Float[Tensor, "n features"]:
        code: Tensor = self.last(functional.silu(self.second(functional.silu(self.first(pose)))))
        return code
