"""SHA256SUMS: the checksums of a folder, in the form that ``sha256sum -c`` reads."""

from __future__ import annotations

from pathlib import Path

from cryoiso.core import products
from cryoiso.core.errors import InputError
from cryoiso.io.atomic import write_text
from cryoiso.io.contained_path import require_contained
from cryoiso.pipeline.records.hashing import sha256_of


def sum_line(name: str, sha256: str) -> str:
    """A line as sha256sum prints and checks it.

    >>> sum_line("a.mrc", "0f")
    '0f  a.mrc\\n'
    """
    return f"{sha256}  {name}\n"


def write_sums(folder: Path) -> Path:
    """Lists every file of a folder, but the list itself and temporary ones, in the order of their names."""
    names = sorted(
        str(p.relative_to(folder))
        for p in folder.rglob("*")
        if p.is_file() and p.suffix != ".part" and p != folder / products.SUMS
    )
    write_text(folder / products.SUMS, "".join(sum_line(name, sha256_of(folder / name)) for name in names))
    return folder / products.SUMS


def read_sums(path: Path) -> dict[str, str]:
    """File name -> SHA-256 as the list says; empty where there is none.

    Raises:
        InputError: a line that is not as sha256sum writes it, or names a file outside of the folder.
    """
    sums: dict[str, str] = {}
    if not path.is_file():
        return sums
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot be read: {error}", file=path, expected="lines of sha256sum in UTF-8", code="file-unreadable"
        ) from None
    for number, line in enumerate(lines, start=1):
        sha256, gap, name = line[:64], line[64:66], line[66:]
        if gap not in ("  ", " *") or len(sha256) != 64 or not name:
            raise InputError(
                "not a line of sha256sum",
                file=path,
                row=number,
                expected="SHA256  NAME",
                found=line[:80],
                code="record-damaged",
            )
        require_contained(path.parent, [name], path, number)
        sums[name] = sha256
    return sums
