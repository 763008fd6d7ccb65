"""``cryoiso symmetry``: propose the point group of a map."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cryoiso.cli.common import echo
from cryoiso.cli.groups import Overwrite

if TYPE_CHECKING:
    from cryoiso.physics.symmetry_proposal import Proposal


def symmetry(
    map1: Annotated[Path, typer.Argument(metavar="MAP", help="Map refined in C1 (MRC), or its first half-map.")],
    map2: Annotated[Path | None, typer.Argument(metavar="HALF2", help="The second half-map.")] = None,
    particles: Annotated[
        Path | None, typer.Option(help="STAR or .cs file with the poses, to be rotated with the map.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder to write into.")] = Path("symmetry"),
    max_fold: Annotated[int, typer.Option(min=2, max=100, help="Largest n of Cn and Dn.")] = 12,
    pixel_size: Annotated[float | None, typer.Option(help="Pixel size, if the headers are wrong.  [Å]")] = None,
    overwrite: Overwrite = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of lines.")] = False,
) -> None:
    """Propose the point group of a map that was refined without one.

    Tests Cn and Dn, T, O and I about all axes, against random rotations. Two half-maps tell a symmetric particle from
    one that is only nearly so. Writes symmetry.json and, if a group was found, the maps and particles in its standard
    frame. Nothing is imposed.
    """
    from cryoiso.pipeline.commands.output import refuse_result
    from cryoiso.pipeline.commands.symmetry import FACTS, symmetry_files

    refuse_result(out, (FACTS,), overwrite)
    proposal, written = symmetry_files(
        map1, map2, out, particles=particles, max_fold=max_fold, pixel_size_A=pixel_size
    )  # fmt: skip
    if as_json:
        import json

        echo(json.dumps({**proposal.facts(), "files": [str(path) for path in written]}, indent=2, ensure_ascii=False))
        return
    echo("\n".join(_lines(proposal)))
    echo("\n".join(str(path) for path in written))


def _lines(proposal: Proposal) -> list[str]:
    null = proposal.folds[0]
    lines = [f"fold  correlation  (random rotations: {null.null_mean:.2f} on average, 90 % below {null.null_high:.2f})"]
    lines += [f"{test.fold:4d}  {test.score:11.2f}" + ("  *" if test.stands_out else "") for test in proposal.folds]
    if any(test.stands_out for test in proposal.folds):
        lines.append("* stands out of the random rotations")
    if proposal.groups:
        lines.append("group  correlation  over half-maps")
    for test in proposal.groups:
        ratio = "-" if test.ratio is None else f"{test.ratio:.3f}"
        lines.append(f"{test.group:5s}  {test.frame.score:11.2f}  {ratio:>14s}  {test.finding}")
    return [*lines, proposal.words]
