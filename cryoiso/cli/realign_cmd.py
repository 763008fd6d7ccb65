"""``cryoiso realign``: a refinement whose references are made isotropic between its iterations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cryoiso.cli.common import echo
from cryoiso.cli.options import RefineKeys, RelionKeys, default, job_of, keys_of, option
from cryoiso.core import products
from cryoiso.core.config import CorrectSection as C
from cryoiso.core.config import ParticlesSection as P
from cryoiso.core.config import RealignSection as L
from cryoiso.core.config import ReferenceSection as R
from cryoiso.core.config import RefineSection as E
from cryoiso.core.config import RunSection as U
from cryoiso.core.config import SampleSection as S


def realign(
    particles: Annotated[Path, typer.Argument(help="Particles: STAR or .cs file, or a folder that 'ingest' wrote.")],
    ref: Annotated[Path, typer.Option("--ref", help="Reference: atomic model (PDB, mmCIF) or map (MRC).")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write into.")],
    auxiliary: Annotated[
        Path | None,
        typer.Option(help="Shards of auxiliary particles ('cryoiso auxiliary generate') to refine together with them."),
    ] = None,
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
    finest_step: Annotated[str, option(E, "finest_step_deg")] = default(E, "finest_step_deg"),
    join_halves: Annotated[float, option(E, "join_halves_A")] = default(E, "join_halves_A"),
    max_resolution: Annotated[float | None, option(E, "max_resolution_A")] = None,
    mode: Annotated[str, option(L, "mode")] = default(L, "mode"),
    source: Annotated[str, option(L, "source")] = default(L, "source"),
    start_step: Annotated[float, option(L, "start_step_deg")] = default(L, "start_step_deg"),
    start_resolution: Annotated[float | None, option(L, "start_resolution_A")] = None,
    keep_lowres: Annotated[float, option(L, "keep_lowres_A")] = default(L, "keep_lowres_A"),
    whitening: Annotated[bool, option(L, "whitening")] = default(L, "whitening"),
    whitening_from: Annotated[float, option(L, "whitening_from_A")] = default(L, "whitening_from_A"),
    fsc_weighting: Annotated[bool, option(L, "fsc_weighting")] = default(L, "fsc_weighting"),
    correct: Annotated[bool, option(L, "correct")] = default(L, "correct"),
    retrain: Annotated[str, option(L, "retrain")] = default(L, "retrain"),
    epochs: Annotated[int | None, option(L, "epochs")] = None,
    lowpass_references: Annotated[bool, option(L, "lowpass")] = default(L, "lowpass"),
    match_scale: Annotated[bool, option(L, "match_scale")] = default(L, "match_scale"),
    preset: Annotated[str, option(C, "preset")] = default(C, "preset"),
    sub_maps: Annotated[int | None, option(C, "sub_maps")] = None,
    cube: Annotated[int | None, option(C, "cube_px")] = None,
    learning_rate: Annotated[float | None, option(C, "learning_rate")] = None,
    rotations: Annotated[str, option(C, "rotations")] = default(C, "rotations"),
    cone: Annotated[float, option(C, "cone_deg")] = default(C, "cone_deg"),
    keep_measured: Annotated[bool, option(C, "keep_measured")] = default(C, "keep_measured"),
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
    """Refine poses with gold-standard halves and isotropic references.

    As 'refine'; but after each iteration a network corrects the anisotropy of the references that the next one searches
    with. Writes particles.star, half1.mrc, half2.mrc (which no network has touched) and refine.json into --out, the
    networks into correction/. Ranks share the particles, and train together.
    """
    from cryoiso.parallel.abort import on_root
    from cryoiso.parallel.context import get_context
    from cryoiso.pipeline.commands.realign import realign_files

    comm = get_context()
    job = on_root(
        comm, job_of,
        particles={"file": str(particles), "project": project, "passthrough": passthrough, "invert": invert},
        reference={"file": str(ref), "pixel_size_A": ref_pixel_size, "resample": resample, "lowpass_A": lowpass},
        sample={"symmetry": symmetry, "diameter_A": diameter, "mask": mask},
        refine={
            "engine": engine, "max_iterations": max_iterations, "healpix_order": healpix_order, "local_deg": local,
            "shift_range_A": shift_range, "finest_step_deg": finest_step, "join_halves_A": join_halves,
            "max_resolution_A": max_resolution, **keys_of(refine_keys, "--refine"),
        },
        realign={
            "mode": mode, "source": source, "start_step_deg": start_step, "start_resolution_A": start_resolution,
            "keep_lowres_A": keep_lowres, "whitening": whitening, "whitening_from_A": whitening_from,
            "fsc_weighting": fsc_weighting, "correct": correct, "retrain": retrain, "epochs": epochs,
            "lowpass": lowpass_references, "match_scale": match_scale,
        },
        correct={
            "preset": preset, "sub_maps": sub_maps, "cube_px": cube, "learning_rate": learning_rate,
            "rotations": rotations, "cone_deg": cone, "keep_measured": keep_measured,
        },
        relion=keys_of(relion, "--relion"),
        run={"workflow": "realign", "seed": seed, "device": device, "scratch": scratch},
    )  # fmt: skip
    realign_files(job, out, comm, auxiliary=auxiliary, resume=go_on)
    if comm.rank == 0:
        echo("\n".join(str(out / name) for name in (products.PARTICLES, *products.HALF_MAPS)))
