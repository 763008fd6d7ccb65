"""``cryoiso refine``: poses and two independent half-maps from particles and a reference."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cryoiso.cli.common import echo
from cryoiso.cli.options import RefineKeys, RelionKeys, default, job_of, keys_of, option
from cryoiso.core import products
from cryoiso.core.config import ParticlesSection as P
from cryoiso.core.config import ReferenceSection as R
from cryoiso.core.config import RefineSection as E
from cryoiso.core.config import RunSection as U
from cryoiso.core.config import SampleSection as S


def refine(
    particles: Annotated[Path, typer.Argument(help="Particles: STAR or .cs file, or a folder that 'ingest' wrote.")],
    ref: Annotated[Path, typer.Option("--ref", help="Reference: atomic model (PDB, mmCIF) or map (MRC).")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write into.")],
    symmetry: Annotated[str, option(S, "symmetry")] = default(S, "symmetry"),
    diameter: Annotated[float | None, option(S, "diameter_A")] = None,
    mask: Annotated[str, option(S, "mask")] = "",
    lowpass: Annotated[float, option(R, "lowpass_A")] = default(R, "lowpass_A"),
    ref_pixel_size: Annotated[float | None, option(R, "pixel_size_A")] = None,
    resample: Annotated[bool, option(R, "resample", "--resample")] = default(R, "resample"),
    max_iterations: Annotated[int, option(E, "max_iterations")] = default(E, "max_iterations"),
    healpix_order: Annotated[int, option(E, "healpix_order")] = default(E, "healpix_order"),
    local: Annotated[float | None, option(E, "local_deg", "--local", metavar="DEGREES")] = None,
    shift_range: Annotated[float | None, option(E, "shift_range_A")] = None,
    shift_step: Annotated[float | None, option(E, "shift_step_A")] = None,
    finest_step: Annotated[str, option(E, "finest_step_deg")] = default(E, "finest_step_deg"),
    padding: Annotated[int, option(E, "padding")] = default(E, "padding"),
    join_halves: Annotated[float, option(E, "join_halves_A")] = default(E, "join_halves_A"),
    solvent_mask: Annotated[bool, option(E, "solvent_mask")] = default(E, "solvent_mask"),
    max_resolution: Annotated[float | None, option(E, "max_resolution_A")] = None,
    project: Annotated[str, option(P, "project")] = "",
    passthrough: Annotated[list[str] | None, option(P, "passthrough")] = None,
    invert: Annotated[str, option(P, "invert")] = default(P, "invert"),
    seed: Annotated[int, option(U, "seed")] = default(U, "seed"),
    device: Annotated[str, option(U, "device")] = default(U, "device"),
    scratch: Annotated[str, option(U, "scratch")] = "",
    engine: Annotated[str, option(E, "engine")] = default(E, "engine"),
    refine_keys: RefineKeys = None,
    relion: RelionKeys = None,
    go_on: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted refinement in --out.")] = False,
) -> None:
    """Refine poses with gold-standard halves.

    Writes particles.star, half1.mrc, half2.mrc and refine.json into --out. Ranks share the particles.
    """
    from cryoiso.parallel.abort import on_root
    from cryoiso.parallel.context import get_context
    from cryoiso.pipeline.commands.refine import refine_files

    comm = get_context()
    job = on_root(
        comm, job_of,
        particles={"file": str(particles), "project": project, "passthrough": passthrough, "invert": invert},
        reference={"file": str(ref), "pixel_size_A": ref_pixel_size, "resample": resample, "lowpass_A": lowpass},
        sample={"symmetry": symmetry, "diameter_A": diameter, "mask": mask},
        refine={
            "engine": engine, "max_iterations": max_iterations, "healpix_order": healpix_order, "padding": padding,
            "local_deg": local,
            "shift_range_A": shift_range, "shift_step_A": shift_step, "finest_step_deg": finest_step,
            "join_halves_A": join_halves, "solvent_mask": solvent_mask, "max_resolution_A": max_resolution,
            **keys_of(refine_keys, "--refine"),
        },
        relion=keys_of(relion, "--relion"),
        run={"seed": seed, "device": device, "scratch": scratch},
    )  # fmt: skip
    refine_files(job, out, comm, resume=go_on)
    if comm.rank == 0:
        echo("\n".join(str(out / name) for name in (products.PARTICLES, *products.HALF_MAPS)))
