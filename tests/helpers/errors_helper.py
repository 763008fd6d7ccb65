"""Errors in tests: by their code, and by their words only where these carry facts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from cryoiso.core.error_codes import CODES
from cryoiso.core.errors import CryoisoError


@contextmanager
def raises_code(
    code: str, kind: type[CryoisoError] = CryoisoError, *, match: str | None = None
) -> Iterator[pytest.ExceptionInfo]:
    """As ``pytest.raises``, for an error with this code.

    Args:
        code: a key of ``core.error_codes.CODES``.
        kind: class of the error, which decides its exit code.
        match: regular expression for facts that the message must have.
    """
    assert code in CODES, f"no such code: {code}"
    with pytest.raises(kind, match=match) as info:
        yield info
    assert info.value.code == code, f"{code} is expected: {info.value.line()}"
