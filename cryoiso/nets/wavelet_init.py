"""Starting weights of the hierarchical autoencoder: before any training it codes white noise exactly.

Random weights need thousands of steps until the latents carry an image's noise. Instead some channels of every layer
start as an orthonormal Haar pyramid, so that the network is at once the optimal autoencoder of white noise of standard
deviation 1, and training only has to learn how the images differ from that.

At each resolution the first channels of the features hold the image: the ``patch_px^2`` pixels of a patch at the
finest, else the 2 x 2 neighbours of the next finer resolution's patch averages. Posterior and prior see them in a
Hadamard basis, whose first element is the average that the coarser layers know already. A coefficient r that is still
unknown with standard deviation s_p is described down to s_q < s_p by z ~ N(a r, a s_q^2), a = 1 - (s_q / s_p)^2, under
the prior N(0, a s_p^2): the backward channel of the Gaussian rate-distortion function (Cover and Thomas 2006, section
10.3). So nothing is lost by dividing the description among the layers, and each has a KL divergence of log(s_p / s_q).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from cryoiso.nets.blocks import SIGMA_RANGE, DenseBlock, Down, Pointwise, Up
from cryoiso.nets.hvae_parts import HvaeConfig, HvaeModules, LatentLayer

if TYPE_CHECKING:
    from jaxtyping import Float

COARSE_SD = 0.5
"""What all but the finest resolution leave unknown."""
LEAST_STEP = 0.05
"""Every layer describes every coefficient a little better, in units of log sigma at each resolution."""


@torch.no_grad()
def start_as_wavelets(network: HvaeModules) -> None:
    """Overwrites the starting weights in place."""
    config = network.config
    finest = image_channels(config, 0)
    network.stem.weight[:finest] = torch.eye(finest)
    network.out.weight.zero_()
    for channel in range(finest):
        network.out.weight[channel, channel, 1, 1] = 1
    for layer, (level, known, posterior_precision) in zip(network.latent_layers(), _precisions(config), strict=True):
        _describe(layer, config.latent_channels, known, posterior_precision)
        if layer.rises:
            _connect(layer, image_channels(config, level - 1))
        else:
            _pass_on(layer, len(known))
    _silence_contexts(network)


def image_channels(config: HvaeConfig, level: int) -> int:
    """Channels that start as the image at a resolution (0 is the finest)."""
    return 4 if level else config.patch_px**2


def hadamard(size: int) -> Float[Tensor, "{size} {size}"]:
    """(size, size) orthonormal, entries +-1/sqrt(size), the first row constant (Sylvester); a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / math.sqrt(2))
    return matrix


def _precisions(config: HvaeConfig) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each layer, coarse to fine: its level, and log sigma of each coefficient before and after it."""
    known = torch.zeros(image_channels(config, len(config.levels) - 1))
    for level in reversed(range(len(config.levels))):
        goal = math.log(COARSE_SD if level else config.start_sd)
        step = (torch.clamp(known - LEAST_STEP, max=goal) - known) / config.layers_a_level[level]
        for _ in range(config.layers_a_level[level]):
            yield level, known, known + step
            known = known + step
        average = known.exp().square().mean().log() / 2
        known = torch.zeros(image_channels(config, level - 1))
        known[0] = average


def _describe(layer: LatentLayer, channels: int, known: Tensor, posterior_precision: Tensor) -> None:
    """Posterior, prior and injection of one layer as the module's docstring has them."""
    n = len(known)
    basis = hadamard(n)
    share = 1 - torch.exp(2 * (posterior_precision - known))
    layer.posterior.out.weight[:n, :n] = share[:, None] * basis
    layer.posterior.out.bias[channels : channels + n] = _unbounded(posterior_precision + share.log() / 2)
    layer.prior.out.bias[channels : channels + n] = _unbounded(known + share.log() / 2)
    layer.inject.weight[:n] = 0
    layer.inject.weight[:n, :n] = basis.T


def _unbounded(log_sigma: Tensor) -> Tensor:
    """What the heads' smooth bound maps to ``log_sigma``."""
    return SIGMA_RANGE * torch.atanh(log_sigma / SIGMA_RANGE)


def _connect(layer: LatentLayer, finer: int) -> None:
    """Both ways between two resolutions: patch averages down, and up again. ``finer`` image channels on the finer."""
    down, up = cast(Down, layer.encoder).layer.weight, cast(Up, layer.decoder).layer.weight
    down[:4] = 0
    up[:finer] = 0
    for place in range(4):
        down[place, place : 4 * finer : 4, 1, 1] = finer**-0.5
    up[:finer, 0, 1, 1] = finer**-0.5


def _pass_on(layer: LatentLayer, count: int) -> None:
    """Dense blocks leave the image channels as they are."""
    for block in (layer.encoder, layer.decoder):
        cast(nn.Conv2d, cast(DenseBlock, block).layers[-1]).weight[:count] = 0


def _silence_contexts(network: HvaeModules) -> None:
    """Projection and pose leave the image channels alone at first."""
    config, width = network.config, network.config.width
    last, done = network.pose.last, 0
    vectors = last.weight.view(config.latent_layers, width, -1), last.bias.view(config.latent_layers, width)
    for level, count in enumerate(config.layers_a_level):
        n = image_channels(config, level)
        project = cast(Pointwise, network.pyramid.project[level])
        project.weight.view(count, width, width)[:, :n] = 0
        for values in vectors:
            values[done : done + count, :n] = 0
        done += count
