"""``cryoiso classify``: particles into classes, each with two independent half-maps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cryoiso.cli.common import echo
from cryoiso.cli.groups import (
    COMPUTING,
    GRID,
    IMAGES,
    SAMPLE,
    OutputFolder,
    Overwrite,
    ParticlesOrShards,
    RefineKeys,
    Resume,
)
from cryoiso.cli.options import JobOptions, keys, keys_of, with_keys
from cryoiso.core import products
from cryoiso.core.config import RefineSection

CLASSES = keys(
    "classify", "Classes", "classes", "align", ("local_deg", "--local"), "junk", "lowpass_A", "max_iterations",
    "min_change",
)  # fmt: skip
SEARCH = keys("refine", "Search", "healpix_order", "max_resolution_A")


@with_keys(CLASSES, SAMPLE, GRID, SEARCH, IMAGES, COMPUTING)
def classify(
    particles: ParticlesOrShards,
    out: OutputFolder,
    job_options: JobOptions,
    ref: Annotated[
        list[Path] | None,
        typer.Option(
            "--ref",
            help="First reference of a class, an atomic model or a map; once per class. Default: maps of random "
            "subsets of the particles.",
        ),
    ] = None,
    auxiliary: Annotated[
        Path | None,
        typer.Option(
            "--auxiliary",
            help="Folder of shards with auxiliary particles of known poses ('cryoiso auxiliary generate'): they join "
            "the maps of all classes with equal weight.",
        ),
    ] = None,
    refine_keys: RefineKeys = None,
    go_on: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Sort particles into classes, with gold-standard half-sets in each.

    Writes particles.star with rlnClassNumber, class001.mrc with its half-maps, and so on, and classify.json into --out.
    Ranks share the particles.
    """
    from cryoiso.parallel.abort import on_root
    from cryoiso.parallel.context import get_context
    from cryoiso.pipeline.commands.classify import classify_files
    from cryoiso.pipeline.commands.output import refuse_result

    comm = get_context()
    on_root(comm, refuse_result, out, (products.facts("classify"),), overwrite or go_on)
    job = on_root(
        comm, job_options.job, particles={"file": str(particles)}, reference={"file": ""},
        refine={"solvent_mask": False, **keys_of(refine_keys, "--refine")},
    )  # fmt: skip
    on_root(comm, _require_effect, job.refine)
    classify_files(job, ref or [], out, comm, auxiliary=auxiliary, resume=go_on)
    if comm.rank == 0:
        maps = (products.class_map(number) for number in range(1, job.classify.classes + 1))
        echo("\n".join(str(out / name) for name in (products.PARTICLES, products.facts("classify"), *maps)))


def _require_effect(refine: RefineSection) -> None:
    """Keys of a refinement that a classification ignores are an error."""
    from cryoiso.core.errors import UsageError

    if refine.junk:
        raise UsageError("--refine junk: no effect on a classification; give --junk", code="options-conflict")
    if refine.scale != "none":
        raise UsageError(
            "--refine scale: a classification estimates no intensities, it uses those of the file; leave it out",
            code="options-conflict",
        )
    for key in ("image_mask", "relax_symmetry"):
        if getattr(refine, key) not in ("none", ""):
            raise UsageError(f"--refine {key}: no effect on a classification; leave it out", code="options-conflict")
