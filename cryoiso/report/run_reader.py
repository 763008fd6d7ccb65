"""The files of a run folder, read for the report; every one may be absent."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any, cast

from cryoiso.core import products
from cryoiso.core.errors import InputError
from cryoiso.core.records import JournalLine
from cryoiso.io.regular_file import read_regular_bytes, read_regular_text


def stage_folder(folder: Path, name: str) -> Path:
    """The folder NN_name of a stage, whatever its number; the highest of several; 00_name where there is none.

    A single command leaves the files of its stage in the folder itself.
    """
    folders = sorted(folder.glob(f"[0-9][0-9]_{name}"))
    if folders:
        return folders[-1]
    return folder if (folder / products.facts(name)).exists() else folder / f"00_{name}"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, with None for NaN and infinity; empty if there is no file.

    Raises:
        InputError: not JSON, or not an object.
    """
    if not path.exists():
        return {}
    try:
        data = json.loads(read_regular_text(path), parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not a JSON file: {error}", file=path, code="record-damaged") from None
    if not isinstance(data, dict):
        raise InputError(
            "not a JSON object", file=path, expected="{...}", found=type(data).__name__, code="record-damaged"
        )
    return data


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file says; empty if there is none.

    Raises:
        InputError: not TOML.
    """
    if not path.exists():
        return {}
    try:
        return tomllib.loads(read_regular_text(path))
    except (ValueError, RecursionError) as error:  # no UTF-8, no TOML, or nested without end
        raise InputError(f"not a TOML file: {error}", file=path, code="toml-malformed") from None


def read_journal(path: Path) -> list[JournalLine]:
    """Lines of the journal; one torn by a crash is passed over."""
    lines: list[JournalLine] = []
    text = read_regular_bytes(path).decode(errors="replace") if path.exists() else ""
    for row in text.splitlines():
        try:
            line = json.loads(row)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict):
            lines.append(cast(JournalLine, line))
    return lines
