"""Command-line options that are keys of the job file: one help text and one default for both."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from pydantic import BaseModel

from cryoiso.core.config import Job, RelionSection, parse_job
from cryoiso.core.errors import UsageError

UNITS = {"_A": " In Å.", "_deg": " In degrees.", "_mib": " In MiB."}


def option(section: type[BaseModel], key: str, *names: str, metavar: str | None = None) -> Any:
    """A typer option with the help text of a key of the job file, and its unit."""
    unit = next((unit for suffix, unit in UNITS.items() if key.endswith(suffix)), "")
    return typer.Option(*names, metavar=metavar, help=_sentence(str(section.model_fields[key].description)) + unit)


def default(section: type[BaseModel], key: str) -> Any:
    """The default of a key of the job file."""
    return section.model_fields[key].default


def job_of(**sections: dict[str, Any]) -> Job:
    """A job from options, checked like a job file; options that were not given (None) keep their defaults.

    Raises:
        UsageError: a bad value.
    """
    data = {name: {k: v for k, v in keys.items() if v is not None} for name, keys in sections.items()}
    return parse_job(data, "options")


RelionKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--relion", metavar="KEY=VALUE",
        help=f"For --engine relion: a key of the job file's [relion] ({', '.join(RelionSection.model_fields)}), for "
        "example --relion ranks=5 --relion 'extra=--gpu 0'. May be given several times.",
    ),
]  # fmt: skip


RefineKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--refine", metavar="KEY=VALUE",
        help="Any other key of the job file's [refine], for example --refine view_density=false. May be given several "
        "times.",
    ),
]  # fmt: skip


def keys_of(given: list[str] | None, name: str) -> dict[str, Any]:
    """Keys and values of an option KEY=VALUE that may be given several times.

    Raises:
        UsageError: an entry without "=".
    """
    for entry in given or []:
        if "=" not in entry:
            raise UsageError(f"{name}: KEY=VALUE is expected (found '{entry}')", code="option-malformed")
    return {key.strip(): value.strip() for key, _, value in (entry.partition("=") for entry in given or [])}


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")
