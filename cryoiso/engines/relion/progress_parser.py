"""What RELION tells about its progress, read from its output as it grows."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_PATTERNS = {
    "iteration": re.compile(r"Auto-refine: Iteration=\s*(\d+)"),
    "resolution_A": re.compile(r"Auto-refine: Resolution=\s*([\d.]+)"),
    "step_deg": re.compile(r"OrientationalSampling=\s*([\d.]+)"),
    "expectation": re.compile(r"Expectation iteration\s+(\d+)"),
    "error": re.compile(r"^\s*(?:ERROR:?\s*)+(.*)"),
    "blush": re.compile(r"^Command:\s*(relion_python_blush\b.*)"),
    "unknown": re.compile(r"WARNING: Option (--\S+)\s+is not a valid RELION argument"),
}
_OBEYED = frozenset({
    "--external_reconstruct", "--sequential_halves_recons", "--maximum_angular_sampling", "--minimum_angular_sampling",
    "--gridding_iter", "--sigma", "--sigma2_fudge", "--no_map", "--minres_map", "--bfactor", "--always_cc",
    "--accuracy_current_size", "--debug1", "--debug2", "--debug3",
})  # fmt: skip
"""RELION warns of these and obeys all the same: of the first in continued runs (3.1 to 4.0.1), of the others, which it
does not list, always (3.1 to 5.0.1)."""
_BAR = re.compile(r"([\d.]+)/\s*([\d.]+)\s*(sec|min|hrs)\s*[.~]")
_UNIT_S = {"sec": 1.0, "min": 60.0, "hrs": 3600.0}


@dataclass
class RelionProgress:
    """How far RELION is; ``feed`` it with its output."""

    iteration: int = 0
    """that it works on"""
    resolution_A: float | None = None
    """after the iteration before"""
    step_deg: float | None = None
    """angular sampling of this iteration before oversampling; None: not told yet"""
    left_s: float | None = None
    """until the end of this expectation step"""
    share: float = 0.0
    """of this expectation step that is done"""
    error: str = ""
    """the first error that it printed"""
    last: bool = False
    """this is its last iteration, with both halves joined"""
    unknown: list[str] = field(default_factory=list)
    """options that it says it does not know"""
    _rest: str = ""
    _oversampling: str = ""
    _wants_error: bool = False
    _searching: bool = False
    """The bars are the expectation's; before it others are drawn (accuracies), and after it (maximization)."""

    def feed(self, text: str) -> list[int]:
        """Takes what came last; returns the iterations that began in it."""
        began = []
        lines = re.split(r"[\r\n]", self._rest + text)
        self._rest = lines.pop()[-4096:]
        for line in lines:
            began += self._line(line)
        if (bar := _BAR.search(self._rest)) is not None:
            self._see_bar(bar)
        return began

    def _line(self, line: str) -> list[int]:
        if (bar := _BAR.search(line)) is not None:
            self._see_bar(bar)
            return []
        if self._wants_error and line.strip():
            self.error, self._wants_error = re.sub(r"^ERROR:?\s*", "", line.strip()), False
        if "has converged, entering last iteration" in line:
            self.last = True
        if "Expectation iteration" in line:
            self._searching = True
        elif line.lstrip().startswith(("Maximization", "Estimating accuracies")):
            self._searching = False
        if (match := re.search(r"Oversampling=\s*(\d+)", line)) is not None:
            self._oversampling = match[1]
        for name, pattern in _PATTERNS.items():
            match = pattern.search(line)
            if match is not None:
                return self._note(name, match[1].strip())
        return []

    def _note(self, name: str, value: str) -> list[int]:
        if name == "blush":
            self.error = self.error or f"Blush failed: {value}"
        elif name == "error":
            if not self.error:
                self.error, self._wants_error = value, not value
        elif name == "unknown":
            self.unknown += [value] if value not in _OBEYED.union(self.unknown) else []
        elif name == "resolution_A":
            self.resolution_A = float(value)
        elif name == "step_deg":
            if self._oversampling == "0":
                self.step_deg = float(value)
        elif int(value) != self.iteration:
            self.iteration, self.left_s, self.step_deg, self.share = int(value), None, None, 0.0
            self._searching = name == "expectation"
            return [self.iteration]
        return []

    def _see_bar(self, bar: re.Match[str]) -> None:
        if not self._searching:
            return
        done, total = float(bar[1]), float(bar[2])
        self.share = min(done / total, 1.0) if total > 0 else 0.0
        self.left_s = max(total - done, 0.0) * _UNIT_S[bar[3]]
