"""Results of an earlier command are not replaced unless the user says so."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cryoiso.core.errors import UsageError


def refuse_result(out: Path, names: Sequence[str], overwrite: bool) -> list[str]:
    """Names of the files of an earlier result in a folder, which a command is about to replace.

    Args:
        names: of files that a finished command leaves there.
        overwrite: whether they may be replaced.

    Raises:
        UsageError: there are some, and they are not to be replaced.
    """
    present = [name for name in names if (out / name).exists()]
    if present and not overwrite:
        raise UsageError(
            f"{out} already holds {present[0]}; give --overwrite to replace it, or another folder", code="file-exists"
        )
    return present
