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
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from cryoiso.nets.blocks import ImagePyramid, Pointwise, PoseEmbedding, convolution
from cryoiso.nets.channel_parts import with_vector
from cryoiso.nets.hvae_parts import HvaeConfig, HvaeOutput, LatentLayer
from cryoiso.nets.losses import gaussian_kl
from cryoiso.nets.wavelet_init import start_as_wavelets

if TYPE_CHECKING:
    from jaxtyping import Float

NETWORK_FORMAT = 2
"""Changes whenever the same weights would mean another network; files and checkpoints carry it. In format 1 the
posterior of a layer did not see that layer's own condition."""


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

    def forward(
        self,
        images: Float[Tensor, "n 1 box box"],
        condition: Float[Tensor, "n 1 box box"],
        pose: Float[Tensor, "n 6"],
        noise: Float[Tensor, "n latents"],
    ) -> HvaeOutput:
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

    def sample(
        self,
        condition: Float[Tensor, "n 1 box box"],
        pose: Float[Tensor, "n 6"],
        noise: Float[Tensor, "n latents"],
        temperature: float = 1.0,
    ) -> Float[Tensor, "n 1 box box"]:
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
        maps = [f for level in self.pyramid(self._patches(condition)) for f in level]
        vectors = self.pose(pose).split(self.config.width, 1)
        return [with_vector(m, v) for m, v in zip(reversed(maps), reversed(vectors), strict=True)]

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


def pose_vector(rotation: Float[Tensor, "n 3 3"], shift_px: Float[Tensor, "n 2"], box_px: int) -> Float[Tensor, "n 6"]:
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
