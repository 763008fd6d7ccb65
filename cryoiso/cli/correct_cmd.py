"""``cryoiso correct``: anisotropy correction of half-maps, or of one map with a known missing cone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cryoiso.cli.common import echo
from cryoiso.cli.groups import COMPUTING, NETWORK, Overwrite, Resume
from cryoiso.cli.options import JobOptions, help_of, keys, with_keys
from cryoiso.core import products

CORRECTION = keys("correct", "Correction", "mode", "resolution_A", "epochs")
MEASURED = "Measured directions"


@with_keys(CORRECTION, NETWORK, COMPUTING)
def correct(
    half1: Annotated[Path, typer.Argument(help="First half-map (MRC), unmasked and unfiltered; or the only map.")],
    job_options: JobOptions,
    half2: Annotated[Path | None, typer.Argument(help="Second half-map.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Output folder.")] = Path("corrected"),
    mask: Annotated[Path | None, typer.Option(help=help_of("sample", "mask"))] = None,
    missing_cone: Annotated[
        float | None,
        typer.Option(help="Half angle of an unmeasured cone in Fourier space.  [degrees]", rich_help_panel=MEASURED),
    ] = None,
    axis: Annotated[
        tuple[float, float, float], typer.Option(help="Axis of that cone (x, y, z).", rich_help_panel=MEASURED)
    ] = (0.0, 0.0, 1.0),
    filter_: Annotated[
        Path | None,
        typer.Option(
            "--filter",
            help="Sampling of each Fourier coefficient, 0 to 1, origin at D//2 (MRC).",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    warm: Annotated[
        Path | None, typer.Option(help="Folder of an earlier correction: continue to train its networks.")
    ] = None,
    pixel_size: Annotated[float | None, typer.Option(help="Pixel size, if the headers are wrong.  [Å]")] = None,
    go_on: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Correct the anisotropy of maps with a network trained on these maps alone.

    Fills directions that were sampled poorly or not at all. Writes corrected_map.mrc, the corrected half-maps,
    measured.mrc (share of the density that was measured), the filter, the networks and correct.json. Corrected maps
    are for viewing and model building, not for estimating resolution.
    """
    from cryoiso.parallel.abort import on_root
    from cryoiso.parallel.context import get_context
    from cryoiso.pipeline.commands.output import refuse_result
    from cryoiso.pipeline.stages.correct import CorrectionFiles, correct_files

    comm = get_context()
    on_root(comm, refuse_result, out, (products.facts("correct"),), overwrite or go_on)
    job = on_root(comm, job_options.job, particles={"file": "-"}, reference={"file": "-"})
    maps = {1: half1} if half2 is None else {1: half1, 2: half2}
    task = CorrectionFiles(
        maps, out, job.correct, mask=mask, fsc_filter=filter_, missing_cone_deg=missing_cone, axis=axis,
        pixel_size_A=pixel_size, warm=warm, seed=job.run.seed, device=job.run.device,
    )  # fmt: skip
    correct_files(task, comm, resume=go_on)
    if comm.rank == 0:
        products_written = (products.CORRECTED_MAP, products.MEASURED, products.facts("correct"))
        echo("\n".join(str(out / name) for name in products_written))
