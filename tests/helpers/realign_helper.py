"""A stand-in for the networks of the anisotropy correction: quick, and its weights tell what it has been through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cryoiso.methods.anisotropy.correct import Corrected
from cryoiso.methods.misalignment.steps import shell_amplitude
from cryoiso.physics.filters import apply_radial


def quick_correct(
    halves: dict[int, Any], transfer: np.ndarray, mask: Any, settings: Any, comm: Any, folder: Path, *, seed: int = 0,
    resume: bool = False, warm: dict[str, Path] | None = None, resolution_A: float | None = None,
) -> Corrected:  # fmt: skip
    """Doubles the maps and tilts their spectra a little; the 'weights' are a sum over all that went before."""
    labels = {"both": (1, 2)} if settings.mode == "paired" else {"1": (1,), "2": (2,)}
    maps, files, history = {}, {}, {}
    for label, mine in labels.items():
        weights = np.load(warm[label])["weights"] if warm else np.zeros(3)
        learnt = sum(float(np.abs(halves[h].data).sum()) for h in mine) * settings.epochs + seed % 97
        weights = weights * 0.5 + np.array([learnt, settings.epochs, 1.0])
        files[label] = folder / f"network{label}.npz"
        if comm.rank == 0:
            np.savez(files[label], weights=weights)
        for h in mine:
            size = len(shell_amplitude(halves[h].data))
            maps[h] = 2 * apply_radial(halves[h].data, 1 + 1e-9 * weights[0] * np.linspace(0, 1, size))
        history[label] = [{"loss": 2.0}, {"loss": 1.0 + 1e-6 * learnt}]
    comm.barrier()
    return Corrected(maps, {}, files, history, {})


def use_quick_networks(monkeypatch: Any) -> list[dict[str, Any]]:
    """Lets corrections of this process work with the stand-in; returns the list of its calls."""
    from cryoiso.methods.anisotropy import correct

    calls: list[dict[str, Any]] = []

    def noted(halves: Any, transfer: Any, mask: Any, settings: Any, *rest: Any, **options: Any) -> Corrected:
        calls.append({"halves": halves, "transfer": transfer, "mask": mask, "settings": settings, **options})
        return quick_correct(halves, transfer, mask, settings, *rest, **options)

    monkeypatch.setattr(correct, "correct_halves", noted)
    return calls
