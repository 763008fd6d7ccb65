"""The networks that a correction leaves from iteration to iteration: network-NNN-LABEL.npz in one folder.

Checkpoints of an engine keep one generation more than the newest, and what a resumed iteration starts from must still
be there: so the networks of the last three iterations stay.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from cryoiso.io.atomic import fsync_dir

GENERATIONS = 3
_NAME = re.compile(r"network-(\d{3,})-(\w+)\.npz")


def found(folder: Path) -> dict[int, dict[str, Path]]:
    """Iteration -> label -> file, in order of the iterations."""
    result: dict[int, dict[str, Path]] = {}
    for path in sorted(folder.glob("network-*.npz")):
        if name := _NAME.fullmatch(path.name):
            result.setdefault(int(name[1]), {})[name[2]] = path
    return dict(sorted(result.items()))


def before(folder: Path, iteration: int, first: bool = False) -> dict[str, Path] | None:
    """The networks that an iteration begins with: the newest of an earlier one, or the oldest; None: there are none.

    Those of the iteration itself or of later ones, left by an attempt that was interrupted, do not count.
    """
    earlier = [files for number, files in found(folder).items() if number < iteration]
    return (earlier[0] if first else earlier[-1]) if earlier else None


def keep(folder: Path, iteration: int, network_files: dict[str, Path]) -> list[str]:
    """Files an iteration's networks, forgets those that no resumption can need, and returns the new names."""
    names = []
    for label, path in sorted(network_files.items()):
        names.append(f"network-{iteration:03d}-{label}.npz")
        os.replace(path, folder / names[-1])
    known = found(folder)
    stay = [number for number in known if number <= iteration][-GENERATIONS:]
    for number, files in known.items():
        if number not in stay:
            for path in files.values():
                path.unlink()
    fsync_dir(folder)
    return names
