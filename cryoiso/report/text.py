"""Words beside the pictures: sentences and a small table under a heading, and how numbers are written in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Entry = tuple[str, str, Any, str, Callable[[], str]]
"""A figure: key, title, what must be there, caption, how it is drawn."""


@dataclass(frozen=True)
class Text:
    """What stands under the heading of a figure, before its picture."""

    sentences: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    """Names of the table's columns; none where its first column names the rows."""
    rows: tuple[tuple[str, ...], ...] = ()


def percent(fraction: float, digits: int = 1) -> str:
    """A fraction as people write it.

    >>> percent(0.1234), percent(1.0, 0)
    ('12.3 %', '100 %')
    """
    return f"{100 * fraction:.{digits}f} %"


def number(part: Any, key: str) -> float | None:
    """The number under a key; None where there is no such key, or something else under it.

    >>> number({"a": 2}, "a"), number({"a": None}, "a"), number(None, "a"), number({"a": True}, "a")
    (2, None, None, None)
    """
    value = part.get(key) if isinstance(part, dict) else None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def section(part: Any, key: str) -> dict[str, Any]:
    """The object under a key; empty where there is none."""
    value = part.get(key) if isinstance(part, dict) else None
    return value if isinstance(value, dict) else {}


def numbers_of(part: Any, key: str) -> list[float | None]:
    """The list of numbers under a key, None for what is no number; empty where there is no list."""
    values = part.get(key) if isinstance(part, dict) else None
    return [number({"v": v}, "v") for v in values] if isinstance(values, list) else []


def span(parts: dict[str, Any], label: str) -> tuple[float, float] | None:
    """The two numbers under a label, if they are two numbers."""
    values = [v for v in numbers_of(parts, label) if v is not None]
    return (values[0], values[1]) if len(values) == 2 else None
