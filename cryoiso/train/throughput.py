"""Speed of a training, noted at every record."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from cryoiso.io.atomic import write_text
from cryoiso.train.state import TrainingProgress


class ThroughputTimer:
    """Images a second, in a file of its own: other files are the same on every machine."""

    def __init__(self, path: Path, batch: int) -> None:
        self.path, self.batch = path, batch
        self.notes: list[dict[str, Any]] = []
        self._last: tuple[float, int, int] | None = None

    def resume(self, progress: TrainingProgress) -> None:
        """Keeps what was noted up to the checkpoint."""
        try:
            notes = json.loads(self.path.read_text(encoding="utf-8"))["notes"]
        except (OSError, ValueError, KeyError):
            return
        at = (progress.attempt, progress.step)
        self.notes = [note for note in notes if (note["attempt"], note["step"]) <= at]

    def note(self, progress: TrainingProgress) -> float:
        """Speed since the last record, images a second."""
        now, before = time.monotonic(), self._last
        self._last = (now, progress.attempt, progress.step)
        if before is None or before[1] != progress.attempt:
            return 0.0
        seconds = max(now - before[0], 1e-9)
        rate = (progress.step - before[2]) * self.batch / seconds
        self.notes.append(
            {"attempt": progress.attempt, "step": progress.step, "seconds": round(seconds, 4), "images_per_s": rate}
        )
        return rate

    def write(self) -> None:
        seconds = sum(note["seconds"] for note in self.notes)
        text = json.dumps({"seconds": seconds, "notes": self.notes}, indent=1)
        write_text(self.path, text + "\n")
