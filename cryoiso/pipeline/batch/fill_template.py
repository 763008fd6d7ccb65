"""Fills batch scripts: this program's own templates, and a site's, written for cryoSPARC or for RELION."""

from __future__ import annotations

import difflib
import re
import shlex
import traceback
from pathlib import Path
from typing import Any

from jinja2 import FileSystemLoader, StrictUndefined, TemplateError, Undefined, UndefinedError
from jinja2.exceptions import TemplateNotFound
from jinja2.sandbox import SandboxedEnvironment

from cryoiso.core.errors import InputError
from cryoiso.io.regular_file import read_regular_text

OWN = Path(__file__).parent / "templates"
"""slurm.sh, pbs.sh, lsf.sh, mpirun.sh, and the parts they share."""
_RELION = re.compile(r"XXX([A-Za-z]\w*?)XXX")
_JINJA = re.compile(r"\{\{|\{%")
_RUNS = {"command", "run_cmd", "run_args"}
_OWN_START = "work.sh"
"""The part of this program's templates that has the command; copies of them include it."""


class _Unset(Undefined):
    """A placeholder that is known but has no value: false in a condition, an error where it is to be printed."""

    __str__ = Undefined._fail_with_undefined_error


def fill_own(scheduler: str, facts: dict[str, Any]) -> str:
    """This program's template for a scheduler, filled.

    Args:
        scheduler: slurm, pbs, lsf or mpirun.
        facts: placeholder -> value.
    """
    file = OWN / f"{scheduler}.sh"
    return _jinja(file.read_text(encoding="utf-8"), facts, file, tidy=True)


def fill_site(file: Path, facts: dict[str, Any], relion: dict[str, Any]) -> str:
    """A site's template, filled. Which kind it is shows in its placeholders: {{ word }} or XXXwordXXX.

    Args:
        facts: the words of cryoSPARC and of this program; None: has no value.
        relion: the words of RELION; None: has no value.

    Raises:
        InputError: no such file, an unknown or empty placeholder, a mistake in the template; names the line.
    """
    text = read_template(file)
    jinja, older = bool(_JINJA.search(text)), bool(_RELION.search(text))
    if jinja and older:
        raise InputError("the template has placeholders of two kinds, {{ word }} and XXXwordXXX", file=file,
                         hint="Use one kind.", code="template-invalid")  # fmt: skip
    starts = words_of(text) & _RUNS or _OWN_START in text if jinja else "XXXcommandXXX" in text
    if not starts:
        raise InputError(
            "the template has no placeholder for the cryoiso command",
            file=file,
            expected="XXXcommandXXX" if older else "{{ run_cmd }} or XXXcommandXXX",
            code="placeholder-missing",
        )
    return _jinja(text, facts, file) if jinja else _relion(text, relion, file)


def read_template(file: Path) -> str:
    """The text of a site's template.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return read_regular_text(file)
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise InputError(f"the template cannot be read: {why}", file=file, code="file-unreadable") from None


def words_of(text: str) -> set[str]:
    """The placeholders that a template of either kind may use."""
    names = set(_RELION.findall(text))
    for inner in re.findall(r"\{[{%](.*?)[%}]\}", text, flags=re.DOTALL):
        names |= set(re.findall(r"[A-Za-z_]\w*", inner))
    return names


# --- {{ word }}


def _jinja(text: str, facts: dict[str, Any], file: Path, tidy: bool = False) -> str:
    environment = SandboxedEnvironment(
        loader=FileSystemLoader([file.parent, OWN]), undefined=StrictUndefined, keep_trailing_newline=True,
        trim_blocks=tidy, lstrip_blocks=tidy,
    )  # fmt: skip
    environment.filters["sh"] = lambda value: shlex.quote(str(value))
    environment.filters["word"] = _word
    environment.filters["words"] = lambda value: " ".join(map(shlex.quote, str(value).split()))
    values = {name: _unset(name) if value is None else value for name, value in facts.items()}
    try:
        return environment.from_string(text).render(values)
    except UndefinedError as error:
        raise _undefined(str(error.message), file, _line_of(error), facts) from None
    except Exception as error:  # whatever the expressions of a site's template do
        if not isinstance(error, TemplateError | LookupError | TypeError | ValueError | ArithmeticError | AttributeError
                          | RecursionError | MemoryError):  # fmt: skip
            raise
        missing = f"{error} is not there" if isinstance(error, TemplateNotFound) else str(error)
        line = getattr(error, "lineno", None) or _line_of(error)
        raise InputError(
            f"the template cannot be filled: {missing}", file=file, row=line, code="template-invalid"
        ) from None


def _word(value: object) -> str:
    """A path in a line for the batch system, in double quotes if need be.

    Raises:
        ValueError: it has characters that cannot be quoted there.
    """
    text = str(value)
    if '"' in text or "\\" in text:
        raise ValueError(f"quotes and backslashes cannot stand in a line for the batch system: {text!r}")
    return text if re.fullmatch(r"[\w.,:@+=/%-]+", text) else f'"{text}"'


def _unset(name: str) -> _Unset:
    return _Unset(f"'{name}' has no value: set launch.{name} in the job file, or --{name.replace('_', '-')}", name=name)


def _line_of(error: BaseException) -> int | None:
    """The line of the template that an error comes from."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    return lines[-1] if lines else None


def _undefined(message: str, file: Path, line: int | None, facts: dict[str, Any]) -> InputError:
    name = re.match(r"'(\w+)' is undefined", message)
    if name is None:
        return InputError(message, file=file, row=line, code="template-invalid")
    return _unknown(name[1], "{{ " + name[1] + " }}", file, line, sorted(facts))


def _unknown(name: str, shown: str, file: Path, line: int | None, known: list[str]) -> InputError:
    near = difflib.get_close_matches(name, known, n=1)
    guess = f"Did you mean '{near[0]}'? " if near else ""
    return InputError(
        f"unknown placeholder {shown}", file=file, row=line,
        hint=f"{guess}Known are {', '.join(known)}; give others a value with --set {name}=VALUE or launch.variables.",
        code="placeholder-unknown",
    )  # fmt: skip


# --- XXXwordXXX


def _relion(text: str, words: dict[str, Any], file: Path) -> str:
    filled = []
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        for name in _RELION.findall(line):
            if name not in words:
                raise _unknown(name, f"XXX{name}XXX", file, number, sorted(words))
            if words[name] is None:
                raise InputError(
                    f"XXX{name}XXX has no value",
                    file=file,
                    row=number,
                    hint=f"Set launch.{name}.",
                    code="placeholder-missing",
                )
        filled.append(_RELION.sub(lambda match: str(words[match[1]]), line))
    return "".join(filled)
