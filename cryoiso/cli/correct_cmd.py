"""``cryoiso correct``: anisotropy correction of half-maps, or of one map with a known missing cone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cryoiso.cli.common import echo
from cryoiso.cli.options import default, job_of, option
from cryoiso.core import products
from cryoiso.core.config import CorrectSection as C
from cryoiso.core.config import RunSection as U


def correct(
    half1: Annotated[Path, typer.Argument(help="First half-map (MRC), neither masked nor filtered; or the only map.")],
    half2: Annotated[Path | None, typer.Argument(help="Second half-map.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder to write into.")] = Path("corrected"),
    mask: Annotated[Path | None, typer.Option(help="Solvent mask (MRC). Default: made from the maps.")] = None,
    mode: Annotated[str, option(C, "mode")] = default(C, "mode"),
    missing_cone: Annotated[
        float | None, typer.Option(help="Half angle of a cone in Fourier space that was not measured. In degrees.")
    ] = None,
    axis: Annotated[tuple[float, float, float], typer.Option(help="Axis of that cone (x, y, z).")] = (0.0, 0.0, 1.0),
    filter_: Annotated[
        Path | None,
        typer.Option("--filter", help="How well each Fourier coefficient was measured, 0 to 1, origin at D//2 (MRC)."),
    ] = None,
    warm: Annotated[Path | None, typer.Option(help="Folder of an earlier correction: train on its networks.")] = None,
    preset: Annotated[str, option(C, "preset")] = default(C, "preset"),
    method: Annotated[str, option(C, "method")] = default(C, "method"),
    solvent_steps: Annotated[int, option(C, "solvent_steps")] = default(C, "solvent_steps"),
    rounds: Annotated[int, option(C, "rounds")] = default(C, "rounds"),
    epochs: Annotated[int | None, option(C, "epochs")] = None,
    sub_maps: Annotated[int | None, option(C, "sub_maps")] = None,
    cube: Annotated[int | None, option(C, "cube_px")] = None,
    batch: Annotated[int | None, option(C, "batch")] = None,
    learning_rate: Annotated[float | None, option(C, "learning_rate")] = None,
    alpha: Annotated[float, option(C, "alpha")] = default(C, "alpha"),
    beta: Annotated[float, option(C, "beta")] = default(C, "beta"),
    rotations: Annotated[str, option(C, "rotations")] = default(C, "rotations"),
    cone: Annotated[float, option(C, "cone_deg")] = default(C, "cone_deg"),
    resolution: Annotated[float | None, option(C, "resolution_A")] = None,
    keep_measured: Annotated[bool, option(C, "keep_measured")] = default(C, "keep_measured"),
    pixel_size: Annotated[float | None, typer.Option(help="Pixel size in Å, if headers are wrong.")] = None,
    seed: Annotated[int, option(U, "seed")] = default(U, "seed"),
    device: Annotated[str, option(U, "device")] = default(U, "device"),
    go_on: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted training in --out.")] = False,
) -> None:
    """Fill the directions that were measured badly or not at all, by a network trained on these maps alone.

    Writes corrected_map.mrc, the corrected half-maps, measured.mrc (which part of the density was measured), the
    filter, the networks and correct.json. Corrected maps are for looking at and for building, not for a resolution.
    """
    from cryoiso.parallel.abort import on_root
    from cryoiso.parallel.context import get_context
    from cryoiso.pipeline.stages.correct import CorrectionTask, correct_files

    comm = get_context()
    job = on_root(
        comm, job_of,
        particles={"file": "-"}, reference={"file": "-"}, run={"seed": seed, "device": device},
        correct={
            "mode": mode, "preset": preset, "epochs": epochs, "sub_maps": sub_maps, "cube_px": cube, "batch": batch,
            "learning_rate": learning_rate, "alpha": alpha, "beta": beta, "rotations": rotations, "cone_deg": cone,
            "method": method, "solvent_steps": solvent_steps, "rounds": rounds, "resolution_A": resolution,
            "keep_measured": keep_measured,
        },
    )  # fmt: skip
    maps = {1: half1} if half2 is None else {1: half1, 2: half2}
    task = CorrectionTask(
        maps, out, job.correct, mask=mask, transfer=filter_, missing_cone_deg=missing_cone, axis=axis,
        pixel_size_A=pixel_size, warm=warm, seed=seed, device=job.run.device,
    )  # fmt: skip
    correct_files(task, comm, resume=go_on)
    if comm.rank == 0:
        made = (products.CORRECTED_MAP, products.MEASURED, products.facts("correct"))
        echo("\n".join(str(out / name) for name in made))
