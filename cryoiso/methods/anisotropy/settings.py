"""What the job file leaves open about the correction, decided by the preset."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from cryoiso.core.config import CorrectSection
from cryoiso.core.errors import UsageError
from cryoiso.nets.precision import fast_bfloat16
from cryoiso.nets.unet import UnetConfig

Mode = Literal["paired", "independent", "single"]


@dataclass(frozen=True)
class Correction:
    """How a correction is trained and applied; nothing is left open."""

    mode: Mode
    """paired: one network sees both half-maps. independent: one a half-map. single: one map."""
    method: Literal["completion", "published"]
    """How the network is trained: see ``completion`` and ``task``."""
    preset: str
    network: UnetConfig
    epochs: int
    sub_maps: int
    """An epoch."""
    cube_px: int
    batch: int
    """Sub-maps a step, of all ranks of a training together."""
    learning_rate: float
    alpha: float
    """Weight of the equivariance loss."""
    beta: float
    """Weight of the noise2noise losses; paired mode only."""
    rotations: Literal["so3", "axes"]
    keep_measured: bool
    bfloat16: bool
    """Convolutions in bfloat16; everything else in float32."""
    schedule: Literal["constant", "cosine"]
    """Of the learning rate."""

    solvent_steps: int
    """Of the solvent constraint before the network; completion only."""
    rounds: int
    """Trainings one after the other, each on the estimate of the one before; they share the epochs."""

    @property
    def steps(self) -> int:
        """Optimisation steps of all rounds; 0 only where nothing is to be learnt (``epochs`` 0)."""
        return self.rounds * self.steps_a_round

    @property
    def steps_a_round(self) -> int:
        """Optimisation steps of one training."""
        return -(-self.epochs * self.sub_maps // (self.batch * self.rounds))

    def facts(self) -> dict[str, Any]:
        """Plain values for files."""
        return {**asdict(self), "network": {k: _plain(v) for k, v in asdict(self.network).items()}}


@dataclass(frozen=True)
class Preset:
    """Sizes that go together."""

    network: UnetConfig
    epochs: int
    sub_maps: int
    cube_px: int
    batch: int
    learning_rate: float


PRESETS = {
    "paper": Preset(UnetConfig(), 30, 1000, 64, 4, 4e-4),
    "small": Preset(UnetConfig((16, 32, 64), 2), 10, 100, 32, 4, 1e-3),
}
"""paper: the published sizes. small: minutes of two cores for boxes of 64 to 96 px."""
PUBLISHED_RATE = 4e-4


def resolve(section: CorrectSection, device: str, epochs: int | None = None) -> Correction:
    """The preset (by the device where the job leaves it open) with what the job sets itself.

    Args:
        device: of the ranks that train, "cpu" or "cuda...".
        epochs: overrides the section's (inside a refinement).

    Raises:
        UsageError: a cube that the network cannot halve often enough.
    """
    name = section.preset if section.preset != "auto" else "small" if device == "cpu" else "paper"
    preset = PRESETS[name]
    published = section.method == "published"
    cube = section.cube_px or preset.cube_px
    if cube % preset.network.multiple:
        raise UsageError(
            f"correct.cube_px = {cube}: must be a multiple of {preset.network.multiple}", code="option-out-of-range"
        )
    return Correction(
        mode=section.mode,
        method=section.method,
        preset=name,
        network=preset.network,
        epochs=next(n for n in (epochs, section.epochs, preset.epochs) if n is not None),
        sub_maps=section.sub_maps or preset.sub_maps,
        cube_px=cube,
        batch=section.batch or preset.batch,
        learning_rate=section.learning_rate or (PUBLISHED_RATE if published else preset.learning_rate),
        alpha=section.alpha,
        beta=section.beta if section.mode == "paired" else 0.0,
        rotations=section.rotations,
        keep_measured=section.keep_measured,
        bfloat16=fast_bfloat16(device),
        schedule="constant" if published else "cosine",
        solvent_steps=section.solvent_steps,
        rounds=1 if published else section.rounds,
    )


def agreed(settings: Correction, comm: Any) -> Correction:
    """The same on all ranks, though nodes may be of several kinds: the root's precision (collective)."""
    return replace(settings, bfloat16=bool(comm.bcast(settings.bfloat16)))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
