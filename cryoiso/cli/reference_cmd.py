"""``cryoiso reference``: an atomic model or a map on the particles' grid, low-passed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cryoiso.cli.common import echo
from cryoiso.cli.groups import MODEL_KEYS
from cryoiso.cli.options import JobOptions, keys, with_keys

if TYPE_CHECKING:
    from cryoiso.pipeline.inputs.reference import Reference

PHANTOMS = {"phantom": 0, "phantom-homologue": 1}


@with_keys(keys("reference", "Atomic model", *MODEL_KEYS))
def reference(
    file: Annotated[
        str, typer.Argument(help="Atomic model (PDB, mmCIF), map (MRC), or 'phantom' or 'phantom-homologue'.")
    ],
    out: Annotated[Path, typer.Argument(help="MRC file to write.")],
    job_options: JobOptions,
    box: Annotated[
        int | None, typer.Option(min=8, max=2048, help="Box of the particles (default: the given map's).  [pixels]")
    ] = None,
    pixel_size: Annotated[
        float | None, typer.Option(min=0.01, help="Pixel size of the particles (default: the given map's).  [Å]")
    ] = None,
    lowpass: Annotated[float, typer.Option(min=0.0, help="Resolution of the low-pass filter; 0: none.  [Å]")] = 30.0,
    symmetry: Annotated[
        str,
        typer.Option(help="Point group; a model is rotated into its standard frame (Cn about z), a map must be in it."),
    ] = "C1",
    standard_frame: Annotated[
        bool,
        typer.Option("--standard-frame", help="Find the symmetry axes of a map and move it into the standard frame."),
    ] = False,
    symmetrise: Annotated[
        bool, typer.Option("--symmetrise", help="Average the map over the symmetry operations.")
    ] = False,
    map_pixel_size: Annotated[
        float | None, typer.Option(help="Pixel size of the given map, if its header is wrong.  [Å]")
    ] = None,
    fit: Annotated[Path | None, typer.Option(help="Map to which the result is aligned (MRC, any grid).")] = None,
    fit_resolution: Annotated[
        float | None,
        typer.Option(
            min=1.0, help="Finest information used for the fit (default: 10 Å, or 2.5 pixels if coarser).  [Å]"
        ),
    ] = None,
    mirror: Annotated[bool, typer.Option(help="With --fit: also fit the mirror image.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the phantom.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of lines.")] = False,
) -> None:
    """Make a reference from a model or a map.

    Writes it on the given grid, low-pass filtered, and prints the particle diameter measured in it. A map of another
    box or pixel size is resampled in Fourier space. Of a predicted model, residues of low confidence (pLDDT) are left
    out. With --fit it is aligned to another map by a search over all
    rotations and shifts in both hands, and the confidence of the fit is printed. A map with other symmetry axes (also
    one in cryoSPARC's frame of D3, D5, D7 ...) is rejected; --standard-frame moves it.
    """
    from cryoiso.core.errors import UsageError
    from cryoiso.io.atomic import require_map_target
    from cryoiso.io.mrc import write_map
    from cryoiso.pipeline.inputs.reference import finish_reference, model_choice, prepare_reference

    if file in PHANTOMS and (fit is not None or standard_frame or symmetrise):
        raise UsageError(
            "--fit, --standard-frame and --symmetrise take a file: write the phantom to one first",
            code="options-conflict",
        )
    require_map_target(out)
    box, pixel_size = _grid(file, box, pixel_size, map_pixel_size)
    if file in PHANTOMS:
        from cryoiso.physics.phantom import phantom_map

        resolution = max(2.5 * pixel_size, 0.5 * lowpass)
        full = phantom_map(box, pixel_size, resolution, seed=seed, variant=PHANTOMS[file])
        prepared = finish_reference(full, lowpass, f"built-in {file}")
    else:
        prepared = prepare_reference(
            Path(file), box, pixel_size, lowpass, map_pixel_size_A=map_pixel_size, resample=True, symmetry=symmetry,
            fit=fit, fit_resolution_A=fit_resolution, mirror=mirror, standard_frame=standard_frame,
            symmetrise=symmetrise,
            model=model_choice(job_options.job(particles={"file": ""}, reference={"file": file}).reference),
        )  # fmt: skip
    write_map(out, prepared.initial.data, pixel_size)
    if as_json:
        import json

        echo(json.dumps(_facts(out, prepared, lowpass), indent=2))
        return
    echo(f"{out}: {prepared.source}, {box} px of {pixel_size:g} Å, diameter {prepared.diameter_A:.0f} Å")
    model = prepared.facts.get("model", {})
    if "left_out" in model and "min_confidence" in model:
        from cryoiso.io.confidence import words_of

        echo(f"predicted model ({model['evidence']}): {words_of(model)}")
    if prepared.fit is not None:
        echo(prepared.fit.verdict)


def _facts(out: Path, prepared: Reference, lowpass_A: float) -> dict[str, Any]:
    facts = {
        "file": str(out), "source": prepared.source, "lowpass_A": lowpass_A,
        "diameter_A": round(prepared.diameter_A, 3), "box_px": prepared.map.box_px,
        "pixel_size_A": prepared.map.pixel_size_A, **prepared.facts,
    }  # fmt: skip
    return facts if prepared.fit is None else facts | {"fit": prepared.fit.facts()}


def _grid(file: str, box: int | None, pixel_size: float | None, map_pixel_size: float | None) -> tuple[int, float]:
    """The result's grid: as asked for, else that of the given map."""
    from cryoiso.core.errors import UsageError

    if box is not None and pixel_size is not None:
        return box, pixel_size
    from cryoiso.io.models import is_model

    if file in PHANTOMS or is_model(file):
        raise UsageError("a model needs --box and --pixel-size: those of the particles", code="option-missing")
    from cryoiso.io.mapbox import read_map_box

    grid_map = read_map_box(file, map_pixel_size)
    pixel = pixel_size or min(grid_map.voxel_A)
    longest = max(grid_map.data.shape) if grid_map.is_plain else math.ceil(grid_map.longest_A / pixel)
    return box or longest + (0 if grid_map.is_plain else longest % 2), pixel
