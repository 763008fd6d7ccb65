"""What all commands share: how they start, how they fail, how they log."""

from __future__ import annotations

import functools
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from cryoiso.core import products
from cryoiso.core.errors import CryoisoError, Interrupted, UsageError
from cryoiso.core.log import indented, is_told, printable
from cryoiso.parallel.launcher import speaks

F = TypeVar("F", bound=Callable[..., Any])


class Voice:
    """Of many ranks with the same command line, one prints its help and its usage errors.

    The ranks do not know of each other while the command line is read, so the launcher's word is taken for which is
    the first.
    """

    muted = False
    _streams = (sys.stdout, sys.stderr)

    @classmethod
    @contextmanager
    def while_parsing(cls) -> Iterator[None]:
        cls._streams = (sys.stdout, sys.stderr)
        if cls.muted:
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (lives as long as the process)
        try:
            yield
        finally:
            cls.restore()

    @classmethod
    def restore(cls) -> None:
        """From here on every rank may speak."""
        sys.stdout, sys.stderr = cls._streams


def as_command(function: F, collective: bool) -> F:
    """The command as typer calls it: one clear message and the right exit code whatever happens.

    Args:
        collective: all ranks run it together; otherwise rank 0 runs it and the others have nothing to do.
    """

    @functools.wraps(function)
    def command(*args: Any, **options: Any) -> None:
        Voice.restore()
        if not collective and not speaks():
            return
        from cryoiso.core.kernelcache import settle_kernel_cache
        from cryoiso.parallel.abort import guard
        from cryoiso.parallel.context import Context, get_context

        settle_kernel_cache()
        try:
            ctx = get_context() if collective else Context()
        except CryoisoError as error:
            if speaks():
                print(f"error: {indented(error.line())}", file=sys.stderr)
            raise SystemExit(error.exit_code) from None
        log_to_stderr(ctx.rank)
        with guard(ctx), _saying_how_to_go_on(function.__name__, options):
            require_utf8(options)
            require_finite(function, options)
            function(*args, **options)

    return command  # type: ignore[return-value]  # it has the signature of the function (functools.wraps)


def require_utf8(options: dict[str, Any]) -> None:
    """Stops at names that are not valid UTF-8: the STAR, JSON and TOML files of a result cannot hold them.

    Args:
        options: of a command; paths in it are taken from the working directory.

    Raises:
        UsageError: names the option and the bytes.
    """
    for option, value in options.items():
        for item in value if isinstance(value, list | tuple) else [value]:
            if not isinstance(item, str | Path):
                continue
            name = os.path.abspath(item) if isinstance(item, Path) else item
            try:
                name.encode("utf-8")
            except UnicodeEncodeError:
                raise UsageError(
                    f"{option}: the name {os.fsencode(name)!r} is not valid UTF-8. Rename the folder or file, or give "
                    "a link to it with another name.",
                    code="name-not-utf8",
                ) from None


def require_finite(function: Callable[..., Any], options: dict[str, Any]) -> None:
    """Stops at numbers that are NaN or infinite, which no range of an option keeps out.

    Args:
        function: of a command. options: that it is called with, by the names of its arguments.

    Raises:
        UsageError: names the option and what was found.
    """
    for option, value in options.items():
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, float) and not math.isfinite(item):
                raise UsageError(
                    f"{_name_of_option(function, option)}: a finite number is expected (found {item:g})",
                    code="option-out-of-range",
                )


def _name_of_option(function: Callable[..., Any], argument: str) -> str:
    """How an argument of a command is written on the command line."""
    hint = get_type_hints(function, include_extras=True).get(argument)
    written: list[Any] = []
    for part in getattr(hint, "__metadata__", ()):  # in Annotated, typer takes the first name for a default
        written += [getattr(part, "default", None), *(getattr(part, "param_decls", None) or ())]
    return next(
        (name for name in written if isinstance(name, str) and name.startswith("--")), f"--{argument.replace('_', '-')}"
    )


@contextmanager
def _saying_how_to_go_on(name: str, options: dict[str, Any]) -> Iterator[None]:
    """Adds to an interruption's message what this command goes on with."""
    try:
        yield
    except Interrupted as error:
        error.args = (f"{str(error).rstrip('.')}. {how_to_go_on(name, options)}",)
        raise
    except KeyboardInterrupt as error:
        if name not in ("run", "resume") or (_folder_of(options) / products.JOURNAL).exists():
            error.args = (how_to_go_on(name, options),)
        raise


def how_to_go_on(name: str, options: dict[str, Any]) -> str:
    """What follows an interrupted command.

    Args:
        name: of the command's function.
        options: as it was called with.
    """
    if name in ("run", "resume"):
        return f"'cryoiso resume {_folder_of(options)}' goes on from there."
    if "go_on" in options:
        return "The same command with --resume goes on from there."
    return "Give the same command again."


def _folder_of(options: dict[str, Any]) -> Path:
    """The run folder of the command ``run`` or ``resume``."""
    return Path(options.get("out") or options.get("folder") or run_folder_of(options["job"]))


def run_folder_of(job: Path) -> Path:
    """Where the run of a job file goes if nothing else is said.

    Raises:
        UsageError: the name of a folder alone, such as "." or "/".
    """
    if not job.name:
        raise UsageError(f"{job}: a folder, not a job file. Name the file in it", code="file-not-regular")
    return job.with_name(f"{job.stem}-run")


def leave_with(comm: Any, code: int) -> None:
    """Ends all ranks with an exit status that is an answer, not an error; what was printed is out by then.

    Raises:
        SystemExit: always.
    """
    sys.stdout.flush()
    comm.wait_for_all(limit_s=5.0)  # some launchers kill the others as soon as one has left
    raise SystemExit(code)


def echo(text: object, nl: bool = True) -> None:
    """Prints a result on standard output; names and values from elsewhere cannot steer the terminal."""
    import typer

    typer.echo(printable(text), nl=nl)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        mark = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        return f"{clock}  {mark}{indented(record.getMessage())}"


def log_to_stderr(rank: int) -> None:
    """Rank 0 tells what it does on stderr, one line with the time each; other ranks what nobody else tells."""
    logger = logging.getLogger("cryoiso")
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.INFO)
    handler.addFilter(lambda record: is_told(record, rank))
    handler.setFormatter(_Formatter())
    for earlier in logger.handlers[:]:  # of an earlier command in this process
        logger.removeHandler(earlier)
        earlier.close()
    logger.addHandler(handler)
