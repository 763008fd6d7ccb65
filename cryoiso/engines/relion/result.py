"""What a finished RELION run gives back: poses in the source's order, unregularised half-maps, a record."""

from __future__ import annotations

import json
import logging
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cryoiso.core import products
from cryoiso.core.errors import CryoisoError, InputError
from cryoiso.core.protocols import RefineRequest, RefineResult
from cryoiso.core.records import IterationRecord, RefineRecord
from cryoiso.core.types import HALVES, Particles
from cryoiso.engines.relion.files import complete_iterations, read_model, read_optimiser, read_sampling
from cryoiso.engines.relion.images import rows_of_names
from cryoiso.io.atomic import write_text
from cryoiso.io.mrc import read_header, read_map, write_map
from cryoiso.io.star.columns import Columns
from cryoiso.io.star.read import read_particles
from cryoiso.io.star.write import write_particles
from cryoiso.physics.so3 import angular_distance_deg
from cryoiso.physics.symmetry import point_group

logger = logging.getLogger("cryoiso")
COLUMNS = (
    "rlnLogLikeliContribution",
    "rlnMaxValueProbDistribution",
    "rlnNormCorrection",
    "rlnNrOfSignificantSamples",
    "rlnOriginZAngst",  # of subtomograms
)
WHOLE = ("rlnNrOfSignificantSamples",)


def final_files(root: Path) -> dict[str, Path]:
    """What RELION writes at the very end, without an iteration in the names."""
    halves = {f"half{half}": Path(f"{root}_half{half}_class001_unfil.mrc") for half in HALVES}
    return {"data": Path(f"{root}_data.star"), "model": Path(f"{root}_model.star"), **halves}


def is_finished(root: Path, particles: int, last_iteration: int) -> bool:
    """Whether the final files are there, whole, and newer than those of the last iteration."""
    files = final_files(root)
    try:
        for half in HALVES:
            read_header(files[f"half{half}"])
        read_model(files["model"])
        rows = len(read_particles(files["data"], require=("pose",)))
    except InputError:
        return False
    before = Path(f"{root}_it{last_iteration:03d}_optimiser.star").stat().st_mtime_ns
    return rows == particles and all(file.stat().st_mtime_ns >= before for file in files.values())


@dataclass(frozen=True)
class Found:
    """A result without what every rank has already."""

    rotation: np.ndarray
    shift_A: np.ndarray
    columns: dict[str, np.ndarray]
    half_maps: dict[int, Path]
    iterations: list[IterationRecord]
    resolution_A: float

    def of(self, particles: Particles) -> RefineResult:
        """With the particles that were refined."""
        posed = particles.with_poses(self.rotation, self.shift_A).with_results(**self.columns)
        return RefineResult(posed, self.half_maps, self.iterations, self.resolution_A)


def publish(request: RefineRequest, ledger: IterationLedger, names: list[str], program: dict[str, Any]) -> Found:
    """Reads RELION's final files and writes the engine's (rank 0).

    Args:
        names: of the images, in the order of the source.
        program: how RELION was run.

    Raises:
        CryoisoError: RELION lost particles, or changed their half-sets.
    """
    root = ledger.root
    files = final_files(root)
    rotation, shift_A, columns = _refined(request.source.particles, files["data"], names)
    particles = request.source.particles.with_poses(rotation, shift_A).with_results(**columns)
    ledger.note_iterations(max(complete_iterations(root, len(names)), default=0))
    records = ledger.records()
    maps = {half: request.folder / products.half_map(half) for half in HALVES}
    pixel = request.reference.pixel_size_A
    for half, path in maps.items():
        write_map(path, read_map(files[f"half{half}"], pixel).data, pixel)
    write_particles(request.folder / products.PARTICLES, particles)
    resolution = read_model(files["model"])["resolution_A"]
    summary: RefineRecord = {
        "engine": "relion",
        "relion": program,
        "symmetry": request.symmetry,
        "diameter_A": request.diameter_A,
        "resolution_A": resolution,
        "particles": len(particles),
        "iterations": records,
    }
    if request.local_deg is not None:
        summary["local_deg"], summary["moved"] = request.local_deg, _moved(request, particles)
    if request.correction is not None:
        summary["correction"] = request.correction.facts()
    write_text(request.folder / products.facts("refine"), json.dumps(summary, indent=1) + "\n")
    _tidy_up(root, records[-1]["iteration"] if records else 0)
    return Found(rotation, shift_A, columns, maps, records, resolution)


def _refined(
    particles: Particles, data: Path, names: list[str]
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Rotations, shifts and result columns in the order of the source."""
    refined = read_particles(data, require=("pose",))
    table = Columns(refined.table, data)
    rows = rows_of_names(table.text("rlnImageName"), names, data)
    if refined.half is None or (refined.half[rows] != particles.half).any():
        raise CryoisoError(f"{data}: RELION changed the half-sets", code="relion-particles-lost")
    rotation, shift_A = refined.require_poses(data)
    columns = {name: table.number(name)[rows] for name in COLUMNS if table.has(name)}
    columns |= {name: columns[name].astype(np.int64) for name in WHOLE if name in columns}
    return rotation[rows], shift_A[rows], columns


class IterationLedger:
    """Records of the iterations, kept in a file as they come: RELION's own files of early iterations do not stay."""

    def __init__(self, root: Path, first: int = 1) -> None:
        """
        Args:
            root: RELION's output name.
            first: number of the first iteration.
        """
        self.root, self._first = root, first
        self._file = root.parent / "records.json"
        self._records: dict[int, IterationRecord] = {}
        if self._file.exists():
            saved = json.loads(self._file.read_text(encoding="utf-8"))
            self._records = {int(iteration): record for iteration, record in saved.items()}

    def note_callback(self, iteration: int, facts: dict[str, Any]) -> None:
        """What was done in a callback; the rest of the iteration is not known yet."""
        self._records[iteration] = {"iteration": iteration, "correction": facts}
        self._save()

    def note_iterations(self, last: int) -> IterationRecord | None:
        """Adds what RELION's files say of the iterations up to ``last``, as far as they are there; returns the last."""
        for iteration in range(self._first, last + 1):
            known: IterationRecord = self._records.get(iteration, {})
            if "resolution_A" not in known:
                with suppress(InputError):
                    self._records[iteration] = {**_record(self.root, iteration), **known}
        self._save()
        return self._records.get(last)

    def without_callback(self, last: int) -> list[int]:
        """Iterations up to ``last`` in which RELION did not call for its references."""
        return [k for k in range(self._first, last + 1) if "correction" not in self._records.get(k, {})]

    def forget_after(self, iteration: int) -> None:
        """Drops what came after; it is done again."""
        self._records = {k: v for k, v in self._records.items() if k <= iteration}
        self._save()

    def records(self) -> list[IterationRecord]:
        """Of the iterations that RELION finished, in their order."""
        return [record for _, record in sorted(self._records.items()) if "resolution_A" in record]

    def _save(self) -> None:
        text = json.dumps({str(k): v for k, v in sorted(self._records.items())}, indent=1)
        write_text(self._file, text + "\n")


def _record(root: Path, iteration: int) -> IterationRecord:
    stem = f"{root}_it{iteration:03d}"
    model, optimiser = read_model(Path(f"{stem}_half1_model.star")), read_optimiser(Path(f"{stem}_optimiser.star"))
    return {
        "iteration": iteration,
        "resolution_A": model["resolution_A"],
        "step_deg": read_sampling(Path(f"{stem}_sampling.star")).step_deg,
        "changes_deg": optimiser["change_deg"],
        "max_probability_mean": model["max_probability_mean"],
        "log_likelihood": model["log_likelihood"],
    }


def remove_early_iterations(root: Path, before: int) -> None:
    """Frees the disk of iterations that nobody can need; the first references (iteration 0) stay."""
    for file in root.parent.glob(f"{root.name}_it*"):
        match = re.match(r"_it(\d{3,})_", file.name[len(root.name) :])
        if match and 0 < int(match[1]) < before:
            file.unlink(missing_ok=True)


def _tidy_up(root: Path, last: int) -> None:
    """What can be made again goes: exported images, and the files of all iterations but the first and the last."""
    shutil.rmtree(root.parent / "images", ignore_errors=True)
    remove_early_iterations(root, last)
    for file in root.parent.glob(f"{root.name}*.bild"):
        file.unlink()


def _moved(request: RefineRequest, particles: Particles) -> dict[str, float]:
    """How far a local search went from the poses it began with: RELION limits every iteration, not their sum."""
    before, after = request.source.particles.require_poses()[0], particles.require_poses()[0]
    moved = angular_distance_deg(before, after, point_group(request.symmetry))
    return {"median_deg": float(np.median(moved)), "largest_deg": float(moved.max())}
