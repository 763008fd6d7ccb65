"""A large particle set out of a small one: every row again and again, each with a name, micrograph and uid of its own.

Every repetition has a copy of the stack, since the same image in two rows is refused, whatever leads to it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from benchmarks import harness

COLUMNS = {"_rlnImageName": "image", "_rlnMicrographName": "micrograph", "_cryoisoUid": "uid"}
SEED = 17


def repeat(small: Path, times: int, folder: Path) -> Path:
    """Writes particles.star and its stacks.

    Args:
        small: folder of `cryoiso simulate`, with particles.star and particles.mrcs.
        times: how often each of its rows appears.

    Returns:
        The particle file.
    """
    (folder / "stacks").mkdir(parents=True)
    for number in range(times):
        shutil.copyfile(small / "particles.mrcs", folder / "stacks" / f"grid{number:04d}_particles.mrcs")
    head, rows = _head_and_rows(small / "particles.star")
    place = {name: _column(head, label) for label, name in COLUMNS.items()}
    rng = np.random.default_rng(SEED)
    with open(folder / "particles.star", "w") as out:
        out.writelines(head)
        for number in range(times):
            uids = rng.integers(1, 2**63, len(rows), dtype=np.int64)
            out.writelines(_row(row, number, int(uid), place) for row, uid in zip(rows, uids, strict=True))
    return folder / "particles.star"


def _head_and_rows(path: Path) -> tuple[list[str], list[list[str]]]:
    lines = path.read_text().splitlines(keepends=True)
    first = max(i for i, line in enumerate(lines) if line.startswith("_")) + 1
    return lines[:first], [line.split() for line in lines[first:] if line.strip()]


def _column(head: list[str], label: str) -> int:
    return next(int(line.split("#")[1]) - 1 for line in reversed(head) if line.split(" ")[0] == label)


def _row(row: list[str], number: int, uid: int, place: dict[str, int]) -> str:
    values = list(row)
    index = row[place["image"]].partition("@")[0]
    values[place["image"]] = f"{index}@stacks/grid{number:04d}_particles.mrcs"
    values[place["micrograph"]] = f"grid{number:04d}_{row[place['micrograph']]}"
    values[place["uid"]] = str(uid)
    return " ".join(values) + "\n"


def simulate(n: int, box: int, pixel_A: float, folder: Path) -> harness.Cost:
    """Particles of the phantom with poses and half-sets."""
    return harness.cryoiso(
        "simulate", "phantom", folder, "--n", n, "--box", box, "--pixel-size", pixel_A, "--with-poses", "--halves",
        "--snr-db", -10, log=folder.with_suffix(".log"),
    )  # fmt: skip
