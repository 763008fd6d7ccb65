"""Results of an earlier command are not replaced unless the user says so."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cryoiso.core.errors import UsageError


def refuse_result(out: Path, names: Sequence[str], overwrite: bool, read: Path | None = None) -> list[str]:
    """Names of the files of an earlier result in a folder, which a command is about to replace.

    Args:
        names: of files that a finished command leaves there.
        overwrite: whether they may be replaced.
        read: a file that the command reads, and refuses itself to replace.

    Raises:
        UsageError: there are some, and they are not to be replaced.
    """
    present = [name for name in names if (out / name).exists()]
    if read is not None:
        present = [name for name in present if (out / name).resolve() != read.resolve()]
    if present and not overwrite:
        raise UsageError(
            f"{out} already holds {present[0]}; give --overwrite to replace it, or another folder", code="file-exists"
        )
    return present
