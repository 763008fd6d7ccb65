"""What all sections share, and the facts of a field behind ``--help``, ``cryoiso init`` and the documentation."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict
from pydantic_core import PydanticCustomError

UNITS = {
    "A": "Å", "deg": "degrees", "px": "pixels", "mib": "MiB", "gb": "GB", "s": "seconds", "min": "minutes",
}  # fmt: skip
"""Last part of a key's name -> its unit."""


class Section(BaseModel):
    """A section of the job file: an unknown key, infinity and nan are errors."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)


def _number(value: Any) -> float:
    """The finite number that a value or its text is, NaN for anything else."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    return number if math.isfinite(number) else math.nan


def _auto_or_positive(value: Any) -> Any:
    """A number above 0, or the word."""
    if value == "auto":
        return value
    number = _number(value)
    if not number > 0:
        raise PydanticCustomError("auto_or_positive", "Input should be 'auto' or a finite number above 0")
    return number


def _measured_or_weight(value: Any) -> Any:
    """A number of 0 or more, or the word."""
    if value == "measured":
        return value
    number = _number(value)
    if not number >= 0:
        raise PydanticCustomError("measured_or_weight", "Input should be 'measured' or a finite number, 0 or more")
    return number


AutoOrPositive = Annotated[float | Literal["auto"], BeforeValidator(_auto_or_positive)]
MeasuredOrWeight = Annotated[float | Literal["measured"], BeforeValidator(_measured_or_weight)]
NUMBER_OR_WORD = tuple(get_args(kind)[0] for kind in (AutoOrPositive, MeasuredOrWeight))
"""Annotations of keys that take a number or a word."""


def unit_of(key: str) -> str:
    """Unit of a key's value, or an empty string."""
    return UNITS.get(key.rpartition("_")[2], "") if "_" in key else ""


def choices_of(section: type[BaseModel], key: str) -> tuple[str, ...]:
    """What a key with a fixed set of values accepts; empty for all others."""
    annotation = section.model_fields[key].annotation
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def limits_of(section: type[BaseModel], key: str) -> str:
    """Allowed range of a number in words, e.g. ``1 to 4``, ``> 0`` or ``> 0, ≤ 90``."""
    bounds: dict[str, Any] = {}
    for constraint in section.model_fields[key].metadata:
        bounds |= {name: getattr(constraint, name) for name in ("gt", "ge", "lt", "le") if hasattr(constraint, name)}
    if bounds.keys() == {"ge", "le"}:
        return f"{bounds['ge']:g} to {bounds['le']:g}"
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    return ", ".join(f"{sign} {bounds[name]:g}" for name, sign in signs.items() if name in bounds)


def unit_and_limits(section: type[BaseModel], key: str) -> str:
    """Unit and allowed range of a key, e.g. ``Å, > 0``; empty if it has neither."""
    return ", ".join(filter(None, (unit_of(key), limits_of(section, key))))


def meaning_of(section: type[BaseModel], key: str) -> str:
    """Description of a key: starts with a small letter, has no full stop, names the default where the value is None."""
    return str(section.model_fields[key].description)
