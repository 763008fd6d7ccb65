"""Losses of the networks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from cryoiso.nets.hvae_parts import HvaeOutput

if TYPE_CHECKING:
    from jaxtyping import Float


class ElboTerms(NamedTuple):
    """Parts of the negative evidence lower bound; the bound itself is reconstruction + kl_per_layer.sum()."""

    loss: Float[Tensor, ""]
    """Scalar to be minimised, nats per pixel: reconstruction + kl_weight * sum of kl_per_layer."""
    reconstruction: Float[Tensor, ""]
    """Scalar, nats per pixel: -log N(images; mean, likelihood_sd), its constant included."""
    kl_per_layer: Float[Tensor, " layers"]
    """(L,) nats per pixel of the image, not weighted, coarse to fine."""
    mean_square_error: Float[Tensor, ""]
    """Scalar: of the decoder's mean against the images."""


def gaussian_kl(
    mu_q: Float[Tensor, "*#shape"],
    logsigma_q: Float[Tensor, "*#shape"],
    mu_p: Float[Tensor, "*#shape"],
    logsigma_p: Float[Tensor, "*#shape"],
) -> Float[Tensor, "*shape"]:
    """KL(q || p) of normal distributions, element by element.

    log(s_p / s_q) + (s_q^2 + (mu_q - mu_p)^2) / (2 s_p^2) - 1/2 (Kingma and Welling 2014, appendix B, for any prior).

    Args:
        mu_q, logsigma_q, mu_p, logsigma_p: shapes that broadcast.

    Returns:
        Nats an element, of the broadcast shape; zero where q and p are the same.
    """
    log_ratio = logsigma_q - logsigma_p
    distance = (mu_q - mu_p) * torch.exp(-logsigma_p)
    return 0.5 * (torch.exp(2 * log_ratio) + distance.square() - 1) - log_ratio


def negative_elbo(
    output: HvaeOutput, images: Float[Tensor, "n 1 box box"], likelihood_sd: float, kl_weight: float | Float[Tensor, ""]
) -> ElboTerms:
    """The loss of a conditional variational autoencoder, -E[log p(x | z)] + w KL(q || p), a pixel.

    The likelihood is normal with a fixed standard deviation, so that the latents carry the noise that the images have;
    an image is then generated as mean + likelihood_sd * (standard normal numbers).

    Args:
        output: of the network; mean (B, 1, D, D) and kl (B, L).
        images: (B, 1, D, D).
        likelihood_sd: in units of the images.
        kl_weight: 1 for the bound itself.

    Returns:
        The terms, averaged over the batch, float32.
    """
    pixels = images[0].numel()
    error = (images.float() - output.mean.float()).square().mean()
    constant = math.log(likelihood_sd) + 0.5 * math.log(2 * math.pi)
    reconstruction = 0.5 * error / likelihood_sd**2 + constant
    kl = output.kl.float().mean(0) / pixels
    return ElboTerms(reconstruction + kl_weight * kl.sum(), reconstruction, kl, error)
