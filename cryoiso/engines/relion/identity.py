"""What a RELION run was begun with, in a file beside it: RELION's own files do not tell."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from cryoiso.core.config import RelionSection
from cryoiso.core.errors import InputError
from cryoiso.core.identity import HINT, Identity, plain, require_same
from cryoiso.core.protocols import RefineRequest
from cryoiso.io.atomic import write_text
from cryoiso.refine.identity import of_request

FILE = "identity.json"
WITH_VALUE = ("--gpu", "--j", "--pool", "--scratch_dir", "--keep_free_scratch", "--verb")
ALONE = (
    "--preread_images", "--no_parallel_disc_io", "--dont_combine_weights_via_disc", "--free_gpu_memory",
    "--reuse_scratch", "--fast_subsets_off",
)  # fmt: skip
"""Arguments of RELION that say where it computes, not what."""


def identity_of(request: RefineRequest, section: RelionSection, diameter_A: float) -> Identity:
    """Everything that decides what RELION finds. The order of the rows counts: exported stacks are in it."""
    program = {
        "auto_local_order": section.auto_local_order, "offset_range_px": section.offset_range_px,
        "offset_step_px": section.offset_step_px, "images": section.images,
        "extra": " ".join(deciding(section.extra)),
    }  # fmt: skip
    return {**of_request(request, diameter_A, ordered=True), "relion": program}


def deciding(extra: str) -> list[str]:
    """The words of ``relion.extra`` but for those that only say where RELION computes.

    >>> deciding("--gpu 0:1 --ini_high 20 --preread_images")
    ['--ini_high', '20']
    """
    words, found = shlex.split(extra), []
    while words:
        word = words.pop(0)
        if word in WITH_VALUE:
            if words and not words[0].startswith("--"):
                words.pop(0)
        elif word not in ALONE:
            found.append(word)
    return found


def note(folder: Path, identity: Identity) -> None:
    """Writes down what a run begins with."""
    write_text(folder / FILE, json.dumps(plain(identity), indent=1) + "\n")


def require_begun_with(folder: Path, identity: Identity) -> None:
    """
    Raises:
        InputError: the run in this folder was begun with something else, or nothing tells with what.
    """
    require_same(_read(folder / FILE), identity, folder / FILE, "RELION run")


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot be read: {error}", file=file, hint=HINT) from None
