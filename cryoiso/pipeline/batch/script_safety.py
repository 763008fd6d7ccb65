"""What may stand in a batch script: a script is a program, and every value in it could become a part of that."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from cryoiso.core.errors import InputError, UsageError
from cryoiso.pipeline.batch.fill_template import words_of

SHELL_LINES = ("setup",)
"""Shell code by intention: may have several lines."""
COMMANDS = {"command", "bare_command", "run_cmd", "run_args", "worker_bin_path", "setup", "extra", "modules",
            "node_folders", "environment"}  # fmt: skip
"""Quoted already, or lines of the user's own."""
_NAME = re.compile(r"[\w.,:@+=/%-]*")
_ACTIVE = ";&|<>$`\"'\\"
"""What a shell acts upon, outside of quotes or in one of its kinds of quotes."""


def require_one_line(facts: dict[str, Any]) -> None:
    """Makes sure that no value can begin a line of its own in a script, or steer a terminal that shows it.

    Args:
        facts: placeholder -> value; texts, lists or tables of texts, numbers, None.

    Raises:
        UsageError: a value with a control character; names the placeholder.
    """
    for key, value in facts.items():
        for text in _texts(value):
            _require_printable(key, text, "\n\t" if key in SHELL_LINES else "")


def _require_printable(key: str, text: str, allowed: str) -> None:
    if any((ord(letter) < 32 or 127 <= ord(letter) < 160) and letter not in allowed for letter in text):
        raise UsageError(
            f"launch: '{key}' has a line break or another control character, which is not allowed in a batch script "
            f"(found {text!r:.120}). It comes from the setting of this name, or from the path of the run, the job file "
            "or the script.",
            code="unsafe-for-batch-script",
        )


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for pair in value.items() for part in pair for text in _texts(part)]
    if isinstance(value, list | tuple):
        return [text for part in value for text in _texts(part)]
    return [value] if isinstance(value, str) else []


def require_name(key: str, value: str) -> None:
    """Makes sure that a value is a name as batch systems have them for accounts, queues and kinds of GPUs.

    Raises:
        UsageError: blanks, quotes or characters that a shell or a batch system acts upon.
    """
    if not _NAME.fullmatch(value):
        letters = "letters, digits and . , : @ + = / % - _"
        raise UsageError(
            f"{key}: not a valid name for a batch system (expected {letters}, found {value!r:.120})",
            code="unsafe-for-batch-script",
        )


def require_plain(template: Path, text: str, facts: dict[str, Any], own: set[str]) -> None:
    """Makes sure that the paths and names that a site's template inserts as they are mean nothing to a shell.

    A site's template may quote them or not; a value that went through ``|sh`` is quoted.

    Args:
        text: of the template. own: placeholders that the user gave values, which are his business.

    Raises:
        InputError: names the placeholder and the value.
    """
    raw = words_of(re.sub(r"\b[A-Za-z_]\w*\s*\|\s*sh\b", "", text))
    for key in sorted(raw & facts.keys() - COMMANDS - own):
        for value in _texts(facts[key]):
            if active := sorted(set(value) & set(_ACTIVE)):
                raise InputError(
                    f"'{key}' would put {' '.join(active)} into the script, where the shell would interpret it",
                    file=template, found=value, hint=f"Use another name, or {{{{ {key}|sh }}}} in the template.",
                    code="unsafe-for-batch-script",
                )  # fmt: skip
