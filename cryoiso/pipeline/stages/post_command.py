"""The user's own post-processing of each half's map between rounds (EMReady, DeepEMhancer, a sharpening script...)."""

from __future__ import annotations

import logging
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

from cryoiso.core.commands import fill_words, split_command
from cryoiso.core.errors import CryoisoError, Interrupted, MissingError, UsageError
from cryoiso.io.mrc import read_map, write_map
from cryoiso.parallel import signals
from cryoiso.pipeline.inputs.grids import require_grid

logger = logging.getLogger("cryoiso")
KEY = "auxiliary.post_command"
POLL_S = 0.2
TAIL = 2000


def arguments(template: str, **values: object) -> list[str]:
    """The command as a list of arguments; no shell sees it.

    Raises:
        UsageError: an unknown placeholder, {output} is missing, or quotes that do not close.
    """
    parts = split_command(template, KEY)
    words = fill_words(parts, values, KEY)
    if not any("{output}" in part for part in parts) or not any("{input}" in part for part in parts):
        raise UsageError(
            "auxiliary.post_command: needs {input} and {output}, the maps that it reads and writes",
            code="placeholder-missing",
        )
    return words


def check_template(template: str) -> None:
    """Raises the errors of ``arguments`` before anything runs."""
    arguments(template, input="in.mrc", output="out.mrc", half=1, round=1, pixel_size="1")


def post_process(template: str, source: Path, target: Path, half: int, round_: int) -> None:
    """Runs the command on one half's map; its output must be a map on the same grid.

    Raises:
        MissingError: there is no such program.
        CryoisoError: it failed or wrote no map; with the end of what it printed.
        InputError: its map is on another grid.
        Interrupted: a signal came; the command was ended.
    """
    original = read_map(source)
    raw = target.with_name(f"{target.stem}_raw.mrc")
    raw.unlink(missing_ok=True)
    words = arguments(
        template, input=source, output=raw, half=half, round=round_, pixel_size=f"{original.pixel_size_A:.6g}"
    )  # fmt: skip
    log = target.with_suffix(".log")
    logger.info("round %d, half %d: %s", round_, half, shlex.join(words))
    with open(log, "w", encoding="utf-8", errors="replace") as stream:
        status = _run(words, stream, source.parent)
    if status or not raw.is_file():
        tail = log.read_text(encoding="utf-8", errors="replace")[-TAIL:].strip()
        what = f"ended with status {status}" if status else f"ended well but wrote no {raw.name}"
        raise CryoisoError(f"auxiliary.post_command {what}: {shlex.join(words)}\n{tail}", code="post-command-failed")
    processed = read_map(raw, original.pixel_size_A)
    require_grid(processed, original.box_px, original.pixel_size_A, raw, "the map that it was made from")
    write_map(target, processed.data, original.pixel_size_A)
    raw.unlink()


def _run(words: list[str], stream: Any, folder: Path) -> int:
    try:
        process = subprocess.Popen(
            words, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=folder
        )  # fmt: skip
    except (FileNotFoundError, PermissionError) as error:
        raise MissingError(
            f"auxiliary.post_command: cannot run '{words[0]}': {error.strerror}. Give its path or load its module.",
            code="program-missing",
        ) from None
    try:
        while process.poll() is None:
            if signals.stop_signal():
                raise Interrupted("stopped by a signal during the post-processing")
            time.sleep(POLL_S)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    return int(process.returncode)
