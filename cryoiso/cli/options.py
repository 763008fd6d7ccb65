"""Command-line options made from the keys of the job file: name, type, default, help, unit, range and choices."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer

from cryoiso.core.config import Job, parse_job
from cryoiso.core.errors import UsageError
from cryoiso.core.sections.base import NUMBER_OR_WORD, choices_of, meaning_of, unit_and_limits

F = TypeVar("F", bound=Callable[..., Any])
SUFFIXES = ("_A", "_deg", "_px")
"""Units that stand in a key but not in its option: shift_range_A is --shift-range."""


@dataclass(frozen=True)
class Keys:
    """Keys of one section of the job file that are options of a command, under one heading of its help."""

    section: str
    panel: str
    names: dict[str, tuple[str, ...]]
    """key -> option declarations, e.g. ``("--queue", "--partition")``"""
    open: bool = False
    """None where an option is not given, instead of the default: the value may stand in a job file."""

    def parameters(self) -> Iterator[tuple[str, inspect.Parameter]]:
        """Every key with its option, as a parameter of a typer command."""
        for key, names in self.names.items():
            annotation, value = _typed(self.section, key)
            if self.open:
                annotation, value = annotation | None, None
            yield key, inspect.Parameter(
                _parameter_name(names), inspect.Parameter.KEYWORD_ONLY, default=value,
                annotation=Annotated[annotation, option(self.section, key, *names, panel=self.panel)],
            )  # fmt: skip


def keys(section: str, panel: str, *entries: str | tuple[str, ...], open: bool = False) -> Keys:
    """A group of options.

    Args:
        section: of the job file.
        panel: heading in the help.
        entries: a key, whose option follows from its name, or (key, option declarations ...).
        open: see :class:`Keys`.
    """
    names = {}
    for entry in entries:
        key, *declared = (entry,) if isinstance(entry, str) else entry
        names[key] = tuple(declared) or (_option_name(section, key),)
    return Keys(section, panel, names, open)


def option(section: str, key: str, *names: str, panel: str | None = None, default: str = "") -> Any:
    """A typer option with the help, unit, range, choices and default of a key of the job file.

    Args:
        default: what holds if it is not given, in words, where that is not the key's default.
    """
    choices = choices_of(_model(section), key)
    return typer.Option(
        *names, help=help_of(section, key, default), show_default=False, rich_help_panel=panel,
        metavar=f"[{'|'.join(choices)}]" if choices else None,
    )  # fmt: skip


def help_of(section: str, key: str, default: str = "") -> str:
    """Meaning of a key as a sentence; unit, range and default in square brackets, e.g. ``[Å, > 0; default: 30]``."""
    text = meaning_of(_model(section), key)
    first, _, rest = text.partition(" ")
    names_a_value = first.rstrip(":,") in choices_of(_model(section), key) or not first.islower()
    text = text if names_a_value else f"{first.capitalize()} {rest}"
    default = f"default: {default}" if default else _default_in_words(section, key)
    notes = [unit_and_limits(_model(section), key), default]
    text += ". May be repeated." if get_origin(_model(section).model_fields[key].annotation) is list else "."
    return text + (f"  [{'; '.join(filter(None, notes))}]" if any(notes) else "")


@dataclass(frozen=True)
class JobOptions:
    """What a command was given of its options that are keys of the job file."""

    sections: dict[str, dict[str, Any]]
    """section -> key -> value"""
    names: dict[str, str]
    """SECTION.KEY -> name of the option, for messages"""

    def job(self, **sections: dict[str, Any]) -> Job:
        """A job of these options, checked as a job file is.

        Args:
            sections: further keys and values; None leaves the default.

        Raises:
            UsageError: a bad value.
        """
        data = {name: dict(values) for name, values in self.sections.items()}
        names = dict(self.names)
        for section, values in sections.items():
            for key, value in values.items():
                if value is not None:
                    data.setdefault(section, {})[key] = value
                    names.pop(f"{section}.{key}", None)
        return parse_job(data, "options", names)


def with_keys(*groups: Keys) -> Callable[[F], F]:
    """Adds the options of these keys to a command, in place of its parameter ``job_options`` (a :class:`JobOptions`).

    Raises:
        ValueError: two options have one name.
    """
    places: dict[str, tuple[str, str]] = {}
    parameters, shown = [], {}
    for group in groups:
        for key, parameter in group.parameters():
            parameters.append(parameter)
            places[parameter.name] = group.section, key
            shown[f"{group.section}.{key}"] = group.names[key][0].partition("/")[0]

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def command(**options: Any) -> Any:
            sections: dict[str, dict[str, Any]] = {}
            for name, (section, key) in places.items():
                value = options.pop(name)
                if value is not None:
                    sections.setdefault(section, {})[key] = value
            return function(job_options=JobOptions(sections, shown), **options)

        every: list[inspect.Parameter] = []
        for parameter in inspect.signature(function, eval_str=True).parameters.values():
            every += parameters if parameter.name == "job_options" else [parameter.replace(kind=parameter.KEYWORD_ONLY)]
        command.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]  # inspect reads it
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in every}
        return command  # type: ignore[return-value]  # called by typer, which reads the signature

    return decorate


def keys_of(settings: list[str] | None, name: str) -> dict[str, Any]:
    """Keys and values of an option KEY=VALUE that may be given several times.

    Raises:
        UsageError: an entry without "=".
    """
    for entry in settings or []:
        if "=" not in entry:
            raise UsageError(f"{name}: KEY=VALUE is expected (found '{entry}')", code="option-malformed")
    return {key.strip(): value.strip() for key, _, value in (entry.partition("=") for entry in settings or [])}


def _model(section: str) -> Any:
    return Job.model_fields[section].annotation


def _typed(section: str, key: str) -> tuple[Any, Any]:
    """Type and default of a key as typer takes them: choices and numbers or a word are text (checked with the job), no
    list is None."""
    field = _model(section).model_fields[key]
    if choices_of(_model(section), key) or field.annotation in NUMBER_OR_WORD:
        return str, field.default
    if get_origin(field.annotation) is list:
        element = get_args(field.annotation)[0]
        return list[str if get_origin(element) is Literal else element] | None, None  # type: ignore[misc]  # made at run time
    return field.annotation, field.default


def _default_in_words(section: str, key: str) -> str:
    """``default: 30``; nothing for None, empty text and lists, whose description names it, and for flags."""
    field = _model(section).model_fields[key]
    value = None if field.is_required() else field.default
    if isinstance(value, bool):
        return "default: on" if value else ""
    if isinstance(value, float):
        return f"default: {value:g}"
    return f"default: {value}" if (value and not isinstance(value, list)) or value == 0 else ""


def _option_name(section: str, key: str) -> str:
    """``--shift-range`` for shift_range_A; ``--whitening/--no-whitening`` for what is on by default."""
    name = next((key.removesuffix(suffix) for suffix in SUFFIXES if key.endswith(suffix)), key).replace("_", "-")
    return f"--{name}/--no-{name}" if _model(section).model_fields[key].default is True else f"--{name}"


def _parameter_name(names: tuple[str, ...]) -> str:
    return names[0].partition("/")[0].lstrip("-").replace("-", "_")
