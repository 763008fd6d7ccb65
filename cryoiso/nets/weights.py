"""Weights that come from a file, looked at before a network takes them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from cryoiso.core.errors import InputError

PREFIX = "parameter "
"""Of the names of weights in a file."""
HINT = "Train the network again, or take the file from a copy."


def weights_of(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights among the arrays of a file, by name."""
    return {name.removeprefix(PREFIX): values for name, values in arrays.items() if name.startswith(PREFIX)}


def require_weights(make: Callable[[], nn.Module], weights: dict[str, np.ndarray], file: object) -> None:
    """Stops at weights that are not those of a network; no memory is taken for it.

    Args:
        make: makes the network.

    Raises:
        InputError: a weight is missing, there is one too many, or one has another shape, another type, or values that
            are no finite numbers; names the first.
    """
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in make().state_dict().items()}
    missing, strange = sorted(set(expected) - set(weights)), sorted(set(weights) - set(expected))
    if missing:
        raise InputError(
            f"{len(missing)} of the network's weights are missing", file=file, expected=missing[0], hint=HINT,
            code="network-file-damaged",
        )  # fmt: skip
    if strange:
        raise InputError(
            "a weight that the network does not have",
            file=file,
            found=strange[0],
            hint=HINT,
            code="network-file-damaged",
        )
    for name, shape in expected.items():
        values = weights[name]
        if values.shape != shape:
            raise InputError(
                f"the weight '{name}' has another shape than the network's", file=file, expected=shape,
                found=values.shape, hint=HINT, code="network-file-damaged",
            )  # fmt: skip
        if values.dtype != np.float32:
            raise InputError(
                f"the weight '{name}' has another type", file=file, expected="float32", found=values.dtype, hint=HINT,
                code="network-file-damaged",
            )  # fmt: skip
        if not np.isfinite(values).all():
            bad = int(values.size - np.isfinite(values).sum())
            raise InputError(
                f"the weight '{name}' has values that are not numbers", file=file, expected="finite values",
                found=f"{bad} of {values.size} are not", hint=HINT, code="network-file-damaged",
            )  # fmt: skip


def load_weights(module: nn.Module, weights: dict[str, np.ndarray]) -> None:
    """Gives a network weights that ``require_weights`` has passed."""
    module.load_state_dict({name: torch.from_numpy(values) for name, values in weights.items()})
