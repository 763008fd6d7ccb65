"""The shape of the conditional hierarchical autoencoder, its latent layer, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor, nn

from cryoiso.core.errors import InputError
from cryoiso.nets.blocks import DenseBlock, Down, GaussianHead, ImagePyramid, Pointwise, PoseEmbedding, Up

if TYPE_CHECKING:
    from jaxtyping import Float

MIN_BOX_PX = 16


class HvaeOutput(NamedTuple):
    """What the network makes of a batch."""

    mean: Float[Tensor, "n 1 box box"]
    """(B, 1, D, D) float32: mean of the likelihood."""
    kl: Float[Tensor, "n layers"]
    """(B, L) float32: KL(q || p) in nats an image and layer, coarse to fine."""


@dataclass(frozen=True)
class HvaeConfig:
    """Shape of the network; everything that its parameters' shapes follow from."""

    box_px: int
    levels: tuple[int, ...] = (2, 2, 4, 4)
    """Dense blocks at each resolution, finest first."""
    width: int = 64
    growth: int = 32
    convolutions: int = 5
    """Of a dense block."""
    latent_channels: int = 16
    pose_features: int = 128
    residual: bool = True
    """The network models what the projection does not explain."""
    patch_px: int = 1
    """The finest resolution is the image's divided by this (a power of two): squares of pixels become channels."""
    start_sd: float = 0.1
    """The starting weights describe images down to this standard deviation: the likelihood's, or near it."""

    def __post_init__(self) -> None:
        if self.box_px < MIN_BOX_PX:
            raise InputError(
                "the box is too small",
                expected=f"at least {MIN_BOX_PX} px",
                found=self.box_px,
                code="option-out-of-range",
            )
        if not self.levels or min(self.levels) < 1:
            raise InputError(
                "levels must name a positive number of blocks for each resolution",
                found=self.levels,
                code="option-out-of-range",
            )
        if self.patch_px < 1 or self.patch_px & (self.patch_px - 1):
            raise InputError("wrong patch", expected="a power of two", found=self.patch_px, code="option-out-of-range")
        least = max(4, self.patch_px**2)
        if self.width % 4 or self.width < least:
            raise InputError(
                "wrong width",
                expected=f"a multiple of 4, at least {least}",
                found=self.width,
                code="option-out-of-range",
            )
        if self.latent_channels < least:
            raise InputError(
                "too few latent channels",
                expected=f"at least {least}",
                found=self.latent_channels,
                code="option-out-of-range",
            )
        if not 0.01 <= self.start_sd < 1:
            raise InputError("wrong start_sd", expected="0.01 to 1", found=self.start_sd, code="option-out-of-range")

    @classmethod
    def preset(cls, name: str, box_px: int) -> HvaeConfig:
        """``paper``: as published; ``small``: for one CPU core and small boxes.

        Raises:
            InputError: another name, or a box below 16 px.
        """
        if name == "paper":
            return cls(box_px)
        if name == "small":
            return cls(box_px, (2, 1, 1), 16, 16, 2, latent_channels=4, pose_features=32, patch_px=2)
        raise InputError(
            "unknown preset of the network", expected="paper or small", found=repr(name), code="choice-unknown"
        )

    @property
    def latent_layers(self) -> int:
        return sum(self.levels) + len(self.levels) - 1

    @property
    def layers_a_level(self) -> tuple[int, ...]:
        """Latent layers at each resolution, finest first: the blocks, and a transition at all but the finest."""
        return (self.levels[0], *(n + 1 for n in self.levels[1:]))

    @property
    def padded_px(self) -> int:
        """The box rounded up so that the coarsest resolution is a whole number of pixels."""
        unit = self.patch_px << (len(self.levels) - 1)
        return -(-self.box_px // unit) * unit

    @property
    def latent_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """(channels, height, width) of each layer's latents, coarse to fine."""
        finest = self.padded_px // self.patch_px
        sides = [finest >> i for i, n in enumerate(self.layers_a_level) for _ in range(n)]
        return tuple((self.latent_channels, side, side) for side in reversed(sides))

    @property
    def latent_size(self) -> int:
        """Latent numbers of an image."""
        return sum(c * h * w for c, h, w in self.latent_shapes)


class LatentLayer(nn.Module):
    """One latent layer: encoder block, posterior, prior, and the decoder block that refines the state."""

    def __init__(self, config: HvaeConfig, rises: bool) -> None:
        super().__init__()
        width, channels = config.width, config.latent_channels
        shape = width, config.growth, config.convolutions
        self.rises = rises
        self.encoder = Down(width) if rises else DenseBlock(*shape)
        self.decoder = Up(width) if rises else DenseBlock(*shape)
        self.posterior = GaussianHead(width, config.growth, channels)
        self.prior = GaussianHead(width, config.growth, channels)
        self.inject = Pointwise(channels, width)

    def encode(self, x: Tensor, context: Tensor) -> Tensor:
        """Features at this layer's resolution, from those of the layer below."""
        state: Tensor = self.encoder(x) + context
        return state

    def refine(self, state: Tensor, latents: Tensor) -> Tensor:
        """The next state from this one and this layer's latents."""
        features: Tensor = self.decoder(state + self.inject(latents))
        return features


class HvaeModules(Protocol):
    """The modules of the network that its starting weights are written into."""

    config: HvaeConfig
    stem: Pointwise
    out: nn.Conv2d
    pose: PoseEmbedding
    pyramid: ImagePyramid

    def latent_layers(self) -> list[LatentLayer]:
        """Coarse to fine."""
