"""A function in a process of its own, which has opened nothing that it was not told of."""

from __future__ import annotations

import logging
import multiprocessing
import signal
from collections.abc import Callable
from typing import Any

from cryoiso.core.errors import CryoisoError, code_of
from cryoiso.parallel.signals import install_signal_handlers

_LEAVE_S = 60.0


def apart(function: Callable[..., Any], *args: Any, stop: Callable[[], bool] = lambda: False) -> Any:
    """function(*args) in a new interpreter: what it returns, or the error that it raised.

    Args:
        function: of a module; arguments and result can be pickled.
        stop: asked while waiting; if true the process gets SIGTERM, and its own answer is waited for.

    Raises:
        CryoisoError: what the function raised, or that its process died.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(theirs, function, args), daemon=True)
    process.start()
    theirs.close()
    is_stopped = False
    try:
        while not ours.poll(0.2):
            if stop() and not is_stopped and process.pid:
                process.terminate()
                is_stopped = True
        answer = ours.recv()
    except EOFError:
        process.join(_LEAVE_S)
        raise CryoisoError(
            f"the process for '{function.__name__}' died (exit status {process.exitcode})", code="process-died"
        ) from None
    finally:
        process.join(_LEAVE_S)
        if process.is_alive():
            process.kill()
        ours.close()
    if isinstance(answer, Exception):
        raise answer
    return answer


def _call(pipe: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Runs in the new process; Ctrl-C is the parent's business, SIGTERM means a checkpoint."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s  %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("cryoiso").setLevel(logging.INFO)
    install_signal_handlers()
    try:
        answer = function(*args)
    except CryoisoError as error:
        answer = error
    except Exception as error:
        answer = CryoisoError(f"{type(error).__name__} in '{function.__name__}': {error}", code=code_of(error))
    pipe.send(answer)
    pipe.close()
