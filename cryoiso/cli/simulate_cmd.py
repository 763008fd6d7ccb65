"""``cryoiso simulate``: particle sets of known truth from a model, a map or the built-in phantom."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from cryoiso.core.types import CtfApplied, DensityMap
    from cryoiso.physics.simulate import SimulatedSource

logger = logging.getLogger("cryoiso")

PHANTOMS = {"phantom": 0, "phantom-homologue": 1}
FILES = ("particles.mrcs", "truth_map.mrc", "truth.star", "particles.star", "simulation.json")
DEFAULT_BOX_PX, DEFAULT_PIXEL_A = 64, 3.0
PARTICLES_A_MICROGRAPH = 100


def simulate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL_OR_MAP", help="PDB, mmCIF or MRC file, or 'phantom' or 'phantom-homologue'.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write into.")],
    n: Annotated[int, typer.Option("--n", min=1, help="Number of particles.")] = 1000,
    box: Annotated[int | None, typer.Option(min=8, help="Box in pixels (default 64, or the map's).")] = None,
    pixel_size: Annotated[float | None, typer.Option(min=0.1, help="Å per pixel (default 3, or the map's).")] = None,
    resolution: Annotated[
        float | None, typer.Option(min=0.1, help="Å; a model is blurred to it (default 2.5 pixels), a map filtered.")
    ] = None,
    symmetry: Annotated[
        str, typer.Option(help="Point group that the object must have (in its standard frame); recorded.")
    ] = "",
    mode: Annotated[
        str, typer.Option(help="Views: uniform, preferred, retained (fewer side views) or missing-cone.")
    ] = "uniform",
    fraction: Annotated[float, typer.Option(help="preferred: share of the views inside the cone(s).")] = 0.9,
    cone: Annotated[
        float | None,
        typer.Option(help="Half-angle in degrees of the preferred (36), of the kept (45) or of the missing (30) cone."),
    ] = None,
    spread: Annotated[float, typer.Option(help="preferred: Rayleigh sigma in degrees; 0 = even over the cone.")] = 12.0,
    poles: Annotated[int | None, typer.Option(help="1 or 2 ends (default: preferred 1, other modes 2).")] = None,
    pole_tilt: Annotated[float, typer.Option(help="Tilt of the preferred direction: 0 top, 90 side views.")] = 0.0,
    pole_rot: Annotated[float, typer.Option(help="Its rot angle.")] = 0.0,
    retained: Annotated[float, typer.Option(help="retained: share of the side views that is kept, 0 to 1.")] = 0.1,
    snr_db: Annotated[
        float, typer.Option(help="10 log10 of variance of CTF'd projections over variance of noise, uniform views.")
    ] = -10.0,
    noise: Annotated[str, typer.Option(help="white, coloured, or none.")] = "white",
    defocus: Annotated[tuple[float, float], typer.Option(metavar="MIN MAX", help="Range in Å.")] = (10000.0, 30000.0),
    ctf_from: Annotated[
        Path | None, typer.Option(help="STAR or .cs file to draw CTFs and optics groups from instead.")
    ] = None,
    shift_sd: Annotated[float, typer.Option(min=0.0, help="Standard deviation of the shifts in Å.")] = 4.0,
    voltage: Annotated[float, typer.Option(min=1.0, help="kV.")] = 300.0,
    cs: Annotated[float, typer.Option(min=0.0, help="Spherical aberration in mm.")] = 2.7,
    amplitude_contrast: Annotated[float, typer.Option(min=0.0, max=0.99, help="Fraction.")] = 0.1,
    phase_flipped: Annotated[
        bool, typer.Option("--phase-flipped", help="Write images multiplied by the sign of their CTF, flagged as such.")
    ] = False,
    ctf_premultiplied: Annotated[
        bool, typer.Option("--ctf-premultiplied", help="Write images multiplied by their CTF, flagged as such.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Every random number follows from it.")] = 1,
    halves: Annotated[bool, typer.Option("--halves", help="Write half-sets into particles.star as well.")] = False,
    with_poses: Annotated[bool, typer.Option("--with-poses", help="Write true poses into particles.star.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier simulation in OUT.")] = False,
) -> None:
    """Simulate particle images of known truth.

    Writes OUT/particles.star and particles.mrcs (what a refinement gets), truth.star (with poses and half-sets),
    truth_map.mrc (the object on the images' grey scale) and simulation.json (all settings and the measured
    signal-to-noise ratio).
    """
    options = {k: str(v) if isinstance(v, Path) else v for k, v in locals().items()}
    from cryoiso.physics import simulate as physics
    from cryoiso.physics.views import Views
    from cryoiso.pipeline.inputs.standard_frame import require_symmetry

    _check_folder(out, overwrite)
    applied = _ctf_applied(phase_flipped, ctf_premultiplied)
    views = Views(mode, fraction, cone, spread or None, poles, pole_tilt, pole_rot, retained)
    volume = _volume(model, box, pixel_size, resolution, seed)
    ranges = physics.CtfRanges(
        defocus,
        voltage_kV=voltage,
        spherical_aberration_mm=cs,
        amplitude_contrast=amplitude_contrast,
    )
    symmetry = symmetry or ("C3" if model in PHANTOMS else "C1")
    checked = require_symmetry(volume, symmetry, model, resolution or 0.0, "the object")
    source = physics.simulate(
        volume,
        n,
        snr_db=None if noise == "none" else snr_db,
        views=views,
        ctf=_ctf_particles(ctf_from) or ranges,
        shift_sd_A=shift_sd,
        noise="white" if noise == "none" else noise,
        seed=seed,
    )
    facts: dict[str, Any] = {"settings": {**options, "symmetry": symmetry}}
    facts["symmetry_correlation"] = round(checked.score, 4)
    _write(source, out, facts, with_poses, halves, applied)


def _ctf_applied(phase_flipped: bool, ctf_premultiplied: bool) -> CtfApplied:
    from cryoiso.core.errors import UsageError

    if phase_flipped and ctf_premultiplied:
        raise UsageError(
            "--phase-flipped and --ctf-premultiplied exclude each other: c |c| is neither", code="options-conflict"
        )
    return "premultiplied" if ctf_premultiplied else "flipped" if phase_flipped else ""


def _check_folder(out: Path, overwrite: bool) -> None:
    from cryoiso.core.errors import InputError, UsageError

    present = [name for name in FILES if (out / name).exists()]
    if present and not overwrite:
        raise UsageError(
            f"{out} already holds {present[0]}; give --overwrite to replace it, or another folder", code="file-exists"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder: {error.strerror}", file=out, code="not-writable") from None


def _volume(model: str, box: int | None, pixel_size: float | None, resolution: float | None, seed: int) -> DensityMap:
    """The object on the images' grid, in its own units."""
    from cryoiso.core.errors import InputError

    pixel = pixel_size or DEFAULT_PIXEL_A
    if model in PHANTOMS:
        from cryoiso.physics.phantom import phantom_map

        variant = PHANTOMS[model]
        return phantom_map(box or DEFAULT_BOX_PX, pixel, resolution or 2.5 * pixel, seed=seed, variant=variant)
    if not Path(model).is_file():
        raise InputError("no such file", file=model, hint=f"Or one of: {', '.join(PHANTOMS)}.", code="file-not-found")
    if Path(model.removesuffix(".gz")).suffix.lower() in (".mrc", ".map", ".ccp4"):
        return _map(model, box, pixel_size, resolution)
    from cryoiso.io.models import model_to_map

    return model_to_map(model, box or DEFAULT_BOX_PX, pixel, resolution or 2.5 * pixel)


def _map(path: str, box: int | None, pixel_size: float | None, resolution: float | None) -> DensityMap:
    from cryoiso.core.types import DensityMap
    from cryoiso.io.mrc import read_map
    from cryoiso.physics.filters import lowpass
    from cryoiso.physics.resample import resample_map

    found = read_map(path)
    box, pixel = box or found.box_px, pixel_size or found.pixel_size_A
    data = found.data
    if (box, pixel) != (found.box_px, found.pixel_size_A):
        data = resample_map(data, found.pixel_size_A, box, pixel)
    return DensityMap(lowpass(data, pixel, resolution) if resolution else data, pixel)


def _ctf_particles(path: Path | None) -> Any:
    if path is None:
        return None
    from cryoiso.io import read_particle_file

    return read_particle_file(path, require=("ctf",))


def _write(
    source: SimulatedSource, out: Path, facts: dict[str, Any], with_poses: bool, halves: bool, applied: CtfApplied
) -> None:
    from dataclasses import replace

    import numpy as np

    from cryoiso import __version__
    from cryoiso.core.log import ProgressLine
    from cryoiso.io.atomic import require_space, write_text
    from cryoiso.io.mrc import write_map, write_stack
    from cryoiso.io.star.read import write_particles
    from cryoiso.physics.ctf_applied import apply_ctf

    n, box, pixel = len(source), source.box_px, source.volume.pixel_size_A
    require_space(out / FILES[0], 4 * n * box * box)
    progress = ProgressLine("simulating", n)
    particles = source.particles.with_ctf_applied(applied)
    with write_stack(out / "particles.mrcs", box, pixel) as stack:
        for images in source.blocks():
            stack.append(apply_ctf(images, particles, np.arange(stack.count, stack.count + len(images))))
            progress.update(stack.count)
    progress.close(f"{n:,} images of {box} px")
    write_map(out / "truth_map.mrc", source.volume.data, pixel)
    micrographs = np.array([f"micrograph{i // PARTICLES_A_MICROGRAPH + 1:05d}.mrc" for i in range(n)])
    truth = particles.with_results(rlnMicrographName=micrographs)
    write_particles(out / "truth.star", truth)
    given = truth if with_poses else replace(truth, rotation=None, shift_A=None)
    write_particles(out / "particles.star", given if halves else replace(given, half=None))
    measured = source.measured()
    facts = {"program": f"cryoiso {__version__}", **facts, "box_px": box, "pixel_size_A": pixel, "measured": measured}
    write_text(out / "simulation.json", json.dumps(facts, indent=1, default=str) + "\n")
    snr = f"signal-to-noise ratio {measured['snr_dB']:.2f} dB" if measured else "no noise"
    logger.info("%s in this set; written to %s", snr, out)
