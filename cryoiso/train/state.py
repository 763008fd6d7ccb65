"""What a training needs to go on as if nothing had happened, in one file of plain arrays.

Random numbers need no state: the generators are seeded anew at every step from (seed, attempt, step).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cryoiso import __version__
from cryoiso.core.errors import InputError
from cryoiso.core.identity import HINT
from cryoiso.core.log import logger
from cryoiso.io import checkpoint
from cryoiso.nets.weights import PREFIX

_OPTIMISER = "optimiser "


@dataclass
class TrainingProgress:
    """How far a training is; the same on every rank of its group."""

    step: int = 0
    """Steps done in this attempt."""
    attempt: int = 0
    bad_in_row: int = 0
    """Last steps in a row that were skipped."""
    reason: str = ""
    """Why this attempt has to be given up; empty while it goes on."""
    hopeless: bool = False
    """Another attempt would not help."""
    bfloat16: bool = False
    """The first rank's ``LoopSettings.amp`` when it began: nodes of several kinds must not differ in it, nor a
    requeued job from the one before."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Records of all attempts."""
    sums: list[float] = field(default_factory=list)
    """Of the steps since the last record."""
    counted: int = 0
    skipped: int = 0

    def next_attempt(self) -> None:
        """Forgets all but the history."""
        fresh = TrainingProgress(attempt=self.attempt + 1, history=self.history, bfloat16=self.bfloat16)
        self.__dict__.update(fresh.__dict__)

    def records(self) -> list[dict[str, Any]]:
        """Those of this attempt."""
        return [r for r in self.history if r["attempt"] == self.attempt]


def save(
    path: Path,
    module: nn.Module,
    optimiser: torch.optim.Optimizer,
    progress: TrainingProgress,
    configuration: dict[str, Any],
) -> None:
    """Writes a checkpoint; the one before it is kept beside it.

    Args:
        module: not wrapped.
        configuration: plain values that decide the result of the training.
    """
    arrays = {PREFIX + name: _array(value) for name, value in module.state_dict().items()}
    for name, parameter in module.named_parameters():
        for key, value in optimiser.state.get(parameter, {}).items():
            arrays[f"{_OPTIMISER}{key} {name}"] = _array(value)
    versions = {"cryoiso": __version__, "torch": str(torch.__version__)}
    checkpoint.save(path, arrays, {"progress": asdict(progress), "versions": versions}, configuration)


def load(path: Path, configuration: dict[str, Any]) -> tuple[dict[str, np.ndarray], TrainingProgress] | None:
    """Arrays and progress of the newest readable checkpoint, None where there is none.

    Raises:
        InputError: it was written with another configuration.
    """
    saved = checkpoint.load_same(path, configuration, "training")
    if saved is None:
        return None
    arrays, values = saved
    versions = values.get("versions", {})
    if versions.get("torch") != str(torch.__version__):
        logger.warning("%s was written with torch %s, this is %s", path, versions.get("torch"), torch.__version__)
    try:
        return arrays, TrainingProgress(**values["progress"])
    except (KeyError, TypeError) as error:
        raise InputError(
            f"the checkpoint is of another version ({error})", file=path, hint=HINT, code="version-mismatch"
        ) from None


def restore(arrays: dict[str, np.ndarray], module: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Puts parameters and the optimiser's state back where they were."""
    tensors = {k.removeprefix(PREFIX): torch.from_numpy(v) for k, v in arrays.items() if k.startswith(PREFIX)}
    module.load_state_dict(tensors)
    names = dict(module.named_parameters())
    state: dict[int, dict[str, Tensor]] = {}
    index = {name: i for i, name in enumerate(names)}
    for key, value in arrays.items():
        if key.startswith(_OPTIMISER):
            what, name = key.removeprefix(_OPTIMISER).split(" ", 1)
            tensor = torch.from_numpy(value)
            if tensor.shape == names[name].shape and what != "step":  # the layout in memory must be the parameter's
                tensor = torch.empty_like(names[name], requires_grad=False).copy_(tensor)
            state.setdefault(index[name], {})[what] = tensor
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def _array(value: Tensor) -> np.ndarray:
    return value.detach().cpu().contiguous().numpy()
