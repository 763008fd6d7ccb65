"""An atomic model against a map: its frame, map-model FSC, Q-scores by residue, and comparison with another model.

Keys of `model_numbers` (lists have one value a residue unless stated otherwise; null where a number could not be had):
    atoms, residues, outside: numbers of atoms, residues and of atoms outside the map
    placed: "as given" or "fitted"; correlation: of map and model, both at ``placed_at_A``, inside the model's mask;
    rotation, offset_A: an atom at x lies at R x + d from voxel D//2
    frequency_invA, fsc, fsc_masked: curves; resolution_05_A, resolution_05_masked_A
    sigma_A: of the Q-scores; q, q_backbone, q_side: means over the atoms (null without such atoms)
    percentiles_q: 5, 25, 50, 75, 95 of the atoms
    chains: chain -> mean Q
    table: chain, residue, name, atoms, q, q_backbone, q_side
    comparison: see `cryoiso.metrics.model_comparison.ModelComparison`; only with another model
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cryoiso.core.types import DensityMap
from cryoiso.io.atoms import Atoms, density_of
from cryoiso.metrics.fsc_curve import fsc, shell_frequencies, smooth_resolution_at
from cryoiso.metrics.mapmodel import correlation, truth_mask
from cryoiso.metrics.model_comparison import Trace, compare_models
from cryoiso.metrics.qscore import SIGMA_A, q_scores
from cryoiso.physics.filters import lowpass

if TYPE_CHECKING:
    from jaxtyping import Float

PERCENTILES = (5, 25, 50, 75, 95)
LIES_THERE = 0.4
"""Correlation of a model with its map, both low-passed; below, the model is not in the map's frame."""
FRAME_A = 8.0
"""Resolution at which that is decided (three pixels of a coarser map)."""
ALL_INSIDE = 0.99


def lies_in(
    density: DensityMap, atoms: Atoms, rotation: Float[np.ndarray, "3 3"], offset_A: Float[np.ndarray, " 3"]
) -> float:
    """Correlation of a map with a model placed in it, inside the model's mask; 0 if its atoms are not all in the box.

    Args:
        density: of a cube of D voxels. rotation, offset_A: an atom at x goes to R x + d, counted from voxel D//2.
    """
    places = atoms.positions_A @ rotation.T + offset_A
    half_A = density.box_px * density.pixel_size_A / 2
    if np.mean(np.abs(places).max(1) < half_A) < ALL_INSIDE:
        return 0.0
    resolution_A = placed_at_A(density.pixel_size_A)
    model = density_of(atoms, density.box_px, density.pixel_size_A, resolution_A, rotation, offset_A)
    smooth = lowpass(np.asarray(density.data, np.float32), density.pixel_size_A, resolution_A)
    return correlation(smooth, model.data, truth_mask(model.data, density.pixel_size_A))


def placed_at_A(pixel_size_A: float) -> float:
    """See ``FRAME_A``."""
    return max(FRAME_A, 3 * pixel_size_A)


def model_numbers(
    density: DensityMap,
    extent_px: tuple[int, int, int],
    atoms: Atoms,
    rotation: Float[np.ndarray, "3 3"],
    offset_A: Float[np.ndarray, " 3"],
    sigma_A: float = SIGMA_A,
) -> dict[str, Any]:
    """Map-model FSC and Q-scores of a model that has been placed, see the module.

    Args:
        density: of a cube. extent_px: (z, y, x) voxels of it, from the first one on, that were measured.
    """
    box_px, pixel_A = density.box_px, density.pixel_size_A
    model = density_of(atoms, box_px, pixel_A, 2 * pixel_A, rotation, offset_A)
    mask = truth_mask(model.data, pixel_A)
    curves = {"fsc": fsc(density.data, model.data), "fsc_masked": fsc(density.data, model.data, mask)}
    places = atoms.positions_A @ rotation.T + offset_A + (box_px // 2) * pixel_A
    z, y, x = extent_px
    scores = q_scores(density.data[:z, :y, :x], places, (pixel_A,) * 3, sigma_A=sigma_A)
    return {
        "atoms": len(scores),
        "residues": len(atoms.names),
        "outside": int(np.isnan(scores).sum()),
        "rotation": rotation,
        "offset_A": offset_A,
        "frequency_invA": shell_frequencies(box_px, pixel_A),
        **curves,
        "resolution_05_A": smooth_resolution_at(curves["fsc"], 0.5, box_px, pixel_A),
        "resolution_05_masked_A": smooth_resolution_at(curves["fsc_masked"], 0.5, box_px, pixel_A),
        **q_by_residue(atoms, scores, sigma_A),
    }


def q_by_residue(atoms: Atoms, scores: Float[np.ndarray, " n"], sigma_A: float) -> dict[str, Any]:
    """Means of Q over all atoms, chains and residues, main chain and side chains apart."""
    known = np.isfinite(scores)
    side = ~atoms.backbone & np.isin(np.array(atoms.kinds), ("protein", "nucleic"))[atoms.residue]
    parts = {"q": known, "q_backbone": known & atoms.backbone, "q_side": known & side}
    chains = np.array(atoms.chains)[atoms.residue]
    return {
        "sigma_A": sigma_A,
        **{name: float(scores[rows].mean()) if rows.any() else None for name, rows in parts.items()},
        "percentiles_q": dict(zip(map(str, PERCENTILES), np.percentile(scores[known], PERCENTILES), strict=True))
        if known.any()
        else {},
        "chains": {
            name: float(scores[rows].mean())
            for name in dict.fromkeys(atoms.chains)
            if (rows := known & (chains == name)).any()
        },
        "table": {
            "chain": atoms.chains, "residue": atoms.numbers, "name": atoms.names,
            "atoms": np.bincount(atoms.residue, minlength=len(atoms.names)),
            **{name: _means(scores, atoms.residue, rows, len(atoms.names)) for name, rows in parts.items()},
        },
    }  # fmt: skip


def _means(scores: np.ndarray, residue: np.ndarray, rows: np.ndarray, residues: int) -> np.ndarray:
    """Mean of each residue over some of its atoms; NaN where it has none."""
    count = np.bincount(residue[rows], minlength=residues)
    total = np.bincount(residue[rows], scores[rows], minlength=residues)
    return np.where(count > 0, np.round(total / np.maximum(count, 1), 4), np.nan)


def q_table(numbers: dict[str, Any]) -> str:
    """The table by residue as tab-separated values; nothing where a number could not be had."""
    table = numbers["table"]
    lines = ["\t".join(table)]
    for row in zip(*table.values(), strict=True):
        lines.append(
            "\t".join("" if v is None or v != v else f"{v:.4f}" if isinstance(v, float) else str(v) for v in row)
        )
    return "\n".join(lines) + "\n"


def comparison(atoms: Atoms, other: Atoms) -> dict[str, Any]:
    """RMSD and TM-like score of another model against this one.

    Raises:
        InputError: no chain of one resembles one of the other.
    """
    return compare_models(_traces(atoms), _traces(other)).as_dict()


def _traces(atoms: Atoms) -> list[Trace]:
    rows, places = atoms.residue[atoms.traced], atoms.positions_A[atoms.traced]
    of_chain: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        of_chain.setdefault(atoms.chains[row], []).append(index)
    return [
        Trace(name, "".join(atoms.letters[rows[i]] for i in index), places[index]) for name, index in of_chain.items()
    ]
