"""The journal of a run: one JSON line for every thing that happened, each on disk before the run goes on."""

from __future__ import annotations

import json
import os
import threading
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryoiso.core.errors import CryoisoError, InputError
from cryoiso.io.atomic import disk_full, is_full
from cryoiso.io.contained_path import require_contained
from cryoiso.io.regular_file import read_regular_bytes
from cryoiso.pipeline.records.hashing import is_outputs

HINT = "Take it from a copy of the run folder, or start a new run."


class Journal:
    """Appends lines to ``journal.jsonl``; only one process writes.

    A line torn by a crash is cut off when the journal is opened again, so that the next line does not run into it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = read_journal(path)
        self._turn = threading.Lock()
        _cut_torn_line(path)

    def append(self, event: str, **facts: Any) -> None:
        """Writes a line and waits until the disk has it.

        Args:
            event: run, resume, start, checkpoint, forecast, end, skip, stop, until, error or done.
            facts: what belongs to it, e.g. stage, key, seconds, outputs; anything JSON can hold.

        Raises:
            DiskFullError: there is no room for it; nothing of it stays.
            CryoisoError: the journal cannot be written, or the run folder is gone.
        """
        with self._turn:
            self._append(event, facts)

    def _append(self, event: str, facts: dict[str, Any]) -> None:
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **facts}
        try:
            _append_line(self.path, json.dumps(line).encode() + b"\n")
        except FileNotFoundError:
            raise CryoisoError(
                f"{self.path.parent}: the run folder was removed while the run worked in it", code="folder-removed"
            ) from None
        except OSError as error:
            if is_full(error):
                raise disk_full(self.path) from error
            raise CryoisoError(
                f"{self.path}: the journal cannot be written: {error.strerror}", code="write-failed"
            ) from error
        self.lines.append(line)

    def last(self, event: str, stage: str) -> dict[str, Any] | None:
        """The latest line of this event and stage."""
        latest = (line for line in reversed(self.lines) if line["event"] == event and line.get("stage") == stage)
        return next(latest, None)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a journal; empty where there is none. What follows the last line's end is left out.

    Raises:
        InputError: a line is no JSON object, lacks what lines of its kind have, or names a file outside of its folder.
    """
    if not path.exists():
        return []
    lines: list[dict[str, Any]] = []
    for number, row in enumerate(read_regular_bytes(path).split(b"\n")[:-1], start=1):
        try:
            line = json.loads(row)
        except (ValueError, RecursionError):
            line = None
        if missing := _missing(line):
            raise InputError(
                "the journal is damaged", file=path, row=number, expected=missing, hint=HINT, code="record-damaged"
            )
        require_contained(path.parent, line.get("outputs", {}), path, number)
        lines.append(line)
    return lines


def _missing(line: Any) -> str:
    """What a line lacks that is read of lines of its kind; empty if nothing."""
    if not isinstance(line, dict):
        return "a JSON object"
    if not all(isinstance(line.get(key), str) for key in ("time", "event")):
        return "time and event"
    try:
        datetime.fromisoformat(line["time"])
    except ValueError:
        return "a time"
    wanted = {"start": ("stage", "key"), "end": ("stage", "key"), "checkpoint": ("stage",)}.get(line["event"], ())
    if not all(isinstance(line.get(key), str) for key in wanted):
        return f"{' and '.join(wanted)} in a line of '{line['event']}'"
    if line["event"] == "end":
        if not isinstance(line.get("seconds"), int | float):
            return "seconds in a line of 'end'"
        if not is_outputs(line.get("outputs")):
            return "outputs with bytes and sha256 in a line of 'end'"
    return "" if isinstance(line.get("outputs", {}), dict) else "outputs"


def _append_line(path: Path, line: bytes) -> None:
    with open(path, "ab", buffering=0) as stream:
        before = stream.seek(0, os.SEEK_END)
        try:
            done = 0
            while done < len(line):
                done += stream.write(line[done:])
            os.fsync(stream.fileno())
        except OSError:
            with suppress(OSError):
                stream.truncate(before)  # else the next line would run into the torn one
            raise


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with open(path, "r+b") as stream:
        data = stream.read()
        last_end = data.rfind(b"\n") + 1
        if last_end < len(data):
            stream.truncate(last_end)
