"""A trained network in a file: weights, shape, grey scale and how it was made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cryoiso import __version__
from cryoiso.core.errors import InputError
from cryoiso.io import checkpoint
from cryoiso.nets.unet import Unet3d, UnetConfig

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
        network.load_state_dict({k: torch.from_numpy(v) for k, v in self.weights.items()})
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
        InputError: no such file, or not a network of this kind.
    """
    found = checkpoint.load(path)
    if found is None or found[1].get("kind") != KIND:
        raise InputError("not a trained anisotropy network", file=path, hint="'cryoiso correct' writes network*.npz.")
    arrays, values = found
    config = UnetConfig(tuple(values["config"]["widths"]), int(values["config"]["convolutions"]))
    weights = {k.removeprefix("parameter "): v for k, v in arrays.items() if k.startswith("parameter ")}
    return SavedNetwork(config, weights, values["facts"])


def matching_weights(path: Path, config: UnetConfig) -> dict[str, np.ndarray]:
    """Weights of a file to begin a training with.

    Raises:
        InputError: not a network file, or of another shape.
    """
    saved = load(path)
    if saved.config != config:
        raise InputError("the network to begin with has another shape", file=path,
                         expected=f"widths {config.widths}, {config.convolutions} convolutions",
                         found=f"widths {saved.config.widths}, {saved.config.convolutions} convolutions",
                         hint="Use the same preset, or begin without it.")  # fmt: skip
    return saved.weights
