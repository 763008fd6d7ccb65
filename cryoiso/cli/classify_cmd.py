"""``cryoiso classify``: particles into classes, each with two independent half-maps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cryoiso.cli.common import echo
from cryoiso.cli.options import RefineKeys, default, job_of, keys_of, option
from cryoiso.core.classify_settings import ClassifySection as C
from cryoiso.core.config import ParticlesSection as P
from cryoiso.core.config import ReferenceSection as R
from cryoiso.core.config import RefineSection as E
from cryoiso.core.config import RunSection as U
from cryoiso.core.config import SampleSection as S


def classify(
    particles: Annotated[Path, typer.Argument(help="Particles: STAR or .cs file, or a folder that 'ingest' wrote.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write into.")],
    classes: Annotated[int, option(C, "classes")] = default(C, "classes"),
    ref: Annotated[
        list[Path] | None,
        typer.Option("--ref", help="First reference of a class, model or map; once per class. None: random subsets."),
    ] = None,
    align: Annotated[str, option(C, "align")] = default(C, "align"),
    local: Annotated[float, option(C, "local_deg", "--local", metavar="DEGREES")] = default(C, "local_deg"),
    junk: Annotated[bool, option(C, "junk", "--junk")] = default(C, "junk"),
    lowpass: Annotated[float, option(C, "lowpass_A")] = default(C, "lowpass_A"),
    max_iterations: Annotated[int, option(C, "max_iterations")] = default(C, "max_iterations"),
    min_change: Annotated[float, option(C, "min_change")] = default(C, "min_change"),
    symmetry: Annotated[str, option(S, "symmetry")] = default(S, "symmetry"),
    diameter: Annotated[float | None, option(S, "diameter_A")] = None,
    mask: Annotated[str, option(S, "mask")] = "",
    ref_pixel_size: Annotated[float | None, option(R, "pixel_size_A")] = None,
    resample: Annotated[bool, option(R, "resample", "--resample")] = default(R, "resample"),
    healpix_order: Annotated[int, option(E, "healpix_order")] = default(E, "healpix_order"),
    max_resolution: Annotated[float | None, option(E, "max_resolution_A")] = None,
    project: Annotated[str, option(P, "project")] = "",
    passthrough: Annotated[list[str] | None, option(P, "passthrough")] = None,
    invert: Annotated[str, option(P, "invert")] = default(P, "invert"),
    normalise: Annotated[bool, option(P, "normalise")] = default(P, "normalise"),
    seed: Annotated[int, option(U, "seed")] = default(U, "seed"),
    device: Annotated[str, option(U, "device")] = default(U, "device"),
    refine_keys: RefineKeys = None,
    go_on: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted classification in --out.")] = False,
) -> None:
    """Sort particles into classes, with gold-standard halves in each.

    Writes particles.star with rlnClassNumber, class001.mrc with its half-maps, and so on, and classify.json into --out.
    Ranks share the particles.
    """
    from cryoiso.core.classify_settings import parse_classify
    from cryoiso.parallel.abort import on_root
    from cryoiso.parallel.context import get_context
    from cryoiso.pipeline.commands.classify import classify_files

    comm = get_context()
    settings = on_root(comm, parse_classify, {
        "classes": classes, "align": align, "local_deg": local, "junk": junk, "lowpass_A": lowpass,
        "max_iterations": max_iterations, "min_change": min_change,
    })  # fmt: skip
    job = on_root(
        comm, job_of,
        particles={
            "file": str(particles), "project": project, "passthrough": passthrough, "invert": invert,
            "normalise": normalise,
        },
        reference={"file": "", "pixel_size_A": ref_pixel_size, "resample": resample, "lowpass_A": lowpass},
        sample={"symmetry": symmetry, "diameter_A": diameter, "mask": mask},
        refine={
            "healpix_order": healpix_order, "max_resolution_A": max_resolution, "solvent_mask": False,
            **keys_of(refine_keys, "--refine"),
        },
        run={"seed": seed, "device": device},
    )  # fmt: skip
    classify_files(job, settings, ref or [], out, comm, resume=go_on)
    if comm.rank == 0:
        names = ["particles.star", "classify.json", *(f"class{k:03d}.mrc" for k in range(1, settings.classes + 1))]
        echo("\n".join(str(out / name) for name in names))
