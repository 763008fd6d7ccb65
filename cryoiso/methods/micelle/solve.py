"""Preconditioned conjugate gradients (Hestenes and Stiefel 1952), one step at a time so that it can stop anywhere."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from cryoiso.methods.micelle.normal_equations import NormalEquations, Unknowns


@dataclass(frozen=True)
class CgState:
    """Everything a step starts from; a checkpoint is exactly this."""

    z: Unknowns
    residual: Unknowns
    direction: Unknowns
    product: float
    """r . M^-1 r."""
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def iteration(self) -> int:
        return len(self.history) - 1

    @property
    def relative_residual(self) -> float:
        return float(self.history[-1]["residual"])

    def arrays(self, half: int) -> dict[str, np.ndarray]:
        """For a checkpoint."""
        named = {"z": self.z, "residual": self.residual, "direction": self.direction}
        arrays = {f"{name}{half}": x.u.cpu().numpy() for name, x in named.items()}
        numbers = [x.grey for x in named.values()] + [self.product]
        text = np.frombuffer(json.dumps(self.history).encode(), np.uint8)
        return arrays | {f"numbers{half}": np.array(numbers), f"history{half}": text}

    @classmethod
    def of_arrays(cls, arrays: dict[str, np.ndarray], half: int, device: str) -> CgState:
        """From :meth:`arrays`."""
        numbers = arrays[f"numbers{half}"].tolist()
        z, residual, direction = (
            Unknowns(numbers[i], torch.as_tensor(arrays[f"{name}{half}"]).to(device))
            for i, name in enumerate(("z", "residual", "direction"))
        )
        return cls(z, residual, direction, numbers[3], json.loads(arrays[f"history{half}"].tobytes()))


def start(equations: NormalEquations) -> CgState:
    """Iteration 0: the homologue alone."""
    z = equations.zero()
    residual = equations.rhs.plus(-1.0, equations.apply(z))
    direction = equations.precondition(residual)
    product = residual.dot(direction)
    return CgState(z, residual, direction, product, [_record(0, z, equations.rhs, residual, product, product)])


def step(equations: NormalEquations, state: CgState) -> CgState:
    """One iteration: one convolution, three filters. Where rounding lets it go no further it says residual 0."""
    image = equations.apply(state.direction)
    curvature = state.direction.dot(image)
    if not (state.product > 0 and curvature > 0):
        return replace(state, history=[*state.history, _finished(state)])
    length = state.product / curvature
    z = state.z.plus(length, state.direction)
    residual = state.residual.plus(-length, image)
    improved = equations.precondition(residual)
    product = residual.dot(improved)
    direction = improved.plus(product / state.product, state.direction)
    first = state.history[0]["product"]
    record = _record(state.iteration + 1, z, equations.rhs, residual, product, first)
    return CgState(z, residual, direction, product, [*state.history, record])


def _record(
    iteration: int, z: Unknowns, rhs: Unknowns, residual: Unknowns, product: float, first: float
) -> dict[str, Any]:
    """The residual in the preconditioner's norm relative to the start, and the objective -z.(rhs + r)/2, constants
    left out."""
    relative = float(np.sqrt(max(product, 0.0) / first)) if first > 0 else 0.0
    objective = -0.5 * (z.dot(rhs) + z.dot(residual))
    return {
        "iteration": iteration, "residual": relative, "objective": objective, "grey_scale": z.grey, "product": product,
    }  # fmt: skip


def _finished(state: CgState) -> dict[str, Any]:
    return {**state.history[-1], "iteration": state.iteration + 1, "residual": 0.0}
