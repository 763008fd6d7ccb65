"""Which version of the program made a run folder, and whether this one may go on with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from cryoiso import __version__
from cryoiso.core.errors import InputError, UsageError
from cryoiso.pipeline.records.environment import package_versions
from cryoiso.pipeline.records.manifest import SCHEMA
from cryoiso.pipeline.records.manifest_record import Manifest

T = TypeVar("T")
SHOWN = ("torch", "numpy")
"""Packages that are named with the version of the program."""


def require_schema(manifest: Manifest, path: Path) -> None:
    """Stops at a run folder whose records are laid out in another way.

    Raises:
        InputError: names the schema and the version that wrote it.
    """
    schema = manifest.get("schema")
    if schema != SCHEMA:
        raise InputError(
            "the records of this run are those of another version of the program", file=path,
            expected=f"schema {SCHEMA}, cryoiso {__version__}",
            found=f"schema {schema}, cryoiso {manifest.get('cryoiso', 'unknown')}",
            hint="Use the version that made the run.", code="version-mismatch",
        )  # fmt: skip


def require_version(manifest: Manifest, path: Path, other_version: bool) -> None:
    """Stops where another version of the program worked on a run last: it would not make the bits of what is finished.

    Args:
        other_version: the user knows, and goes on with this version.

    Raises:
        InputError: another schema, or another version and not ``other_version``.
    """
    require_schema(manifest, path)
    last = last_version(manifest)
    if last != __version__ and not other_version:
        raise InputError(
            "another version of the program made this run: finished stages would not be bit-identical",
            file=path, expected=f"cryoiso {__version__}", found=f"cryoiso {last}",
            hint="Use that version. To continue anyway: 'cryoiso resume --other-version'; the journal "
            "and the manifest then name both.", code="version-mismatch",
        )  # fmt: skip


def last_version(manifest: Manifest) -> str:
    """The version that worked on a run last."""
    starts = manifest.get("starts") or [{}]
    return str(starts[-1].get("cryoiso") or manifest.get("cryoiso") or "unknown")


def of_run(manifest: Manifest) -> list[str]:
    """All versions that worked on a run, in order."""
    starts = [str(start["cryoiso"]) for start in manifest.get("starts") or [] if start.get("cryoiso")]
    return list(dict.fromkeys(starts or [last_version(manifest)]))


def made_by(manifest: Manifest) -> str:
    """In words: the versions of the program, its commit and the packages of the last start."""
    if not manifest:
        return ""
    start = (manifest.get("starts") or [{}])[-1]
    packages = start.get("packages") or {}
    facts = [f"{name} {packages[name]}" for name in SHOWN if packages.get(name)]
    commit = (start.get("git") or {}).get("commit", "")
    return ", ".join(
        [f"cryoiso {', then '.join(of_run(manifest))}", *([f"commit {commit[:10]}"] * bool(commit)), *facts]
    )


def notes(manifest: Manifest, now: dict[str, str] | None = None) -> list[str]:
    """In words, what of the program and its packages is not as in a run's last start.

    Args:
        now: the packages here; None: looked up.
    """
    lines, last = [], last_version(manifest)
    if manifest and last != __version__:
        lines.append(f"made by cryoiso {last}, this is {__version__}")
    before = ((manifest.get("starts") or [{}])[-1].get("packages")) or {}
    here = package_versions() if now is None else now
    other = [
        f"{name} {before[name]}, here {here[name] or 'none'}"
        for name in here
        if before.get(name, here[name]) != here[name]
    ]
    if other:
        lines.append(f"made with other packages, so that last bits may differ: {'; '.join(other)}")
    return lines


def understood(manifest: Manifest, path: Path, read: Callable[[], T]) -> T:
    """What ``read`` makes of a run's job; where it cannot because another version wrote it, the error says so.

    Raises:
        InputError: another version wrote it.
        UsageError: it is damaged.
    """
    try:
        return read()
    except UsageError as error:
        if not manifest or last_version(manifest) == __version__:
            raise
        raise InputError(
            f"cryoiso {last_version(manifest)} made this run, and this is {__version__}, which cannot read its "
            f"job: {error}", file=path, hint="Use the version that made the run.", code="version-mismatch",
        ) from None  # fmt: skip
