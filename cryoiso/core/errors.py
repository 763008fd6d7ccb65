"""Errors that a user sees: one sentence each, with the exit code the batch system reads."""

from __future__ import annotations

EXIT_DONE = 0
EXIT_OTHER = 1
EXIT_USAGE = 2
EXIT_INPUT = 65
EXIT_MISSING = 69
EXIT_REQUEUE = 75

STOPPED = "stopped by a signal; what is finished is kept"


class CryoisoError(Exception):
    """Something the user can understand and act upon; printed without a traceback."""

    exit_code = EXIT_OTHER


class UsageError(CryoisoError):
    """A wrong option or job file."""

    exit_code = EXIT_USAGE


class MissingError(CryoisoError):
    """A program, device or library that is not there."""

    exit_code = EXIT_MISSING


class Interrupted(CryoisoError):
    """Stopped by a signal after writing a checkpoint. The message does not say how to go on, which depends on the
    command: ``cli.common`` adds it."""

    exit_code = EXIT_REQUEUE


class InputError(CryoisoError):
    """Bad input: names the file, the row, what was expected, what was found and what to do.

    >>> str(InputError("stack is too short", file="a.mrcs", row=7, expected="10 images", found="6", hint="Copy it."))
    'a.mrcs, row 7: stack is too short (expected 10 images, found 6). Copy it.'
    """

    exit_code = EXIT_INPUT

    def __init__(
        self,
        problem: str,
        *,
        file: object = None,
        row: int | None = None,
        expected: object = None,
        found: object = None,
        hint: str = "",
    ) -> None:
        self.problem, self.file, self.row = problem, file, row
        self.expected, self.found, self.hint = expected, found, hint
        where = "" if file is None else f"{file}"
        if row is not None:
            where += f", row {row}" if where else f"row {row}"
        facts = [f"expected {expected}"] if expected is not None else []
        facts += [f"found {found}"] if found is not None else []
        text = f"{where}: {problem}" if where else problem
        if facts:
            text += f" ({', '.join(facts)})"
        super().__init__(f"{text}. {hint}" if hint else text)
