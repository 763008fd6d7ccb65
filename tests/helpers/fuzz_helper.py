"""Property-based fuzzing: mutated inputs, the project's own errors only, no hang, bounded memory.

The suite repeats the same examples at every run, twice as many with --slow. By hand, for as many others as one likes:

    CRYOISO_FUZZ_EXAMPLES=20000 pytest tests/system/test_fuzz_inputs.py tests/system/test_fuzz_records.py
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from cryoiso.core.error_codes import CODES
from cryoiso.core.errors import CryoisoError

T = TypeVar("T")
LONGEST_S = 5
MOST_BYTES = 2 * 2**30
"""More address space than this must no single file take, whatever it says of itself."""
_BY_HAND = os.environ.get("CRYOISO_FUZZ_EXAMPLES")
_QUIET = logging.getLogger("cryoiso")


def examples(count: int) -> settings:
    """How often a test is tried, and how."""
    return settings(
        max_examples=int(_BY_HAND or (6 if os.environ.get("CRYOISO_TEST_SLOW") else 3) * count),
        derandomize=not _BY_HAND,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink] if _BY_HAND else [Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


class HangError(BaseException):
    """Not an Exception, so that no handler of the program takes it for one of its own."""


@contextmanager
def bounded() -> Iterator[None]:
    """Ends what takes too long, and what takes too much memory."""

    def late(*_: object) -> None:
        raise HangError(f"more than {LONGEST_S} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", encoding="ascii") as stream:
        now = int(stream.read().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, late)
    level = _QUIET.level
    _QUIET.setLevel(logging.CRITICAL + 1)
    resource.setrlimit(resource.RLIMIT_AS, (now + MOST_BYTES, hard))
    signal.alarm(LONGEST_S)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        _QUIET.setLevel(level)


def refused_or(function: Callable[..., T], *arguments: Any) -> T | None:
    """The result, or None where the project's own error refuses the input; anything else fails the test."""
    with bounded():
        try:
            return function(*arguments)
        except CryoisoError as error:
            text = str(error)
            assert text and len(text) < 3_000, f"an error of {len(text)} characters"
            assert error.code in CODES, f"no such code: {error.line()}"
            return None


NASTY = [
    "",
    " ",
    "\0",
    "\x1b[31m",
    "\u202e",
    "\ufeff",
    "\u2028",
    "\x85",
    "'",
    '"',
    "#",
    ";",
    "''",
    "\n",
    "\r",
    "\t",
    "_",
    "@",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "-1",
    "0",
    "-0",
    "1_0",
    "²",
    "٣",
    "9" * 30,
    "9223372036854775808",
    "-9223372036854775809",
    "18446744073709551616",
    "1e-320",
    "0x10",
    "None",
    "<NA>",
    "true",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "~",
    "a@b",
    "0@x.mrcs",
    "000001@",
    "1@2@3",
    "x" * 300,
    "é",
    "\udcff",
    "*****",
    "?",
    ".",
]
"""Pieces of text that have broken readers of something."""

pieces = st.one_of(st.sampled_from(NASTY), st.text(max_size=6))
edits = st.tuples(st.floats(0, 1), st.integers(0, 30), pieces)


def edited(text: str, changes: list[tuple[float, int, str]]) -> bytes:
    """A text with some of its parts replaced; bytes, since not every replacement can be text."""
    for where, length, piece in changes:
        start = int(where * len(text))
        text = text[:start] + piece + text[start + length :]
    return text.encode("utf-8", "surrogateescape" if "\udcff" in text else "surrogatepass")


def with_words(text: str, changes: list[tuple[float, str]]) -> bytes:
    """A text with some of its words replaced, its layout kept."""
    lines = [line.split(" ") for line in text.split("\n")]
    for where, piece in changes:
        line = lines[int(where * (len(lines) - 1))]
        line[int(where * 7919 % 1 * len(line))] = piece
    return "\n".join(" ".join(line) for line in lines).encode("utf-8", "surrogatepass")


byte_edits = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from([0, 1, 127, 128, 255]) | st.integers(0, 255)), max_size=8
)


def with_bytes(data: bytes, changes: list[tuple[float, int]], head: int, cut: float = 1.0) -> bytes:
    """Bytes with some replaced, two of three among the first ``head``; ``cut`` below 0.3 cuts them short."""
    found = bytearray(data)
    for number, (where, value) in enumerate(changes if found else []):
        limit = len(found) if number % 3 == 2 else min(head, len(found))
        found[min(int(where * limit), len(found) - 1)] = value
    return bytes(found[: int(cut / 0.3 * len(found))]) if cut < 0.3 else bytes(found)


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(NASTY[:-8]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["file", "name", "x", ".."]), inner, max_size=2)
    ),
    max_leaves=4,
)
"""What JSON may hold where something else is expected."""


def with_values(tree: Any, changes: list[tuple[float, Any]]) -> Any:
    """A copy of a JSON value in which some inner values are replaced, or taken away (by the value "DROP")."""
    import copy

    tree = copy.deepcopy(tree)
    for where, value in changes:
        places = list(_places(tree))
        if not places:
            return value
        parent, key = places[int(where * (len(places) - 1))]
        if value == "DROP":
            del parent[key]
        else:
            parent[key] = value
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        yield tree, key
        yield from _places(value)


json_edits = st.lists(st.tuples(st.floats(0, 1), plain_values | st.just("DROP")), min_size=1, max_size=3)
