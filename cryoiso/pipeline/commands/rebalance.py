"""The command ``rebalance`` on plain files."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cryoiso.core.errors import UsageError
from cryoiso.core.types import Particles
from cryoiso.io import read_particle_file
from cryoiso.io.atomic import make_folder, write_json
from cryoiso.io.rows import column_of, write_rows

logger = logging.getLogger("cryoiso")

RANDOM, AUTO = "random", "auto"
KNOWN_QUALITY = {
    "rlnMaxValueProbDistribution": "higher",
    "rlnLogLikeliContribution": "higher",
    "cryoisoPoseEntropy": "lower",
}
"""Columns that are looked for, in this order, and which values of them are better."""
KEPT, DISCARDED, FACTS = "particles_kept", "particles_discarded", "rebalance.json"


@dataclass(frozen=True)
class QualityChoice:
    """What particles are ranked by."""

    column: str = AUTO
    """A STAR column, a field of a .cs file, "auto" (the first of `KNOWN_QUALITY` that is there) or "random"."""
    better: Literal["higher", "lower"] | None = None
    """Which values are better; None: as `KNOWN_QUALITY` says."""


def rebalance_files(
    file: Path, out: Path, symmetry: str, choice: QualityChoice, *, cap: int | None, keep: float | None,
    cone_deg: float, seed: int, passthrough: Sequence[str] = (),
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:  # fmt: skip
    """Writes particles_kept and particles_discarded, of the kind of ``file``, and rebalance.json into a folder.

    Returns:
        The facts of rebalance.json; and the distributions of views ``before`` and ``after``, each with ``counts`` and
        ``cells_per_ring``.

    Raises:
        UsageError: both or neither of ``cap`` and ``keep``; no known quality, or none that says which values are
            better; the input is one of the files to write.
        InputError: unreadable particles, no poses, or no such column.
    """
    from cryoiso.methods.rebalance import facts, rebalance

    if (cap is None) == (keep is None):
        raise UsageError(
            "one of --cap and --keep is needed: most particles of a cone, or the fraction to keep",
            code="option-missing",
        )
    suffix = file.suffix.lower()
    targets = [out / f"{name}{suffix}" for name in (KEPT, DISCARDED)]
    if file.resolve() in [target.resolve() for target in targets]:
        raise UsageError(f"--out {out}: would overwrite the particles that are read, {file}", code="file-exists")
    particles = read_particle_file(file, "", ("pose",), passthrough, symmetry)
    column, sign, quality = _quality(file, particles, choice, passthrough)
    score = None if quality is None else sign * quality
    chosen = rebalance(
        particles, symmetry, cap=cap, keep=keep, quality=score, cone_deg=cone_deg, seed=seed
    )  # fmt: skip
    numbers = {
        "schema": 1, "input": str(file), "keep_asked": keep, "cone_deg": cone_deg, "seed": seed,
        "quality": column, "better": None if quality is None else "higher" if sign > 0 else "lower",
        **facts(chosen, particles, quality),
    }  # fmt: skip
    make_folder(out)
    for target, rows in zip(targets, (chosen.keep, ~chosen.keep), strict=True):
        target.unlink(missing_ok=True)
        if rows.any():
            write_rows(file, target, rows)
    write_json(out / FACTS, numbers)
    return numbers, _views(particles, chosen.keep, symmetry)


def _quality(
    file: Path, particles: Particles, choice: QualityChoice, passthrough: Sequence[str]
) -> tuple[str, int, np.ndarray | None]:
    """Name, sign (1: higher is better) and values (n,) of the column to rank by; no values: at random."""
    column = choice.column.removeprefix("_")
    if column == RANDOM:
        return RANDOM, 1, None
    if column == AUTO:
        there = () if particles.table is None else tuple(str(c) for c in particles.table.columns)
        column = next((name for name in KNOWN_QUALITY if name in there), "")
        if not column:
            raise UsageError(
                f"{file} has none of {', '.join(KNOWN_QUALITY)}. Name a column that says how good a particle is "
                "(--quality COLUMN --better higher or lower), or draw at random (--quality random)",
                code="option-missing",
            )
        logger.info("particles are ranked by %s", column)
    better = choice.better or KNOWN_QUALITY.get(column)
    if better is None:
        raise UsageError(
            f"--quality {column}: say which values are better (--better higher or lower)", code="option-missing"
        )
    return column, 1 if better == "higher" else -1, column_of(file, particles, column, passthrough)


def _views(particles: Particles, keep: np.ndarray, symmetry: str) -> dict[str, dict[str, Any]]:
    """Both distributions on the cells that the smaller set fills."""
    from cryoiso.metrics.orientation import view_distribution

    rotation, _ = particles.require_poses()
    after = view_distribution(rotation[keep], symmetry)
    step_deg = 180 / len(after.grid.cells)
    before = view_distribution(rotation, symmetry, step_deg=step_deg)
    return {
        name: {"counts": part.counts, "cells_per_ring": part.grid.cells.tolist()}
        for name, part in (("before", before), ("after", after))
    }
