"""A refinement program of a few lines, for the engine by command: it knows the true poses, and how to fail.

``python command_program.py HOW PARTICLES REFERENCE OUT_PARTICLES OUT_HALF1 OUT_HALF2 TRUTH``; its half-maps are the
reference with noise. NumPy only where it is needed, so that it starts at once.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

POSE = ("_rlnAngleRot", "_rlnAngleTilt", "_rlnAnglePsi", "_rlnOriginXAngst", "_rlnOriginYAngst")


def table(path: str) -> tuple[list[str], list[list[str]]]:
    """Labels and rows of the table of particles, the last one of the file."""
    lines = [line.split() for line in Path(path).read_text().split("data_particles")[-1].splitlines()]
    labels = [words[0] for words in lines if words and words[0].startswith("_")]
    return labels, [words for words in lines if len(words) == len(labels) and not words[0].startswith("_")]


def main(how: str, particles: str, reference: str, out: str, half1: str, half2: str, truth: str) -> None:
    print("at work", flush=True)
    if how == "sleep":
        child = subprocess.Popen(["sleep", "60"], process_group=0)
        Path("pids").write_text(f"{os.getpid()} {child.pid}")
        time.sleep(60)
    if how == "fail":
        sys.exit("the beam was off")
    labels, rows = table(particles)
    true_labels, true_rows = table(truth)
    known = {row[true_labels.index("_cryoisoUid")]: row for row in true_rows}
    labels_out = [label for label in labels if label not in POSE] + list(POSE)
    lines = ["data_particles", "loop_", *labels_out]
    for row in rows[1:] if how == "lose" else rows[::-1]:
        if how == "halves":
            row[labels.index("_rlnRandomSubset")] = "1"
        own = [value for label, value in zip(labels, row, strict=True) if label not in POSE]
        found = known.get(row[labels.index("_cryoisoUid")], ["0"] * len(true_labels))
        lines.append(" ".join([*own, *(found[true_labels.index(label)] for label in POSE)]))
    Path(out).write_text("\n".join(lines) + "\n")
    import numpy as np

    content = Path(reference).read_bytes()
    rng = np.random.default_rng(sum(map(ord, half1)))
    for path in (half1, half2):
        if path and how != "no map":
            data = np.frombuffer(content, "<f4", offset=1024)
            noise = 0 if how == "one map" else rng.normal(size=data.shape) * data.std()
            Path(path).write_bytes(content[:1024] + (data + noise).astype("<f4").tobytes())


if __name__ == "__main__":
    main(*sys.argv[1:])
