"""A trained network in a file: weights, shape, grey scale and how it was made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cryoiso import __version__
from cryoiso.core.errors import InputError
from cryoiso.io import checkpoint
from cryoiso.nets.unet import Unet3d, UnetConfig
from cryoiso.nets.weights import HINT, load_weights, require_weights, weights_of

KIND = "cryoiso anisotropy network"


@dataclass(frozen=True)
class SavedNetwork:
    """What a network file holds."""

    config: UnetConfig
    weights: dict[str, np.ndarray]
    facts: dict[str, Any]

    def module(self, device: str = "cpu") -> Unet3d:
        """The network, ready to be applied."""
        network = Unet3d(self.config)
        load_weights(network, self.weights)
        return network.to(device).eval()


def save(path: Path, network: Unet3d, facts: dict[str, Any]) -> None:
    """Writes everything that :func:`load` needs; atomic, the same bytes for the same network."""
    arrays = {f"parameter {k}": v.detach().cpu().contiguous().numpy() for k, v in network.state_dict().items()}
    config = {"widths": list(network.config.widths), "convolutions": network.config.convolutions}
    values = {"kind": KIND, "config": config, "facts": {**facts, "cryoiso": __version__}}
    checkpoint.save(path, arrays, values)
    checkpoint.previous(path).unlink(missing_ok=True)


def load(path: Path) -> SavedNetwork:
    """Reads a network file.

    Raises:
        InputError: no such file, damaged, not a network of this kind, or with weights that are not its own.
    """
    hint = "'cryoiso correct' writes network*.npz."
    arrays, values = checkpoint.read_kind(path, KIND, "not a trained anisotropy network", hint)
    config, weights = _config(values.get("config"), path), weights_of(arrays)
    require_weights(lambda: Unet3d(config), weights, path)
    return SavedNetwork(config, weights, values.get("facts") or {})


def _config(values: Any, path: Path) -> UnetConfig:
    wanted = "widths (1 to 8 positive numbers) and convolutions (1 to 16)"
    try:
        widths, convolutions = [int(width) for width in values["widths"]], int(values["convolutions"])
    except (TypeError, KeyError, ValueError):
        widths, convolutions = [], 0
    if not (1 <= len(widths) <= 8 and min(widths) >= 1 and 1 <= convolutions <= 16):
        raise InputError(
            "the shape of the network is damaged",
            file=path,
            expected=wanted,
            found=values,
            hint=HINT,
            code="network-file-damaged",
        )
    return UnetConfig(tuple(widths), convolutions)


def matching_weights(path: Path, config: UnetConfig) -> dict[str, np.ndarray]:
    """Weights of a file to begin a training with.

    Raises:
        InputError: not a network file, or of another shape.
    """
    saved = load(path)
    if saved.config != config:
        raise InputError("the initial network has another shape", file=path,
                         expected=f"widths {config.widths}, {config.convolutions} convolutions",
                         found=f"widths {saved.config.widths}, {saved.config.convolutions} convolutions",
                         hint="Use the same preset, or start without it.", code="network-mismatch")  # fmt: skip
    return saved.weights
