"""The identity of an unfinished computation in a file of its own, beside what other programs or stages write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cryoiso.core.errors import InputError
from cryoiso.core.identity import HINT, Identity, plain, require_same
from cryoiso.io.atomic import write_text
from cryoiso.io.regular_file import read_regular_text

FILE = "identity.json"


def note(folder: Path, identity: Identity) -> None:
    """Writes down what a computation in this folder begins with."""
    write_text(folder / FILE, json.dumps(plain(identity), indent=1) + "\n")


def require_begun_with(folder: Path, identity: Identity, what: str) -> None:
    """
    Raises:
        InputError: the computation in this folder was begun with something else, or nothing tells with what.
    """
    require_same(_read(folder / FILE), identity, folder / FILE, what)


def _read(file: Path) -> Any:
    try:
        return json.loads(read_regular_text(file))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot be read: {error}", file=file, hint=HINT, code="file-unreadable") from None
