"""``cryoiso convert``: particle files of cryoSPARC, RELION and cryoDRGN."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cryoiso.cli.common import echo
from cryoiso.cli.options import JobOptions, keys, with_keys


class Unconverted(StrEnum):
    """What to do with what the other format has no known place for."""

    REFUSE = "refuse"
    CARRY = "carry"


class Target(StrEnum):
    """Programs that take a folder of files."""

    CRYODRGN = "cryodrgn"


@with_keys(
    keys("sample", "Sample", "symmetry", open=True), keys("particles", "Images", "project", "passthrough")
)  # fmt: skip
def convert(
    job_options: JobOptions,
    source: Annotated[Path, typer.Argument(metavar="IN", help="Particles: a STAR or .cs file.")],
    out: Annotated[
        Path | None,
        typer.Argument(metavar="OUT", help="File to write, .star or .cs; with --to: a folder.", show_default=False),
    ] = None,
    to: Annotated[
        Target | None,
        typer.Option(
            help="OUT is a folder with poses.pkl, ctf.pkl and particles.star, for cryoDRGN, DRGN-AI and recovar; IN "
            "may be the folder of a run.",
            show_default=False,
        ),
    ] = None,
    identity: Annotated[
        bool, typer.Option("--identity", help="Print a hash of particles and half-sets, the same in both formats.")
    ] = False,
    carried: Annotated[
        str,
        typer.Option(
            help="Side table of IN, from the conversion that IN or its ancestor came from; 'none': do not use one.  "
            "[default: the one beside IN]",
            show_default=False,
        ),
    ] = "",
    unconverted: Annotated[
        Unconverted,
        typer.Option(
            help="Aberrations and flags that the other format has no known place for: stop with an error, or leave "
            "them to the side table."
        ),
    ] = Unconverted.REFUSE,
    csdat: Annotated[
        bool, typer.Option("--csdat", help="Write the compressed .cs format (needs cryosparc-tools).")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
) -> None:
    """Convert particles between cryoSPARC (.cs) and RELION (.star), or for cryoDRGN.

    What OUT has no place for goes into a side table beside it (OUT's name with .carried) and is restored on the way
    back; uids, poses, half-sets, optics and every other column are kept.
    """
    from cryoiso.core.errors import UsageError
    from cryoiso.pipeline.commands.convert import Conversion, convert_files, identity_of_file

    if out is None and (to is not None or not identity):
        raise UsageError("name the file or folder to write, or give --identity", code="option-missing")
    job = job_options.job(particles={"file": str(source)}, reference={"file": "-"})
    symmetry = job.sample.symmetry if "sample" in job_options.sections else None
    passthrough = job.particles.passthrough
    if to is not None:
        _hand_over(source, out, symmetry or "C1", job.particles, overwrite)
        return
    if out is not None:
        how = Conversion(
            symmetry, passthrough, job.particles.project, carried, unconverted.value, csdat, overwrite
        )  # fmt: skip
        echo("\n".join(_lines(out, convert_files(source, out, how))))
    if identity:
        for file, more in ((source, passthrough), *([(out, ())] if out is not None else [])):
            frame, count = identity_of_file(file, more)
            echo(f"{frame}  {file} ({count:,} particles)")


def _hand_over(source: Path, out: Path | None, symmetry: str, images: Any, overwrite: bool) -> None:
    from cryoiso.pipeline.commands.hand_over import hand_over

    assert out is not None
    facts = hand_over(source, out, symmetry, images.project, images.passthrough, overwrite=overwrite)
    left = f" ({facts['left_out']:,} auxiliary ones are left out)" if facts["left_out"] else ""
    echo(f"{facts['particles']:,} particles of {facts['box_px']} px of {facts['pixel_size_A']:g} Å{left}: {out}")
    contrast = {1: "bright: --uninvert-data", -1: "dark: without --uninvert-data", 0: "not known: look at them"}
    echo(f"protein in the images: {contrast[facts['sign']]}")


def _lines(out: Path, facts: dict[str, Any]) -> list[str]:
    lines = [f"{facts['particles']:,} particles: {out}"]
    if facts["restored_from"]:
        changed = ", ".join(f"{name} ({rows:,} rows)" for name, rows in facts["changed"].items())
        lines.append(f"restored from {facts['restored_from']}; changed since then: {changed or 'nothing'}")
    if facts["side_table"]:
        lines.append(f"keep for the way back: {facts['side_table']}")
    return lines
