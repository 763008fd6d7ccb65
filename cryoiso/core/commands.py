"""Commands in a job file: split as a shell splits words, with placeholders filled; no shell ever sees them."""

from __future__ import annotations

import re
import shlex
import string
from collections.abc import Mapping

from cryoiso.core.errors import UsageError

COMMANDS = (
    ("relion", "launcher"), ("relion", "extra"), ("command", "run"), ("command", "go_on"),
    ("auxiliary", "post_command"), ("launch", "program"), ("launch", "image_command"), ("launch", "mpirun"),
)  # fmt: skip
"""Settings that are commands, or arguments of one."""
_FORM = re.compile(r"0?\d{0,2}(\.\d{1,2})?[dfgs]?")
"""A placeholder's number format, e.g. 02d; wider ones would fill the memory."""


def split_command(text: str, key: str) -> list[str]:
    """The words of a command.

    Args:
        key: the setting that it comes from, for the message.

    Raises:
        UsageError: quotes that do not close, or a control character other than a blank.

    >>> split_command("srun -n 4 'a b'", "relion.launcher")
    ['srun', '-n', '4', 'a b']
    """
    if any(ord(letter) < 32 and letter not in "\t\n" for letter in text):
        raise UsageError(f"{key}: a control character is in it (found {text!r:.100})", code="command-malformed")
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UsageError(
            f"{key}: the quotes or backslashes do not close: {error} (found {text!r:.100})", code="command-malformed"
        ) from None


def fill_words(words: list[str], values: Mapping[str, object], key: str) -> list[str]:
    """Words with {name} replaced, also as {name:02d}; {{ and }} stand for braces.

    Raises:
        UsageError: another placeholder, an attribute or item of one ({name.x}, {name[0]}), or a format that does
            not fit.

    >>> fill_words(["-n", "{ranks}", "r{round:02d}"], {"ranks": 4, "round": 1}, "k")
    ['-n', '4', 'r01']
    """
    return [_filled(word, values, key) for word in words]


def _filled(word: str, values: Mapping[str, object], key: str) -> str:
    known = ", ".join("{" + name + "}" for name in values)
    problem, parts = "", []
    try:
        for literal, name, form, conversion in string.Formatter().parse(word):
            parts.append(literal)
            if name is None:
                continue
            if name not in values or conversion or not _FORM.fullmatch(form or ""):
                problem = "unknown placeholder {" + name + (f"!{conversion}" if conversion else "")
                problem += (f":{form}" if form else "") + "}"
                break
            parts.append(format(values[name], form or ""))
    except (ValueError, TypeError) as error:
        problem = str(error)
    if problem:
        raise UsageError(
            f"{key}: cannot be understood: {problem} (found {word!r:.100}); known placeholders: {known}",
            code="placeholder-unknown",
        )
    return "".join(parts)
