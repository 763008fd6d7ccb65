"""``cryoiso rebalance``: a subset of particles with even views."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cryoiso.cli.common import echo
from cryoiso.cli.groups import SYMMETRY, Overwrite
from cryoiso.cli.options import JobOptions, keys, with_keys


class Better(StrEnum):
    """Which values of a column are better."""

    HIGHER = "higher"
    LOWER = "lower"


@with_keys(SYMMETRY, keys("particles", "Images", "passthrough"), keys("run", "Computing", "seed"))
def rebalance(
    job_options: JobOptions,
    particles: Annotated[Path, typer.Argument(help="Particles with poses: a STAR or .cs file of a refinement.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write into.")] = Path("rebalanced"),
    cap: Annotated[int | None, typer.Option(min=1, help="Most particles of a cone of views.")] = None,
    keep: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Fraction of the particles to keep at least; the cap follows from it."),
    ] = None,
    quality: Annotated[
        str,
        typer.Option(
            help="Column that ranks the particles of a cone; 'auto': rlnMaxValueProbDistribution, "
            "rlnLogLikeliContribution or cryoisoPoseEntropy, whichever is there first; 'random': none."
        ),
    ] = "auto",
    better: Annotated[
        Better | None, typer.Option(help="Which values of the column are better, where that is not known.")
    ] = None,
    cone: Annotated[float, typer.Option(min=1.0, max=90.0, help="Width of a cone of views.  [degrees]")] = 10.0,
    overwrite: Overwrite = False,
) -> None:
    """Cap the particles of every viewing direction.

    Of each cone of views the best particles are kept, as many as the cap says; cones below the cap lose none. Writes
    particles_kept and particles_discarded in the format of the input, rebalance.json with counts and sampling before
    and after, and views.png.
    """
    from cryoiso.pipeline.commands.output import refuse_result
    from cryoiso.pipeline.commands.rebalance import FACTS, QualityChoice, rebalance_files
    from cryoiso.report.canvas import decoded
    from cryoiso.report.figures import view_discs

    refuse_result(out, (FACTS,), overwrite)
    job = job_options.job(particles={"file": str(particles)}, reference={"file": "-"})
    choice = QualityChoice(quality, better.value if better else None)
    facts, views = rebalance_files(
        particles, out, job.sample.symmetry, choice, cap=cap, keep=keep, cone_deg=cone, seed=job.run.seed,
        passthrough=job.particles.passthrough,
    )  # fmt: skip
    picture = view_discs([(name, part, part["cells_per_ring"]) for name, part in views.items()])
    _write(out / "views.png", decoded(picture))
    echo("\n".join(_lines(facts)))
    echo(f"all numbers: {out / FACTS}")


def _write(path: Path, content: bytes) -> None:
    from cryoiso.io.atomic import atomic_write

    with atomic_write(path) as stream:
        stream.write(content)


def _lines(facts: dict[str, Any]) -> list[str]:
    share = 100 * facts["kept"] / facts["particles"]
    first, last = facts["before"], facts["after"]
    rows = [
        ("SCF of the views", "sampling", "scf"),
        ("SCF* of the views", "sampling", "scf_star"),
        ("views, entropy over that of even ones", "views", "entropy"),
        ("views, fullest direction over the mean", "views", "peak_over_mean"),
    ]
    return [
        f"kept {facts['kept']:,} of {facts['particles']:,} particles ({share:.1f} %), at most {facts['cap']:,} per "
        f"cone; {facts['cones_capped']:,} of {len(facts['cones']):,} cones were above, {facts['cones_empty']:,} are "
        "empty",
        *(f"{label:48s} {first[part][key]:8.3f} -> {last[part][key]:.3f}" for label, part, key in rows),
    ]
