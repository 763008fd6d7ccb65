"""The connection to cryoSPARC, and its errors in our words.

The address and the login are those of cryosparc-tools itself: its environment variables, or the session file of its
``login``. Nothing of them passes through here, and messages never repeat what the library says of a connection.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cryoiso.core.errors import CryoisoError, MissingError

TIMEOUT_S = 120
"""Longest wait for an answer; a signal waits as long."""
OLDEST = 5
"""Major version of cryosparc-tools whose interface is used."""
LOGIN = (
    "Set CRYOSPARC_BASE_URL and log in with 'python -m cryosparc.tools login', as the user who runs cryoiso, on a host "
    "that reaches cryoSPARC"
)
_BUSY = (429, 502, 503, 504)
"""HTTP statuses that say: later."""
_DETAILS = 300


def require_library() -> None:
    """
    Raises:
        MissingError: cryosparc-tools is not installed, or too old.
    """
    try:
        import cryosparc
    except ImportError:
        raise MissingError(
            "refine.engine = 'cryosparc' needs cryosparc-tools: pip install 'cryoiso[cryosparc]'",
            code="program-missing",
        ) from None
    version = str(getattr(cryosparc, "__version__", "0"))
    if int(version.partition(".")[0]) < OLDEST:
        raise MissingError(
            f"cryosparc-tools {OLDEST} or newer is needed (found {version}): pip install 'cryoiso[cryosparc]'",
            code="program-missing",
        )


def connect() -> Any:
    """A session (``cryosparc.tools.CryoSPARC``) of the user who is logged in.

    Raises:
        MissingError: no cryosparc-tools.
        CryoisoError: no address, or not logged in (code ``cryosparc-not-logged-in``).
        Exception: of the connection, see ``is_lost``.
    """
    require_library()
    from cryosparc import tools

    try:
        return tools.CryoSPARC(timeout=TIMEOUT_S)
    except TypeError:
        raise _no_login("the address of cryoSPARC is not set, or set twice") from None
    except ValueError:
        raise _no_login("there is no login for cryoSPARC, or it has expired") from None
    except RuntimeError as error:
        cause = error.__cause__
        if cause is None or is_lost(cause):
            raise ConnectionError("cryoSPARC does not answer") from None
        raise explained(cause, "the login") or _no_login("cryoSPARC did not accept the login") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Without the library's warning for every attempt of a request, which names the address."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\*\*\* API client")
        yield


def is_lost(error: BaseException) -> bool:
    """Whether an error of the library says that cryoSPARC did not answer, so that the same may work later."""
    import httpx
    from cryosparc.errors import APIError

    if isinstance(error, APIError):
        return error.code in _BUSY
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in _BUSY
    return isinstance(error, httpx.TransportError | ConnectionError)


def explained(error: BaseException, what: str) -> CryoisoError | None:
    """What cryoSPARC refused, as an error of ours; None: the error is not one of its answers.

    Args:
        what: was asked for.
    """
    import httpx
    from cryosparc.errors import APIError
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        return CryoisoError(
            f"cryosparc-tools does not understand cryoSPARC's answer to {what}: install the cryosparc-tools of "
            "cryoSPARC's version",
            code="cryosparc-refused",
        )
    if isinstance(error, httpx.HTTPStatusError):
        status, data = error.response.status_code, None
    elif isinstance(error, APIError):
        status, data = error.code, error.data
    else:
        return None
    if status in (401, 403):
        return _no_login(f"cryoSPARC does not allow {what} (status {status})")
    if status == 404:
        return CryoisoError(
            f"cryoSPARC does not know {what}. Check cryosparc.project, workspace and lane, and that this user may see "
            "them",
            code="cryosparc-not-found",
        )
    return CryoisoError(f"cryoSPARC refused {what} (status {status}){_details(data)}", code="cryosparc-refused")


def _no_login(what: str) -> CryoisoError:
    return CryoisoError(f"{what}. {LOGIN}", code="cryosparc-not-logged-in")


def _details(data: Any) -> str:
    """Its reason: of what its server sends, only the messages, never what they were about."""
    detail = data.get("detail") if isinstance(data, dict) else None
    if isinstance(detail, list):
        detail = "; ".join(str(part.get("msg", "")) for part in detail if isinstance(part, dict))
    return f": {detail[:_DETAILS]}" if isinstance(detail, str) and detail else ""
