"""How a program of many ranks fails: one message, one exit code, nobody left hanging.

Two kinds of failure. *Common*: all ranks know of it (bad job file, a stop signal that was agreed upon); rank 0 prints,
everybody leaves in an orderly way. *Sudden*: one rank fails while others wait for it in MPI; it prints its message
first and ends them all.
"""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import sys
import termios
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from cryoiso.core.errors import EXIT_KEYBOARD, EXIT_OTHER, EXIT_REQUEUE, CryoisoError, Interrupted, code_of, with_code
from cryoiso.core.log import indented, printable
from cryoiso.parallel.context import Context

logger = logging.getLogger("cryoiso")
T = TypeVar("T")
_COMMON = "common_to_all_ranks"


def on_root(ctx: Context, function: Callable[..., T], *args: Any, **options: Any) -> T:
    """Calls ``function`` on rank 0 and gives its result to every rank; a CryoisoError is raised on every rank as well.

    Use it for everything that only one rank should read, check or write; the others sleep meanwhile. Collective. An
    unexpected exception is raised on rank 0 alone, where ``guard`` ends all.
    """
    result: Any = None
    error: CryoisoError | None = None
    if ctx.rank == 0:
        try:
            result = function(*args, **options)
        except CryoisoError as caught:
            error = caught
    ctx.wait_for_all()
    sent = ctx.bcast(_sent(error))
    if sent is not None:
        if error is None:
            error = _remade(*sent)
        setattr(error, _COMMON, True)
        raise error
    value: T = ctx.bcast(result)
    return value


def agree(ctx: Context, error: CryoisoError | None) -> None:
    """Raises on every rank the error of the lowest rank that has one; returns if nobody has. Collective."""
    for rank, sent in enumerate(ctx.allgather(_sent(error))):
        if sent is not None:
            common = error if rank == ctx.rank and error is not None else _remade(*sent)
            setattr(common, _COMMON, True)
            raise common


def _sent(error: CryoisoError | None) -> tuple[int, str, str] | None:
    """What other ranks get of an error: exit code, code and message, which any process can read."""
    return None if error is None else (error.exit_code, error.code, str(error))


def _remade(exit_code: int, code: str, message: str) -> CryoisoError:
    """Another rank's error."""
    if exit_code == EXIT_REQUEUE:
        return Interrupted(message)
    error = CryoisoError(message, code=code)
    error.exit_code = exit_code
    return error


@contextmanager
def guard(ctx: Context, say: Callable[[str], None] | None = None) -> Iterator[None]:
    """Turns whatever is raised inside into one message and the right exit code for all ranks.

    Raises:
        SystemExit: with the exit code, when this process is alone or all ranks fail together. Otherwise MPI ends
            all ranks and this does not return.
    """
    say = say or _say
    try:
        yield
    except CryoisoError as error:
        common = ctx.size == 1 or getattr(error, _COMMON, False) or isinstance(error, Interrupted)
        _leave(ctx, error.line(), error.exit_code, common, say)
    except KeyboardInterrupt as error:
        text = "interrupted from the keyboard" + (f". {error}" if error.args else "")
        _leave(ctx, with_code(text, code_of(error)), EXIT_KEYBOARD, ctx.size == 1, say)
    except BrokenPipeError:
        raise  # whoever read our output has left; not ours to comment
    except OSError as error:
        logger.debug("the system refused something", exc_info=True)
        what = f"{error.filename}: {error.strerror}" if error.filename is not None else str(error)
        _leave(ctx, with_code(what, code_of(error)), EXIT_OTHER, ctx.size == 1, say)
    except Exception as error:
        logger.debug("unexpected error", exc_info=True)
        sys.stderr.write(printable(traceback.format_exc()))
        what = with_code(f"unexpected {type(error).__name__}: {error}", code_of(error))
        _leave(ctx, what, EXIT_OTHER, ctx.size == 1, say)


def _leave(ctx: Context, message: str, code: int, common: bool, say: Callable[[str], None]) -> None:
    logger.debug("error: %s", message)  # into the log of this rank
    if common:
        if ctx.rank == 0:
            say(message)
        _flush()
        ctx.wait_for_all(limit_s=5.0)  # some launchers kill the others as soon as one has left
        raise SystemExit(code)
    # Several ranks often meet the same error at once: rank 0 speaks first, and has ended the others before they speak.
    if ctx.rank:
        time.sleep(0.3 + 0.05 * min(ctx.rank, 40))
    say(f"rank {ctx.rank} on {ctx.hostname}: {message}")
    _flush()
    _wait_until_read()
    ctx.abort(code)


def _say(message: str) -> None:
    sys.stderr.write(f"error: {indented(message)}\n")  # one write: ranks share the stream


def _wait_until_read(limit_s: float = 5.0) -> None:
    """Waits until the launcher has read this process's output, at most ``limit_s``.

    A launcher that is told to abort kills its ranks and may leave with their last words still in the pipe.
    """
    end = time.monotonic() + limit_s
    while any(_unread_bytes(fd) for fd in (1, 2)) and time.monotonic() < end:
        time.sleep(0.005)


def _unread_bytes(fd: int) -> int:
    """What was written to a pipe or socket and not yet read by its other end; 0 where that cannot be told."""
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISFIFO(mode):
            request = termios.FIONREAD
        elif stat.S_ISSOCK(mode):
            request = termios.TIOCOUTQ
        else:
            return 0
        return int.from_bytes(fcntl.ioctl(fd, request, b"\0" * 4), sys.byteorder, signed=True)
    except OSError:
        return 0


def _flush() -> None:
    for handler in logger.handlers:
        handler.flush()
    sys.stdout.flush()
    sys.stderr.flush()
