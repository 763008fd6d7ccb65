"""The command line of a program: what is put in place of its placeholders. Pure: nothing is started here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryoiso.core.commands import fill_words, split_command
from cryoiso.core.config import CommandSection
from cryoiso.core.errors import UsageError
from cryoiso.core.protocols import RefineRequest

KEY = "command.run"
PARTICLES, CS, STACK = "particles_in.star", "particles_in.cs", "particles_in.mrcs"
CISTEM, PAR = "particles_in.cistem.star", "particles_in.par"
REFERENCE, UNFILTERED, MASK = "reference_in.mrc", "reference_unfiltered.mrc", "mask_in.mrc"
ONE_STACK = ("stack", "cistem", "par")
"""Placeholders of programs that read one stack in the order of their table."""


def reference_of(half: int) -> str:
    """Reference of a half-set."""
    return f"reference{half}_in.mrc"


@dataclass(frozen=True)
class Template:
    """What a command line asks for."""

    names: frozenset[str]
    """Placeholders in it."""

    @property
    def per_half(self) -> bool:
        """Whether it runs once for each half-set."""
        return "half" in self.names

    @property
    def one_stack(self) -> bool:
        return any(name in self.names for name in ONE_STACK)

    @property
    def keeps_halves_apart(self) -> bool:
        """Whether each half-set may have a reference of its own."""
        return self.per_half or {"reference1", "reference2"} <= self.names


def template_of(section: CommandSection) -> Template:
    """
    Raises:
        UsageError: no command, an unknown placeholder, or a name of half-maps that is the same for both.
    """
    words = split_command(section.run, KEY)
    if not words:
        raise UsageError(
            "refine.engine = 'command' needs a command line: command.run = 'my_refine {particles} ...'",
            code="option-missing",
        )
    marks = {name: f"\0{name}\0" for name in _names()}
    filled = fill_words([*words, *split_command(section.go_on, "command.go_on")], marks, KEY)
    placeholders = frozenset(name for name, mark in marks.items() if any(mark in word for word in filled))
    inputs = placeholders & {"particles", "cs", *ONE_STACK}
    if not inputs or not placeholders & {"reference", "unfiltered", "reference1", "reference2"}:
        missing = "{reference}" if inputs else "{particles} (or {cs}, {cistem}, {par})"
        raise UsageError(f"{KEY}: {missing} is missing", code="placeholder-missing")
    if section.out_half and fill_words([section.out_half], {"half": 1}, "command.out_half") == [section.out_half]:
        raise UsageError("command.out_half: needs {half}, 1 or 2", code="placeholder-missing")
    return Template(placeholders)


def require_reference_per_half(template: Template, why: str) -> None:
    """
    Raises:
        UsageError: both half-sets would get one reference where each has its own.
    """
    if not template.keeps_halves_apart:
        raise UsageError(
            f"{KEY}: {why}, so each half-set has a reference of its own: use {{reference1}} and {{reference2}}, or "
            "{half}, with which the command runs once per half-set",
            code="placeholder-missing",
        )


def words_of(
    line: str, section: CommandSection, request: RefineRequest, folder: Path, *, round_: int, half: int,
    resolution_A: float,
) -> list[str]:  # fmt: skip
    """The words of a command.

    Args:
        line: ``section.run`` or ``section.go_on``.
        folder: where it runs and its files lie.
        half: that it is for; 0: both.
        resolution_A: up to which its reference is reliable.

    Raises:
        UsageError: {mask} without a mask.
    """
    words = split_command(line, KEY)
    values = _values(section, request, folder, round_, half, resolution_A)
    if request.mask is None and any("{mask" in word for word in words):
        raise UsageError(f"{KEY}: {{mask}}, and the job has no mask (sample.mask)", code="placeholder-missing")
    return fill_words(words, values, KEY)


def _names() -> tuple[str, ...]:
    return (
        "particles", "cs", "cistem", "par", "stack", "reference", "unfiltered", "reference1", "reference2", "mask",
        "symmetry", "diameter", "radius", "pixel_size", "box", "count", "resolution", "seed", "round", "half",
        "local_deg", "iterations", "folder", "out_particles", "out_half1", "out_half2", "out_half",
    )  # fmt: skip


def _values(
    section: CommandSection, request: RefineRequest, folder: Path, round_: int, half: int, resolution_A: float
) -> dict[str, Any]:
    source, pixel = request.source, request.reference.pixel_size_A
    diameter = request.diameter_A or 0.9 * source.box_px * pixel
    own = source.particles.half
    count = len(source.particles) if not half or own is None else int((own == half).sum())
    outs = {k: folder / out_half(section, k) if section.out_half else "" for k in (1, 2)}
    return {
        "particles": folder / PARTICLES, "cs": folder / CS, "cistem": folder / CISTEM, "par": folder / PAR,
        "stack": folder / STACK,
        "reference": folder / REFERENCE, "unfiltered": folder / UNFILTERED,
        "reference1": folder / reference_of(1), "reference2": folder / reference_of(2), "mask": folder / MASK,
        "symmetry": request.symmetry, "diameter": f"{diameter:g}", "radius": f"{diameter / 2:g}",
        "pixel_size": f"{pixel:.6g}", "box": source.box_px, "count": count, "resolution": f"{resolution_A:.4g}",
        "seed": request.seed, "round": round_, "half": half, "local_deg": f"{request.local_deg or 0:g}",
        "iterations": request.settings.max_iterations, "folder": folder,
        "out_particles": folder / section.out_particles, "out_half1": outs[1], "out_half2": outs[2],
        "out_half": outs.get(half, ""),
    }  # fmt: skip


def out_half(section: CommandSection, half: int) -> str:
    """Name of the half-map that the program writes."""
    return fill_words([section.out_half], {"half": half}, "command.out_half")[0]
