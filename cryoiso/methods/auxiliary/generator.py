"""A trained generator: network, reference and grey scale in one file, and the images that it makes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cryoiso import __version__
from cryoiso.core.errors import InputError
from cryoiso.core.rng import stable_hash
from cryoiso.core.types import DensityMap, Particles
from cryoiso.io import checkpoint
from cryoiso.methods.auxiliary.condition import Condition
from cryoiso.nets.hvae import NETWORK_FORMAT, ConditionalHvae
from cryoiso.nets.hvae_parts import HvaeConfig
from cryoiso.nets.weights import HINT, load_weights, require_weights, weights_of
from cryoiso.physics.noise import colour_noise

KIND = "cryoiso generator"
BATCH = 32
"""Images made at once: always the same ones together, so that their bits do not depend on who makes them."""
PIXEL_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Generator:
    """p(image | reference, pose, CTF), ready to be sampled."""

    network: ConditionalHvae | None
    """None: no network, a projection and Gaussian noise (the baselines that a generator must beat)."""
    reference: DensityMap
    scale: np.ndarray
    """(G,) grey scale of the reference by optics group."""
    likelihood_sd: float
    facts: dict[str, Any]
    """half (0: both), round, seed, inverted, what it was trained with, versions"""
    noise: np.ndarray | None = None
    """(G, D//2+1) power of the pixel noise by optics group and shell, instead of white noise of ``likelihood_sd``."""

    def save(self, path: Path) -> None:
        """Writes everything that :meth:`load` needs; atomic, the same bytes for the same generator."""
        state = {} if self.network is None else self.network.state_dict()
        arrays = {f"parameter {k}": v.detach().cpu().numpy() for k, v in state.items()}
        arrays |= {"reference": self.reference.data, "scale": self.scale}
        if self.noise is not None:
            arrays["noise"] = self.noise
        config = None if self.network is None else asdict(self.network.config)
        values = {
            "kind": KIND,
            "config": config,
            "network_format": NETWORK_FORMAT,
            "pixel_size_A": self.reference.pixel_size_A,
            "likelihood_sd": self.likelihood_sd,
            "facts": {**self.facts, "cryoiso": __version__},
        }
        checkpoint.save(path, arrays, values)
        checkpoint.previous(path).unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path, device: str = "cpu") -> Generator:
        """Reads a generator.

        Raises:
            InputError: no such file, damaged, not a generator, with weights that are not its own, or with weights that
                were trained for another format of the network.
        """
        arrays, values = checkpoint.read_kind(
            path, KIND, "not a trained generator", "'cryoiso auxiliary train' writes one."
        )  # fmt: skip
        _require_whole(arrays, values, path)
        if values["config"] is not None:
            _require_format(values, path)
        network = None if values["config"] is None else _network(values["config"], arrays, path).to(device).eval()
        reference = DensityMap(arrays["reference"], values["pixel_size_A"])
        noise = arrays.get("noise")
        return cls(network, reference, arrays["scale"], values["likelihood_sd"], values["facts"], noise)

    def check(self, box_px: int, pixel_size_A: float, inverted: bool, file: object, data: object) -> None:
        """Refuses data that the generator was not trained for.

        Raises:
            InputError: box, pixel size or sign differ; names both.
        """
        own_shape, theirs = [
            f"{box} px of {pixel:.5g} Å, protein {'dark' if dark else 'white'} in the stacks"
            for box, pixel, dark in (
                (self.reference.box_px, self.reference.pixel_size_A, bool(self.facts.get("inverted"))),
                (box_px, pixel_size_A, inverted),
            )
        ]
        same_pixel = abs(self.reference.pixel_size_A / pixel_size_A - 1) < PIXEL_TOLERANCE
        if not (self.reference.box_px == box_px and same_pixel and bool(self.facts.get("inverted")) == inverted):
            raise InputError(
                f"the generator was trained on images that differ from those of {data}", file=file,
                expected=theirs, found=own_shape, hint="Train a generator on these particles.", code="network-mismatch",
            )  # fmt: skip

    def condition(self, device: str) -> Condition:
        """Projections of its reference."""
        return Condition(self.reference, self.scale, device)

    @torch.no_grad()
    def images(
        self, condition: Condition, particles: Particles, rows: np.ndarray, temperature: float, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Generated images of these particles and the noise-free projections in them.

        Args:
            condition: from :meth:`condition`, on the device of the network.
            particles: auxiliary particles with poses and CTFs.
            rows: at most BATCH of them.
            temperature: factor on the spread of the latents and of the pixel noise.
            seed: the noise of an image follows from (seed, its uid).

        Returns:
            (n, D, D) float32 images and projections.
        """
        device = condition.device
        seen, pose = condition.images(particles, rows), condition.poses(particles, rows)
        size = 0 if self.network is None else self.network.config.latent_size
        pixels = self.reference.box_px**2
        uids = particles.uid[rows].tolist()
        noise = normal_numbers([f"{seed}/auxiliary image/{uid}" for uid in uids], size + pixels, device)
        mean = seen if self.network is None else self.network.sample(seen, pose, noise[:, :size], temperature)
        grain = self._grain(noise[:, size:].reshape(mean.shape), particles.optics[rows])
        return (mean + temperature * grain)[:, 0].float(), seen[:, 0]

    def _grain(self, white: Tensor, optics: np.ndarray) -> Tensor:
        """(n, 1, D, D) pixel noise, from white noise of variance 1."""
        if self.noise is None:
            return self.likelihood_sd * white
        grain = torch.empty_like(white)
        for group in np.unique(optics).tolist():
            rows = torch.as_tensor(np.flatnonzero(optics == group), device=white.device)
            grain[rows, 0] = colour_noise(white[rows, 0], self.noise[group])
        return grain


def _require_whole(arrays: dict[str, np.ndarray], values: dict[str, Any], path: Path) -> None:
    """
    Raises:
        InputError: something beside the weights is missing or no number; names it.
    """
    reference, scale, noise = (arrays.get(name) for name in ("reference", "scale", "noise"))
    box = 0 if reference is None or reference.ndim != 3 else reference.shape[0]
    numbers = [values.get(key) for key in ("pixel_size_A", "likelihood_sd")]
    wrong = ""
    if reference is None or reference.dtype != np.float32 or reference.shape != (box,) * 3 or not box:
        wrong = "reference"
    elif scale is None or scale.ndim != 1 or not len(scale) or not np.issubdtype(scale.dtype, np.floating):
        wrong = "scale"
    elif noise is not None and not (noise.shape == (len(scale), box // 2 + 1) and bool((noise >= 0).all())):
        wrong = "noise"
    elif not np.isfinite(reference).all() or not np.isfinite(scale).all():
        wrong = "reference or scale, which have values that are not numbers"
    elif not all(isinstance(number, int | float) and 0 < number < np.inf for number in numbers):
        wrong = "pixel_size_A or likelihood_sd"
    elif not isinstance(values.get("facts"), dict) or "config" not in values:
        wrong = "facts or config"
    if wrong:
        raise InputError(f"the generator is damaged: {wrong}", file=path, hint=HINT, code="network-file-damaged")


def _require_format(values: dict[str, Any], path: Path) -> None:
    """
    Raises:
        InputError: the weights would mean another network than the one that was trained.
    """
    format_number = values.get("network_format", 1)
    if format_number != NETWORK_FORMAT:
        raise InputError(
            "the generator was trained by another version, whose network is different",
            file=path, expected=f"network format {NETWORK_FORMAT}", found=format_number,
            hint="Train the generator again.",
            code="version-mismatch",
        )  # fmt: skip


def _network(config: Any, arrays: dict[str, np.ndarray], path: Path) -> ConditionalHvae:
    try:
        shape: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
        network_config = HvaeConfig(**shape)
        weights = weights_of(arrays)
        require_weights(lambda: ConditionalHvae(network_config), weights, path)
    except (TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"the shape of the network is damaged: {error}", file=path, hint=HINT, code="network-file-damaged"
        ) from None
    network = ConditionalHvae(network_config)
    load_weights(network, weights)
    return network


def normal_numbers(keys: list[str], size: int, device: str) -> Tensor:
    """(n, size) standard normal numbers, each row from its key alone (and the kind of device)."""
    source = torch.Generator(device)
    rows = [torch.randn(size, generator=source.manual_seed(stable_hash(k) >> 1), device=device) for k in keys]
    return torch.stack(rows)
