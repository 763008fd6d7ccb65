"""RELION's files by name and by content: which iteration and half a file is of, and the few values that are needed.

Nothing is found by position: names are matched from their end, tables are read by block and column name. That covers
``run_it003_half1_class001``, ``run_ct12_it013_...`` (continued runs), iterations above 99 and 999, and the last
reconstruction of both halves, which is ``run_it008_class001`` or ``run_class001``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.types import HALVES
from cryoiso.io.star.text import StarBlock, read_blocks

SUFFIX = "_external_reconstruct"
_STEM = re.compile(
    r"(?P<root>.+?)(?:_it(?P<iteration>\d{3,}))?(?:_half(?P<half>[12]))?(?:_class(?P<kind>\d{3,}))?$", re.DOTALL
)


@dataclass(frozen=True)
class Name:
    """What the name of one of RELION's outputs says."""

    root: str
    """The run's output name with its folder, e.g. "Refine3D/job007/run" or ".../run_ct12"."""
    iteration: int | None
    """None: it has none in its name."""
    half: int | None
    """None: of both halves."""
    class_: int | None

    def of(self, iteration: int, suffix: str) -> Path:
        """Another file of the same run, e.g. ``name.of(3, "sampling.star")``."""
        return Path(f"{self.root}_it{iteration:03d}_{suffix}")


def parse_name(path: object) -> Name:
    """Takes an output's name apart; its suffix and ``_external_reconstruct`` are left out.

    >>> parse_name("a/run_ct12_it013_half2_class001_external_reconstruct.star")
    Name(root='a/run_ct12', iteration=13, half=2, class_=1)
    >>> parse_name("run_class001.mrc")
    Name(root='run', iteration=None, half=None, class_=1)
    """
    file = Path(str(path))
    match = _STEM.match(re.sub(r"\.(star|mrc)$", "", file.name).removesuffix(SUFFIX))
    if match is None:
        raise InputError("not the name of a RELION output file", file=path, code="relion-file-invalid")
    parts = match.groupdict()
    root = str(file.with_name(parts["root"]))
    number = {key: None if parts[key] is None else int(parts[key]) for key in ("iteration", "half", "kind")}
    return Name(root, number["iteration"], number["half"], number["kind"])


def run_with_iteration(name: Name, iteration: int) -> Name | None:
    """The run that wrote an iteration, seen from one that may continue it; None if its files are not there.

    ``--continue`` counts on under the name that ``--o`` gives, so run_ct12_it013 follows run_it012. Looked for are the
    run's own name, its name without _ctN, and another run in the folder if there is one only with that iteration.
    """
    roots = [name.root]
    while (shorter := re.sub(r"_ct\d+$", "", roots[-1])) != roots[-1]:
        roots.append(shorter)
    for root in roots:
        if any(Path(f"{root}_it{iteration:03d}_{part}").exists() for part in ("optimiser.star", "sampling.star")):
            return replace(name, root=root)
    optimisers = list(Path(name.root).parent.glob(f"*_it{iteration:03d}_optimiser.star"))
    if len(optimisers) != 1:
        return None
    return replace(name, root=parse_name(str(optimisers[0]).removesuffix("_optimiser.star")).root)


@dataclass(frozen=True)
class Star:
    """A STAR file by block and column name."""

    path: Path
    blocks: dict[str, StarBlock]

    @classmethod
    def read(cls, path: object) -> Star:
        """
        Raises:
            InputError: not there, or no STAR file.
        """
        return cls(Path(str(path)), {block.name: block for block in read_blocks(path)})

    def has(self, block: str, name: str) -> bool:
        return block in self.blocks and name in self.blocks[block].columns

    def column(self, block: str, name: str) -> list[str]:
        """The values of a column as text.

        Raises:
            InputError: no such block or column.
        """
        if not self.has(block, name):
            known = ", ".join(f"data_{b}" for b in self.blocks)
            raise InputError(
                "a value that RELION writes is missing", file=self.path, expected=f"_{name} in data_{block}",
                found=known if block not in self.blocks else f"no such column in data_{block}",
                code="relion-file-invalid",
            )  # fmt: skip
        values: list[str] = self.blocks[block].columns[name]
        return values

    def text(self, block: str, name: str) -> str:
        """The first value of a column, that of a list."""
        values = self.column(block, name)
        if not values:
            raise InputError(f"data_{block} is empty", file=self.path, code="relion-file-invalid")
        return values[0]

    def number(self, block: str, name: str) -> float:
        self.text(block, name)
        return float(self.numbers(block, name)[0])

    def integer(self, block: str, name: str, low: int, high: int) -> int:
        """The first value of a column, a whole number between two limits.

        Raises:
            InputError: no such block or column, or another value.
        """
        value = self.number(block, name)
        if not (low <= value <= high and value == round(value)):
            problem = f"impossible value of _{name}"
            raise InputError(
                problem,
                file=self.path,
                expected=f"an integer from {low} to {high}",
                found=f"{value:g}",
                code="relion-file-invalid",
            )
        return int(value)

    def numbers(self, block: str, name: str) -> np.ndarray:
        """A column as (n,) float64.

        Raises:
            InputError: no such block or column, or a value that is no number.
        """
        values = self.column(block, name)
        try:
            return np.array(values, dtype=str).astype(np.float64)
        except ValueError:
            raise InputError(
                f"_{name} has a value that is not a number",
                file=self.path,
                found=values[:5],
                code="relion-file-invalid",
            ) from None


@dataclass(frozen=True)
class AngularSampling:
    """Angles of one iteration, before oversampling."""

    healpix_order: int
    symmetry: str

    @property
    def step_deg(self) -> float:
        """Order 3 is 7.5 degrees."""
        return 60.0 / 2.0**self.healpix_order


def read_sampling(path: Path) -> AngularSampling:
    """``..._sampling.star``."""
    star = Star.read(path)
    order = int(star.number("sampling_general", "rlnHealpixOrder"))
    return AngularSampling(order, star.text("sampling_general", "rlnSymmetryGroup"))


def read_model(path: Path) -> dict[str, Any]:
    """What is used of ``..._model.star``: resolution_A, pixel_size_A, data_dimensions, and fsc (D//2+1,)."""
    star = Star.read(path)
    general = "model_general"
    dimensions = "rlnDataDimensionality"
    return {
        "resolution_A": star.number(general, "rlnCurrentResolution"),
        "pixel_size_A": star.number(general, "rlnPixelSize"),
        "data_dimensions": int(star.number(general, dimensions)) if star.has(general, dimensions) else 2,
        "max_probability_mean": star.number(general, "rlnAveragePmax"),
        "log_likelihood": star.number(general, "rlnLogLikelihood"),
        "fsc": star.numbers("model_class_1", "rlnGoldStandardFsc"),
    }


def read_optimiser(path: Path) -> dict[str, Any]:
    """What is used of ``..._optimiser.star``: iteration, mask (a path or ""), diameter_A, changes, version (text)."""
    star = Star.read(path)
    general = "optimiser_general"
    mask = star.text(general, "rlnSolventMaskName") if star.has(general, "rlnSolventMaskName") else "None"
    return {
        "iteration": int(star.number(general, "rlnCurrentIteration")),
        "mask": "" if mask == "None" else mask,
        "diameter_A": star.number(general, "rlnParticleDiameter"),
        "change_deg": star.number(general, "rlnChangesOptimalOrientations"),
        "change_A": star.number(general, "rlnChangesOptimalOffsets"),
        "accuracy_deg": star.number(general, "rlnOverallAccuracyRotations"),
        "version": version_of(path),
    }


def version_of(optimiser: Path) -> str:
    """RELION's version from the first comment of an optimiser file ("# RELION optimiser; version 3.1.3"); "" if it is
    not there."""
    try:
        with open(optimiser, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                match = re.match(r"#\s*RELION optimiser; version\s+(\S+)", line)
                if match:
                    return match[1]
                if line.startswith("data_"):
                    break
    except OSError:
        pass
    return ""


PARTS = (
    "optimiser.star",
    "sampling.star",
    "data.star",
    *(f"half{half}_{what}" for half in HALVES for what in ("model.star", "class001.mrc")),
)
"""The files from which RELION continues after an iteration."""


def complete_iterations(root: Path, particles: int) -> list[int]:
    """Iterations whose files are all there and whole, ascending.

    Args:
        root: the run's output name.
        particles: rows that its data files must have.
    """
    iterations = []
    for file in root.parent.glob(f"{root.name}_it*_optimiser.star"):
        iteration = parse_name(file.with_name(file.name.removesuffix("_optimiser.star"))).iteration
        if iteration is not None and _is_complete(root, iteration, particles):
            iterations.append(iteration)
    return sorted(iterations)


def _is_complete(root: Path, iteration: int, particles: int) -> bool:
    from cryoiso.io.mrc import read_header

    files = {part: Path(f"{root}_it{iteration:03d}_{part}") for part in PARTS}
    try:
        for part, file in files.items():
            if part.endswith(".mrc"):
                read_header(file)
        for half in HALVES:
            read_model(files[f"half{half}_model.star"])
        read_sampling(files["sampling.star"])
        rows = len(Star.read(files["data.star"]).column("particles", "rlnImageName"))
        return read_optimiser(files["optimiser.star"])["iteration"] == iteration and rows == particles
    except InputError:
        return False


def remove_iterations_after(root: Path, iteration: int) -> None:
    """Forgets everything after an iteration, so that nothing of an interrupted one can be taken for a result."""
    for file in root.parent.glob(f"{root.name}*"):
        stem = file.name.removesuffix(file.suffix)
        match = re.search(r"_it(\d{3,})(?:_|$)", stem[len(root.name) :])
        if file.is_file() and (match is None or int(match[1]) > iteration):
            file.unlink()
