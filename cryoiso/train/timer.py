"""The speed of a training."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from cryoiso.io.atomic import write_text
from cryoiso.train import state as states


class ThroughputTimer:
    """Images and floating-point operations a second, in a file of its own: others are the same on every machine."""

    def __init__(self, path: Path, batch: int, ranks: int = 1) -> None:
        """
        Args:
            path: of the file.
            batch: images a step, of all ranks together.
            ranks: that share them.
        """
        self.path, self.batch, self.ranks = path, batch, ranks
        self.notes: list[dict[str, Any]] = []
        self._last: tuple[float, int, int] | None = None
        self._flop_per_image = self._product_tflops = 0.0

    def device(self, flop_per_image: float, product_tflops: float) -> None:
        """What an image costs in training, and what matrix products reach on this rank's device."""
        self._flop_per_image, self._product_tflops = flop_per_image, product_tflops

    def resume(self, progress: states.TrainingProgress) -> None:
        """Keeps what was noted up to the checkpoint."""
        try:
            notes = json.loads(self.path.read_text(encoding="utf-8"))["notes"]
        except (OSError, ValueError, KeyError):
            return
        at = (progress.attempt, progress.step)
        self.notes = [note for note in notes if (note["attempt"], note["step"]) <= at]

    def note(self, progress: states.TrainingProgress) -> str:
        """Takes the time since the last record; returns the speed in words."""
        now, before = time.monotonic(), self._last
        self._last = (now, progress.attempt, progress.step)
        if before is None or before[1] != progress.attempt:
            return "0 images/s"
        seconds = max(now - before[0], 1e-9)
        rate = (progress.step - before[2]) * self.batch / seconds
        tflops = self._flop_per_image * rate / 1e12
        self.notes.append({
            "attempt": progress.attempt, "step": progress.step, "seconds": round(seconds, 4), "images_per_s": rate,
            "tflops": tflops,
        })  # fmt: skip
        share = tflops / (self._product_tflops * self.ranks) if self._product_tflops else 0.0
        return f"{rate:.3g} images/s, {tflops:.3g} TFLOP/s ({share:.0%} of matrix products)"

    def write(self) -> None:
        """Publishes what was noted so far."""
        seconds = sum(note["seconds"] for note in self.notes)
        images = sum(note["seconds"] * note["images_per_s"] for note in self.notes)
        rate = images / seconds if seconds else None
        tflops = None if rate is None else self._flop_per_image * rate / 1e12
        peak = self._product_tflops * self.ranks
        facts = {
            "seconds": seconds, "images_per_s": rate, "gflop_per_image": self._flop_per_image / 1e9, "tflops": tflops,
            "product_tflops": peak, "share_of_products": tflops / peak if tflops is not None and peak else None,
            "notes": self.notes,
        }  # fmt: skip
        write_text(self.path, json.dumps(facts, indent=1) + "\n")
