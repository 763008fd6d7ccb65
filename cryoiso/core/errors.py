"""Errors that a user sees: one sentence each, with a stable code and the exit code the batch system reads."""

from __future__ import annotations

from typing import Any

EXIT_DONE = 0
EXIT_OTHER = 1
EXIT_KEYBOARD = 130
EXIT_USAGE = 2
EXIT_INPUT = 65
EXIT_MISSING = 69
EXIT_REQUEUE = 75

STOPPED = "stopped by a signal; what is finished is kept"


class CryoisoError(Exception):
    """Something the user can understand and act upon; printed without a traceback.

    Args:
        message: for people; may change from version to version.
        code: kind of the situation, a key of ``core.error_codes.CODES``; for programs, stays the same.
    """

    exit_code = EXIT_OTHER

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), self.args, self.__dict__)

    def line(self) -> str:
        """Message and code as they are printed.

        >>> CryoisoError("RELION ended. See run.log", code="relion-failed").line()
        'RELION ended. See run.log [relion-failed]'
        """
        return with_code(str(self), self.code)


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

    def __init__(self, message: str) -> None:
        super().__init__(message, code="stopped-by-signal")


class InputError(CryoisoError):
    """Bad input: names the file, the row, what was expected, what was found and what to do.

    >>> error = InputError("stack is too short", file="a.mrcs", row=7, expected="10 images", found="6",
    ...                    hint="Copy it.", code="stack-too-short")
    >>> error.line()
    'a.mrcs, row 7: stack is too short (expected 10 images, found 6). Copy it. [stack-too-short]'
    """

    exit_code = EXIT_INPUT

    def __init__(
        self,
        problem: str,
        *,
        code: str,
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
        super().__init__(f"{text}. {hint}" if hint else text, code=code)


def with_code(message: str, code: str) -> str:
    """A message with its code at the end of the first line; what follows is a program's output.

    >>> with_code("it failed:\\nSegmentation fault", "relion-failed")
    'it failed: [relion-failed]\\nSegmentation fault'
    """
    first, *rest = message.split("\n", 1)
    return "\n".join([f"{first} [{code}]", *rest])


def code_of(error: BaseException) -> str:
    """The code of any exception, for records: of those that are no CryoisoError, the kind."""
    if isinstance(error, CryoisoError):
        return error.code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted-from-keyboard"
    return "system-error" if isinstance(error, OSError) else "unexpected-error"


def _restored(kind: type[CryoisoError], args: tuple[Any, ...], state: dict[str, Any]) -> CryoisoError:
    """An error from another process: constructors take keywords, which an exception does not keep by itself."""
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error
