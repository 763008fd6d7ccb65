"""``cryoiso ctf-refine``: defocus, astigmatism and beam tilt at given poses."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cryoiso.cli.common import echo
from cryoiso.cli.groups import IMAGES, SAMPLE, OutputFolder, Overwrite, Posed
from cryoiso.cli.options import JobOptions, keys, with_keys
from cryoiso.core import products

PARAMETERS, REFERENCE = "Parameters", "Reference"
HEADER = keys("reference", REFERENCE, ("pixel_size_A", "--ref-pixel-size"))


class MicrographChoice(StrEnum):
    """What is fitted per micrograph."""

    NONE = "none"
    DEFOCUS = "defocus"
    ASTIGMATISM = "astigmatism"


class TiltChoice(StrEnum):
    """What is fitted per optics group."""

    NONE = "none"
    TILT = "tilt"
    TREFOIL = "trefoil"


@with_keys(SAMPLE, HEADER, IMAGES, keys("run", "Computing", "seed"))
def ctf_refine(
    particles: Posed,
    out: OutputFolder,
    job_options: JobOptions,
    half1: Annotated[
        Path | None, typer.Option(help="Half-map of the particles of half-set 1.", rich_help_panel=REFERENCE)
    ] = None,
    half2: Annotated[
        Path | None, typer.Option(help="Half-map of the particles of half-set 2.", rich_help_panel=REFERENCE)
    ] = None,
    ref: Annotated[
        Path | None,
        typer.Option(help="One map for both half-sets instead, low-passed at --resolution.", rich_help_panel=REFERENCE),
    ] = None,
    resolution: Annotated[
        float | None,
        typer.Option(
            min=0.1, help="Finest resolution used (default: where the half-map FSC falls below 0.143).  [Å]",
            rich_help_panel=REFERENCE,
        ),
    ] = None,
    per_particle: Annotated[
        bool,
        typer.Option("--per-particle/--no-per-particle", help="Defocus per particle.", rich_help_panel=PARAMETERS),
    ] = True,
    micrographs: Annotated[
        MicrographChoice,
        typer.Option(help="Per micrograph: defocus, or defocus and astigmatism.", rich_help_panel=PARAMETERS),
    ] = MicrographChoice.NONE,
    beam_tilt: Annotated[
        TiltChoice,
        typer.Option(help="Per optics group: beam tilt, or beam tilt and trefoil.", rich_help_panel=PARAMETERS),
    ] = TiltChoice.NONE,
    range_A: Annotated[
        float, typer.Option("--range", help="Largest change of defocus.  [Å]", rich_help_panel=PARAMETERS)
    ] = 2000.0,
    prior_sd: Annotated[
        float | None,
        typer.Option(
            help="Prior standard deviation of the particles' changes (default: estimated).  [Å]",
            rich_help_panel=PARAMETERS,
        ),
    ] = None,
    control: Annotated[
        int,
        typer.Option(
            min=0, help="Particles compared with a reference of random phases; 0: none.", rich_help_panel=PARAMETERS
        ),
    ] = 500,
    overwrite: Overwrite = False,
) -> None:  # fmt: skip
    """Refine defocus, astigmatism and beam tilt at given poses.

    Each half-set is compared with its own half-map. Writes particles.star with all columns of the input,
    ctf_refine.json and ctf_refine.png. The images are read from their stacks, without shards. Ranks share the
    particles.
    """
    from cryoiso.methods.ctf_refinement.settings import CtfRefinementSettings
    from cryoiso.parallel.abort import on_root
    from cryoiso.parallel.context import get_context
    from cryoiso.pipeline.commands.ctf_refine import FACTS, ReferenceChoice, ctf_refine_files
    from cryoiso.pipeline.commands.output import refuse_result

    comm = get_context()
    on_root(comm, refuse_result, out, (FACTS, products.PARTICLES), overwrite, particles)
    job = on_root(comm, job_options.job, particles={"file": str(particles)}, reference={"file": "-"})
    choice = on_root(comm, ReferenceChoice, ref, (half1, half2), resolution)
    settings = on_root(
        comm, CtfRefinementSettings, range_A, prior_sd, per_particle, micrographs.value, beam_tilt.value, control,
        job.run.seed,
    )  # fmt: skip
    facts, shown = ctf_refine_files(job, choice, settings, out, comm)
    if comm.rank == 0:
        _draw(out / "ctf_refine.png", shown)
        echo("\n".join(_lines(facts)))
        echo(f"{out / products.PARTICLES}; all numbers: {out / FACTS}")


def _draw(path: Path, shown: dict[str, Any]) -> None:
    from cryoiso.io.atomic import atomic_write
    from cryoiso.report.canvas import decoded
    from cryoiso.report.ctf_figures import defocus_changes

    with atomic_write(path) as stream:
        stream.write(decoded(defocus_changes(**shown)))


def _lines(facts: dict[str, Any]) -> list[str]:
    particle_facts, lines = facts["particles"], []
    if facts["settings"]["particles"] and particle_facts["prior_sd_A"] == 0:
        lines.append(
            f"defocus of {particle_facts['count']:,} particles: no change beyond noise was found, none is made"
        )
    elif facts["settings"]["particles"]:
        lines.append(
            f"defocus of {particle_facts['count']:,} particles: prior {particle_facts['prior_sd_A']:.0f} Å, "
            f"estimated error "
            f"{particle_facts['estimated_error_A']:.0f} Å, {100 * particle_facts['at_limit']:.1f} % at the limit"
        )
    if facts["micrograph_fit"] is not None:
        width = facts["micrograph_fit"]["prior_sd_A"]
        lines.append(f"defocus of {len(facts['micrographs']):,} micrographs: prior {width:.0f} Å")
    if facts["tilt_plane"] is not None:
        plane = facts["tilt_plane"]
        words = f"tilt that {plane['micrographs']:,} micrographs share: {plane['tilt_deg']:.1f} ± "
        lines.append(f"{words}{plane['tilt_error_deg']:.1f} degrees; median of theirs {plane['median_tilt_deg']:.1f}")
    for number, fits in facts.get("optics_groups", {}).items():
        x, y = fits[-1]["tilt_mrad"]
        error = max(fits[-1]["tilt_error_mrad"])
        kept = "" if any(fit["significant"] for fit in fits) else ", unchanged: no significant tilt"
        lines.append(f"beam tilt of optics group {number}: {x:.3f}, {y:.3f} ± {error:.3f} mrad{kept}")
    return lines
