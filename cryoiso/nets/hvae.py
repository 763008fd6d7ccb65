"""Conditional hierarchical variational autoencoder of particle images, p(x | projection, pose).

After the cryoPROS paper (Zhang et al. 2025, Nat. Commun., doi 10.1038/s41467-025-59797-w, Methods eqs. 1-10) and the
ladder of Sonderby et al. (2016): an encoder goes from fine to coarse; from the coarsest layer down, each layer draws
its latents from a posterior q that sees the encoder (training) or from a prior p (generation), adds them to a state and
refines the state by a dense block. Encoder, q, p and state are conditioned in every layer on features of the
CTF-multiplied projection and of the pose.

Layers are numbered from coarse to fine. At each resolution there are ``levels[i]`` layers with dense blocks, and one
more whose decoder doubles the resolution (all but the finest).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from cryoiso.core.errors import InputError
from cryoiso.nets.blocks import DenseBlock, Down, GaussianHead, ImagePyramid, Pointwise, PoseEmbedding, Up, convolution
from cryoiso.nets.losses import gaussian_kl
from cryoiso.nets.wavelet_init import start_as_wavelets

MIN_BOX_PX = 16
NETWORK_FORMAT = 2
"""Changes whenever the same weights would mean another network; files and checkpoints carry it. In format 1 the
posterior of a layer did not see that layer's own condition."""


class HvaeOutput(NamedTuple):
    """What the network makes of a batch."""

    mean: Tensor
    """(B, 1, D, D) float32: mean of the likelihood."""
    kl: Tensor
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
            raise InputError("the box is too small", expected=f"at least {MIN_BOX_PX} px", found=self.box_px)
        if not self.levels or min(self.levels) < 1:
            raise InputError("levels must name a positive number of blocks for each resolution", found=self.levels)
        if self.patch_px < 1 or self.patch_px & (self.patch_px - 1):
            raise InputError("wrong patch", expected="a power of two", found=self.patch_px)
        least = max(4, self.patch_px**2)
        if self.width % 4 or self.width < least:
            raise InputError("wrong width", expected=f"a multiple of 4, at least {least}", found=self.width)
        if self.latent_channels < least:
            raise InputError("too few latent channels", expected=f"at least {least}", found=self.latent_channels)
        if not 0.01 <= self.start_sd < 1:
            raise InputError("wrong start_sd", expected="0.01 to 1", found=self.start_sd)

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
        raise InputError("unknown preset of the network", expected="paper or small", found=repr(name))

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


class ConditionalHvae(nn.Module):
    """The network. Float32 or bf16 autocast, any box from 16 px, all inside in channels_last order."""

    def __init__(self, config: HvaeConfig) -> None:
        super().__init__()
        self.config = config
        width, patch = config.width, config.patch_px**2
        self.stem = Pointwise(patch, width)
        self.pyramid = ImagePyramid(patch, width, config.layers_a_level)
        self.pose = PoseEmbedding(config.pose_features, config.latent_layers * width)
        self.top = nn.Parameter(torch.zeros(1, width, 1, 1))
        self.layers = nn.ModuleList(LatentLayer(config, rises) for rises in self._rises())
        self.out = convolution(width, patch, 3, 0.1)
        if config.residual:
            self.gain = nn.Parameter(torch.ones(()))
        start_as_wavelets(self)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def latent_layers(self) -> list[LatentLayer]:
        """Coarse to fine."""
        return list(cast(Iterable[LatentLayer], self.layers))

    def _rises(self) -> list[bool]:
        """For each layer, coarse to fine: does its decoder double the resolution?"""
        up = [[False] * n + [True] for n in reversed(self.config.levels)]
        return [flag for level in up for flag in level][:-1]

    def forward(self, images: Tensor, condition: Tensor, pose: Tensor, noise: Tensor) -> HvaeOutput:
        """Reconstruction through the posterior.

        Args:
            images: (B, 1, D, D), noise of standard deviation about 1.
            condition: (B, 1, D, D) CTF-multiplied projections of the reference on the images' scale.
            pose: (B, 6) of :func:`pose_vector`.
            noise: (B, latent_size) standard normal numbers; the output depends on nothing random but these.

        Returns:
            Mean (B, 1, D, D) and KL (B, layers) in nats.
        """
        contexts = self._contexts(condition, pose)
        seen = images - self.gain * condition if self.config.residual else images
        evidence = self._encode(seen, contexts)
        state = self.top.to(contexts[0].dtype)
        kl = []
        for layer, context, features, draw in zip(
            self.latent_layers(), contexts, evidence, self._draws(noise), strict=True
        ):
            # against the state without the context: the features have it too, and it would cancel
            mu_q, logsigma_q = layer.posterior(features - state)
            state = state + context
            mu_p, logsigma_p = layer.prior(state)
            kl.append(gaussian_kl(mu_q, logsigma_q, mu_p, logsigma_p).sum((1, 2, 3)))
            state = layer.refine(state, mu_q + torch.exp(logsigma_q) * draw)
        return HvaeOutput(self._image(state, condition), torch.stack(kl, 1))

    def sample(self, condition: Tensor, pose: Tensor, noise: Tensor, temperature: float = 1.0) -> Tensor:
        """Images from the prior.

        Args:
            condition, pose, noise: as for :meth:`forward`.
            temperature: factor on the prior's standard deviations; 0 gives its mean.

        Returns:
            Mean of the likelihood (B, 1, D, D), float32; the pixel noise of the likelihood is not in it.
        """
        contexts = self._contexts(condition, pose)
        state = self.top.to(contexts[0].dtype)
        for layer, context, draw in zip(self.latent_layers(), contexts, self._draws(noise), strict=True):
            state = state + context
            mu, logsigma = layer.prior(state)
            state = layer.refine(state, mu + temperature * torch.exp(logsigma) * draw)
        return self._image(state, condition)

    def _contexts(self, condition: Tensor, pose: Tensor) -> list[Tensor]:
        """What each layer knows of projection and pose, coarse to fine: (B, width, h, w)."""
        width = self.config.width
        maps = [f for level in self.pyramid(self._patches(condition)) for f in level.split(width, 1)]
        vectors = self.pose(pose).split(width, 1)
        return [m + v[:, :, None, None] for m, v in zip(reversed(maps), reversed(vectors), strict=True)]

    def _encode(self, images: Tensor, contexts: list[Tensor]) -> list[Tensor]:
        """Features of the images for each layer, coarse to fine."""
        x = self.stem(self._patches(images))
        evidence = []
        for layer, context in zip(self.latent_layers()[::-1], contexts[::-1], strict=True):
            x = layer.encode(x, context)
            evidence.append(x)
        return evidence[::-1]

    def _draws(self, noise: Tensor) -> list[Tensor]:
        """The flat numbers as one tensor a layer, coarse to fine. Channels change fastest, as in channels_last."""
        shapes = self.config.latent_shapes
        parts = noise.float().split([c * h * w for c, h, w in shapes], 1)
        return [p.reshape(-1, h, w, c).permute(0, 3, 1, 2) for p, (c, h, w) in zip(parts, shapes, strict=True)]

    def _patches(self, images: Tensor) -> Tensor:
        """(B, 1, D, D) -> (B, patch^2, h, w) of the padded image, reflected at the far edges."""
        more = self.config.padded_px - self.config.box_px
        if more:
            images = functional.pad(images, (0, more, 0, more), mode="reflect")
        patches = functional.pixel_unshuffle(images, self.config.patch_px) if self.config.patch_px > 1 else images
        return patches.contiguous(memory_format=torch.channels_last)

    def _image(self, state: Tensor, condition: Tensor) -> Tensor:
        """Mean of the likelihood from the last state."""
        mean = functional.pixel_shuffle(self.out(state).float(), self.config.patch_px)
        mean = mean[..., : self.config.box_px, : self.config.box_px]
        return mean + self.gain * condition.float() if self.config.residual else mean


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
        return self.encoder(x) + context

    def refine(self, state: Tensor, latents: Tensor) -> Tensor:
        """The next state from this one and this layer's latents."""
        return self.decoder(state + self.inject(latents))


def pose_vector(rotation: Tensor, shift_px: Tensor, box_px: int) -> Tensor:
    """What the network is told of a pose: the rotation's unit quaternion (w, x, y, z) and the shift.

    Of the two quaternions of a rotation the one with w >= 0 is taken (if w is 0, the one whose first component that is
    not 0 is positive), so that equal poses look equal.

    Args:
        rotation: (B, 3, 3), map -> image coordinates.
        shift_px: (B, 2) origins in pixels.
        box_px: D.

    Returns:
        (B, 6) float32: quaternion, shift / D.
    """
    r = rotation.double()
    diagonal = torch.diagonal(r, dim1=1, dim2=2)
    signs = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=r.dtype, device=r.device)
    # 4 q q^T from the rotation; its row with the largest diagonal is the best conditioned multiple of q
    outer = torch.diag_embed(1 + diagonal @ signs.T)
    pairs = {
        (0, 1): r[:, 2, 1] - r[:, 1, 2],
        (0, 2): r[:, 0, 2] - r[:, 2, 0],
        (0, 3): r[:, 1, 0] - r[:, 0, 1],
        (1, 2): r[:, 0, 1] + r[:, 1, 0],
        (1, 3): r[:, 0, 2] + r[:, 2, 0],
        (2, 3): r[:, 1, 2] + r[:, 2, 1],
    }
    for (i, j), value in pairs.items():
        outer[:, i, j] = outer[:, j, i] = value
    best = torch.diagonal(outer, dim1=1, dim2=2).argmax(1)
    q = outer[torch.arange(len(r), device=r.device), best]
    q = q / q.norm(dim=1, keepdim=True)
    q = torch.where(q.abs() < 1e-12, torch.zeros_like(q), q)
    first = torch.gather(q, 1, (q != 0).int().argmax(1, keepdim=True))
    q = q * torch.where(first < 0, -1.0, 1.0)
    return torch.cat([q, shift_px.double() / box_px], 1).float()
