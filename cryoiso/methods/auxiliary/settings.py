"""What the job file leaves open, decided by the preset."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from cryoiso.core.config import AuxiliarySection
from cryoiso.nets.hvae_parts import HvaeConfig


@dataclass(frozen=True)
class Training:
    """How one generator is trained."""

    preset: str
    steps: int
    batch: int
    """Images a step, of all ranks of its group together."""
    learning_rate: float
    likelihood_sd: float
    kl_anneal_fraction: float
    """Share of the training over which the weight of the KL term rises to 1; 0: it has its whole weight at once."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Of the learning rate."""
    clip_norm: float = 0.0
    """Longest gradient; 0: any."""

    def facts(self) -> dict[str, Any]:
        return asdict(self)


PRESETS = {
    "paper": Training("paper", 20_000, 8, 1e-4, 0.1, 0.5),
    "small": Training("small", 120, 16, 8e-3, 0.1, 0.0, "cosine"),
}
"""paper: the published schedule. small: learns the noise of 64 px images in ten seconds of one core. Its start codes
white noise exactly (``nets.wavelet_init``); annealing would first undo that and spend two thirds of the training on
finding it again."""
SMALL_ANNEALED = replace(PRESETS["small"], steps=300, learning_rate=3e-3, kl_anneal_fraction=0.5)
"""The small preset where a job asks for annealing, which needs the longer training; it was the preset until 2026-11."""


def training(section: AuxiliarySection, device: str) -> Training:
    """The preset (by the device where the job leaves it open) with what the job sets itself."""
    name = section.preset if section.preset != "auto" else "small" if device == "cpu" else "paper"
    annealing = section.kl_anneal_fraction
    preset = SMALL_ANNEALED if name == "small" and annealing else PRESETS[name]
    return Training(
        preset=name,
        steps=section.steps or preset.steps,
        batch=section.batch or preset.batch,
        learning_rate=section.learning_rate or preset.learning_rate,
        likelihood_sd=section.likelihood_sd or preset.likelihood_sd,
        kl_anneal_fraction=preset.kl_anneal_fraction if annealing is None else annealing,
        schedule=preset.schedule,
    )


def network(settings: Training, box_px: int) -> HvaeConfig:
    """The network of a preset for images of this box; it starts out leaving the likelihood's noise to the pixels."""
    return replace(HvaeConfig.preset(settings.preset, box_px), start_sd=settings.likelihood_sd)
