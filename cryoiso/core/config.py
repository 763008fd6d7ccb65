"""The job file's schema. Every key has a default but the particles and the reference; an unknown key is an error."""

from __future__ import annotations

import difflib
import json
import reprlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, ValidationError

from cryoiso.core.commands import COMMANDS, split_command
from cryoiso.core.errors import UsageError
from cryoiso.core.sections.audit import AuditSection
from cryoiso.core.sections.base import Section, choices_of, meaning_of, unit_and_limits
from cryoiso.core.sections.data import ParticlesSection, ReferenceSection, SampleSection, TruthSection
from cryoiso.core.sections.methods import (
    AuxiliarySection,
    ClassifySection,
    CorrectSection,
    DiagnoseSection,
    MicelleSection,
    RealignSection,
)
from cryoiso.core.sections.refinement import (
    CommandSection,
    CryosparcSection,
    ReconstructSection,
    RefineSection,
    RelionSection,
)
from cryoiso.core.sections.running import LaunchSection, RunSection

__all__ = [
    "AuditSection", "AuxiliarySection", "ClassifySection", "CommandSection", "CorrectSection", "CryosparcSection",
    "DiagnoseSection", "Job", "LaunchSection", "MicelleSection", "ParticlesSection", "RealignSection",
    "ReconstructSection", "ReferenceSection", "RefineSection", "RelionSection", "RunSection", "SampleSection",
    "TruthSection", "job_to_toml", "parse_job",
]  # fmt: skip


class Job(Section):
    """A whole job file."""

    particles: ParticlesSection
    reference: ReferenceSection
    sample: SampleSection = Field(default_factory=SampleSection)
    refine: RefineSection = Field(default_factory=RefineSection)
    reconstruct: ReconstructSection = Field(default_factory=ReconstructSection)
    auxiliary: AuxiliarySection = Field(default_factory=AuxiliarySection)
    micelle: MicelleSection = Field(default_factory=MicelleSection)
    classify: ClassifySection = Field(default_factory=ClassifySection)
    correct: CorrectSection = Field(default_factory=CorrectSection)
    realign: RealignSection = Field(default_factory=RealignSection)
    relion: RelionSection = Field(default_factory=RelionSection)
    command: CommandSection = Field(default_factory=CommandSection)
    cryosparc: CryosparcSection = Field(default_factory=CryosparcSection)
    diagnose: DiagnoseSection = Field(default_factory=DiagnoseSection)
    truth: TruthSection = Field(default_factory=TruthSection)
    audit: AuditSection = Field(default_factory=AuditSection)
    run: RunSection = Field(default_factory=RunSection)
    launch: LaunchSection = Field(default_factory=LaunchSection)


MOST_EXPLAINED = 6
"""Mistakes of a job file that are told at once; a lost section head makes one of every key."""


_CODES = {"extra_forbidden": "job-unknown-key", "missing": "job-key-missing"}
"""pydantic's kind of mistake -> code; the code of a job file is that of its first mistake"""


def parse_job(data: dict[str, Any], file: object = "job.toml", options: Mapping[str, str] | None = None) -> Job:
    """Checks a decoded job file, or the options of a command.

    Args:
        options: SECTION.KEY -> name of the option that set it, for messages.

    Raises:
        UsageError: names every bad key with what was expected, what was found and the nearest known key.
    """
    try:
        job = Job.model_validate(data)
    except ValidationError as error:
        raise _refused(error, file, options or {}) from None
    for section, key in COMMANDS:
        split_command(getattr(getattr(job, section), key), f"{file}: '{section}.{key}'")
    return job


def _refused(error: ValidationError, file: object, options: Mapping[str, str]) -> UsageError:
    """What to raise for the mistakes that pydantic found in a job file."""
    wrong: list[Any] = list(error.errors())
    text = "; ".join(_explain(file, e, options) for e in wrong[:MOST_EXPLAINED])
    more = len(wrong) - MOST_EXPLAINED
    return UsageError(
        text + (f"; and {more} more" if more > 0 else ""), code=_CODES.get(wrong[0]["type"], "job-bad-value")
    )


def _explain(file: object, e: Any, options: Mapping[str, str]) -> str:
    where = ".".join(str(part) for part in e["loc"])
    if where in options:
        return f"{options[where]}: {e['msg']} (found {reprlib.repr(e.get('input'))})"
    if e["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(e["loc"][-1]), _known_keys(e["loc"][:-1]), n=1)
        known = ", ".join(_known_keys(e["loc"][:-1]))
        return f"{file}: unknown key '{where}'" + (
            f", did you mean '{near[0]}'?" if near else f" (known here: {known})"
        )
    if e["type"] == "missing":
        return f"{file}: '{where}' is missing"
    return f"{file}: '{where}': {e['msg']} (found {reprlib.repr(e.get('input'))})"


def _known_keys(path: tuple[str, ...]) -> list[str]:
    model: Any = Job
    for part in path:
        model = model.model_fields[part].annotation
    return list(model.model_fields)


NO_BREAK = "\xa0"


def job_to_toml(job: Job, notes: Mapping[str, Sequence[str]] | None = None) -> str:
    """The job with every default written out, and the meaning, unit, range and choices of every key as a comment.

    Args:
        notes: SECTION.KEY -> further comments above that key, each of them begins on a new line.
    """
    lines: list[str] = []
    for name in Job.model_fields:
        section = getattr(job, name)
        lines.append(f"[{name}]")
        for key in type(section).model_fields:
            value = getattr(section, key)
            lines += _comment(type(section), key)
            for note in (notes or {}).get(f"{name}.{key}", ()):
                lines += textwrap.wrap(
                    note, 100, initial_indent="# -> ", subsequent_indent="#    ", break_long_words=False,
                    break_on_hyphens=False,
                )  # fmt: skip
            lines.append(f"{key} = {_toml(value)}" if value is not None else f"# {key} =")
        lines.append("")
    return "\n".join(lines)


def _comment(section: type[Section], key: str) -> list[str]:
    """Lines of a comment: meaning of a key and, unbroken in square brackets, its choices or its unit and range."""
    notes = " | ".join(choices_of(section, key)) or unit_and_limits(section, key)
    text = meaning_of(section, key) + (f" [{notes}]".replace(" ", NO_BREAK).replace(NO_BREAK, " ", 1) if notes else "")
    lines = textwrap.wrap(
        text, 100, initial_indent="# ", subsequent_indent="#   ", break_long_words=False, break_on_hyphens=False
    )
    return [line.replace(NO_BREAK, " ") for line in lines]


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(key)} = {_toml(v)}" for key, v in value.items()) + "}"
    return repr(value)
