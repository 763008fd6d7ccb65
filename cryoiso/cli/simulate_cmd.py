"""``cryoiso simulate``: particle sets of known truth from a model, a map or the built-in phantom."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cryoiso.cli import simulate_options as o

if TYPE_CHECKING:
    from cryoiso.core.types import CtfApplied, DensityMap, Particles
    from cryoiso.physics.nuisances.settings import Nuisances
    from cryoiso.physics.nuisances.source import NuisanceSource
    from cryoiso.physics.simulation import CtfRanges
    from cryoiso.physics.views import GivenViews, Views


VIEWS, IMAGES = "Views", "Images"


def simulate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL_OR_MAP", help="PDB, mmCIF or MRC file, or 'phantom' or 'phantom-homologue'.")
    ],
    out: Annotated[Path, typer.Argument(help="Output folder.")],
    n: Annotated[int, typer.Option("--n", min=1, help="Number of particles.")] = 1000,
    box: Annotated[int | None, typer.Option(min=8, max=2048, help="Box (default: 64, or the map's).  [pixels]")] = None,
    pixel_size: Annotated[
        float | None, typer.Option(min=0.1, help="Pixel size (default: 3, or the map's).  [Å]")
    ] = None,
    resolution: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            help="Resolution of a model (default: 2.5 pixels) or low-pass filter of a map (default: none).  [Å]",
        ),
    ] = None,
    symmetry: Annotated[str, typer.Option(help="Point group of the object, checked in its standard frame.")] = "",
    mode: Annotated[
        str,
        typer.Option(
            metavar="[uniform|preferred|retained|missing-cone]",
            rich_help_panel=VIEWS,
            help="View distribution; retained: uniform with fewer side views.",
        ),
    ] = "uniform",
    fraction: Annotated[
        float, typer.Option(rich_help_panel=VIEWS, help="preferred: fraction of views inside the cone(s).")
    ] = 0.9,
    cone: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=VIEWS, help="Half angle of the preferred (36), kept (45) or missing (30) cone.  [degrees]"
        ),
    ] = None,
    spread: Annotated[
        float,
        typer.Option(
            rich_help_panel=VIEWS, help="preferred: Rayleigh sigma of the tilt; 0: uniform over the cone.  [degrees]"
        ),
    ] = 12.0,
    poles: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=VIEWS, help="Number of poles of the cone, 1 or 2 (default: preferred 1, other modes 2)."
        ),
    ] = None,
    pole_tilt: Annotated[
        float,
        typer.Option(
            rich_help_panel=VIEWS, help="Tilt of the preferred direction; 0: top views, 90: side views.  [degrees]"
        ),
    ] = 0.0,
    pole_rot: Annotated[
        float, typer.Option(rich_help_panel=VIEWS, help="Rot angle of the preferred direction.  [degrees]")
    ] = 0.0,
    retained: Annotated[
        float, typer.Option(rich_help_panel=VIEWS, help="retained: fraction of side views kept, 0 to 1.")
    ] = 0.1,
    snr_db: Annotated[
        float,
        typer.Option(
            rich_help_panel=IMAGES,
            min=-100.0,
            max=100.0,
            help="Variance of CTF-modulated projections of uniform views over that of the noise.  [dB]",
        ),
    ] = -10.0,
    noise: Annotated[
        str, typer.Option(metavar="[white|coloured|none]", rich_help_panel=IMAGES, help="Noise of the images.")
    ] = "white",
    defocus: Annotated[
        tuple[float, float], typer.Option(rich_help_panel=IMAGES, metavar="MIN MAX", help="Defocus range.  [Å]")
    ] = (
        10000.0,
        30000.0,
    ),
    ctf_from: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=IMAGES, help="STAR, .cs or .npz file from which CTFs and optics groups are drawn instead."
        ),
    ] = None,
    shift_sd: Annotated[
        float, typer.Option(rich_help_panel=IMAGES, min=0.0, help="Standard deviation of the shifts.  [Å]")
    ] = 4.0,
    voltage: Annotated[
        float, typer.Option(rich_help_panel=IMAGES, min=1.0, max=3000.0, help="Acceleration voltage.  [kV]")
    ] = 300.0,
    cs: Annotated[
        float, typer.Option(rich_help_panel=IMAGES, min=0.0, max=100.0, help="Spherical aberration.  [mm]")
    ] = 2.7,
    amplitude_contrast: Annotated[
        float, typer.Option(rich_help_panel=IMAGES, min=0.0, max=0.99, help="Amplitude contrast.")
    ] = 0.1,
    phase_flipped: Annotated[
        bool,
        typer.Option("--phase-flipped", rich_help_panel=IMAGES, help="Write phase-flipped images, flagged as such."),
    ] = False,
    ctf_premultiplied: Annotated[
        bool,
        typer.Option(
            "--ctf-premultiplied", rich_help_panel=IMAGES, help="Write CTF-premultiplied images, flagged as such."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all random numbers.")] = 1,
    halves: Annotated[bool, typer.Option("--halves", help="Write half-sets into particles.star as well.")] = False,
    with_poses: Annotated[bool, typer.Option("--with-poses", help="Write true poses into particles.star.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier simulation in OUT.")] = False,
    views_from: o.ViewsFrom = None,
    neighbours: o.NeighbourDensity = 0.0,
    neighbour_distance: o.NeighbourDistance = 1.2,
    diameter: o.Diameter = None,
    ice: o.IceThickness = None,
    ice_view_correlation: o.IceViewCorrelation = 0.7,
    ice_mean_free_path: o.IceMeanFreePath = 3950.0,
    ice_noise: o.IceNoise = 0.3,
    scale_sd: o.ScaleSd = 0.0,
    micrograph_scale_sd: o.MicrographScaleSd = 0.0,
    bfactor: o.Bfactor = None,
    micrographs: o.MicrographCount = None,
    micrographs_from_ctf: o.MicrographsFromCtf = False,
    defocus_per_micrograph: o.DefocusPerMicrograph = False,
    field_size: o.FieldSize = 4000.0,
    stage_tilt: o.StageTilt = 0.0,
    height_sd: o.HeightSd = 0.0,
    defocus_error_sd: o.DefocusErrorSd = 0.0,
    micrograph_defocus_error_sd: o.MicrographDefocusErrorSd = 0.0,
    known: o.Known = False,
    optics_groups: o.OpticsGroups = 1,
    beam_tilt: o.BeamTilt = (0.0, 0.0),
    beam_tilt_sd: o.BeamTiltSd = 0.0,
    grid: o.Grids = None,
    junk: o.JunkShares = None,
    junk_other: o.JunkOther = "",
    broken_share: o.BrokenShare = 0.33,
    noise_from: o.NoiseFrom = None,
    noise_from_pixel: o.NoiseFromPixel = None,
    noise_from_as: o.NoiseFromAs = "auto",
) -> None:
    """Simulate particle images of known truth.

    Writes OUT/particles.star and particles.mrcs (what a refinement gets), truth.star (with poses and half-sets),
    truth_map.mrc (the object on the images' grey scale) and simulation.json (all settings and the measured
    signal-to-noise ratio). Neighbours, ice, junk, errors of the CTF and real noise are switched on one by one; what
    each image really shows is then in truth.star and copies.star.
    """
    options = {k: str(v) if isinstance(v, Path) else v for k, v in locals().items()}
    from cryoiso.io.atomic import require_space
    from cryoiso.physics import simulation as physics
    from cryoiso.pipeline.commands import simulate as command
    from cryoiso.pipeline.commands import simulation_inputs as inputs
    from cryoiso.pipeline.inputs.standard_frame import require_symmetry

    nuisances = _nuisances(options)
    applied = _ctf_applied(phase_flipped, ctf_premultiplied)
    command.require_known_ctf(nuisances, applied)
    command.check_folder(out, overwrite)
    require_space(out / command.FILES[0], 4 * n * (box or inputs.DEFAULT_BOX_PX) ** 2)
    views, axis = _views(options)
    volume = inputs.object_map(model, box, pixel_size, resolution, seed)
    ctf = _ctf(options)
    symmetry = symmetry or ("C3" if model in inputs.PHANTOMS else "C1")
    checked = require_symmetry(volume, symmetry, model, resolution or 0.0, "the object")
    facts: dict[str, Any] = {"settings": {**_settings(options), "symmetry": symmetry}}
    facts["symmetry_correlation"] = round(checked.score, 4)
    how = command.Writing(with_poses, halves, applied)
    snr = None if noise == "none" else snr_db
    if noise_from is not None or _switched_on(nuisances):
        source = _source(volume, ctf, views, axis, nuisances, snr, options)
        command.write_nuisances(source, out, facts, nuisances, how)
        return
    plain = physics.simulate(
        volume,
        n,
        snr_db=snr,
        views=views,
        ctf=ctf,
        shift_sd_A=shift_sd,
        noise="white" if noise == "none" else noise,
        seed=seed,
    )
    command.write_plain(plain, out, facts, how)


def _settings(options: dict[str, Any]) -> dict[str, Any]:
    """What simulation.json says of the options: the nuisances only where they are switched on."""
    parameters = list(inspect.signature(simulate).parameters.values())
    first = next(i for i, p in enumerate(parameters) if p.name == "views_from")
    default = {p.name: p.default for p in parameters[first:]}
    return {k: v for k, v in options.items() if k not in default or v != default[k]}


def _nuisances(options: dict[str, Any]) -> Nuisances:
    """The switches, checked.

    Raises:
        UsageError, InputError: values that cannot be.
    """
    from cryoiso.core.errors import UsageError
    from cryoiso.physics.nuisances import settings as s

    get = options.__getitem__
    if get("micrographs_from_ctf") and not get("ctf_from"):
        raise UsageError("--micrographs-from-ctf needs --ctf-from", code="option-missing")
    if get("noise_from") and get("noise") == "none":
        raise UsageError("--noise-from and --noise none exclude each other", code="options-conflict")
    if get("junk_other") and not any(str(j).startswith("other=") for j in get("junk") or ()):
        raise UsageError("--junk-other needs --junk other=SHARE", code="option-missing")
    return s.Nuisances(
        s.Neighbours(get("neighbours"), get("neighbour_distance"), get("diameter")),
        s.Ice(get("ice"), get("ice_view_correlation"), get("ice_mean_free_path"), get("ice_noise")),
        s.Micrographs(
            get("micrographs"), get("micrographs_from_ctf"), get("defocus_per_micrograph"), get("field_size"),
            get("stage_tilt"), get("height_sd"), get("defocus_error_sd"), get("micrograph_defocus_error_sd"),
            get("bfactor"), get("micrograph_scale_sd"), get("scale_sd"),
        ),
        s.Optics(
            get("optics_groups"), get("beam_tilt"), get("beam_tilt_sd"), tuple(map(_grid, get("grid") or ())),
        ),
        s.Junk(_shares(get("junk")), get("broken_share")),
        get("known"),
    )  # fmt: skip


def _switched_on(nuisances: Nuisances) -> bool:
    """Whether any nuisance changes anything: numbers that only qualify one that is off do not count."""
    from dataclasses import replace

    from cryoiso.physics.nuisances.settings import Ice, Neighbours, Nuisances

    plain = replace(nuisances, known=False)
    if plain.neighbours.density == 0:
        plain = replace(plain, neighbours=Neighbours())
    if plain.ice.thickness_A is None:
        plain = replace(plain, ice=Ice())
    plain = replace(plain, junk=replace(plain.junk, broken_share=Nuisances().junk.broken_share))
    return plain != Nuisances()


def _grid(text: str) -> tuple[int, float]:
    from cryoiso.core.errors import UsageError

    box, _, pixel = text.lower().partition("x")
    try:
        return int(box), float(pixel)
    except ValueError:
        raise UsageError(
            f"--grid: box and pixel size are expected, as in 64x3.0 (found '{text}')", code="option-malformed"
        ) from None


def _shares(entries: list[str] | None) -> dict[str, float]:
    from cryoiso.cli.options import keys_of
    from cryoiso.core.errors import UsageError

    try:
        return {kind: float(share) for kind, share in keys_of(entries, "--junk").items()}
    except ValueError:
        raise UsageError(
            f"--junk: KIND=SHARE with a number is expected (found {entries})", code="option-malformed"
        ) from None


def _ctf(options: dict[str, Any]) -> CtfRanges | Particles:
    """What CTFs are drawn from."""
    from cryoiso.physics.simulation import CtfRanges
    from cryoiso.pipeline.commands.simulation_inputs import read_set

    ranges = CtfRanges(
        options["defocus"],
        voltage_kV=options["voltage"],
        spherical_aberration_mm=options["cs"],
        amplitude_contrast=options["amplitude_contrast"],
    )
    path = options["ctf_from"]
    return ranges if path is None else read_set(Path(path), ("ctf",)) or ranges


def _views(options: dict[str, Any]) -> tuple[Views | GivenViews, Any]:
    """The distribution of views, and the axis whose views lie in the thinnest ice."""
    from cryoiso.physics.so3 import euler_to_matrix
    from cryoiso.physics.views import Views
    from cryoiso.pipeline.commands.simulation_inputs import read_set, views_of

    get = options.__getitem__
    views = Views(
        get("mode"), get("fraction"), get("cone"), get("spread") or None, get("poles"), get("pole_tilt"),
        get("pole_rot"), get("retained"),
    )  # fmt: skip
    axis = euler_to_matrix(get("pole_rot"), get("pole_tilt"), 0.0)[0, 2]
    poses = read_set(Path(get("views_from")), ("pose",)) if get("views_from") else None
    return (views_of(poses, get("views_from") == get("ctf_from")) if poses else views), axis


def _source(
    volume: DensityMap,
    ctf: CtfRanges | Particles,
    views: Views | GivenViews,
    axis: Any,
    nuisances: Nuisances,
    snr_db: float | None,
    options: dict[str, Any],
) -> NuisanceSource:
    """The images of a set with nuisances."""
    from cryoiso.core.types import Particles
    from cryoiso.physics.nuisances.source import NuisanceSource, scaled
    from cryoiso.physics.nuisances.truth import draw_truth
    from cryoiso.physics.simulation import make_particles, scale_for_snr
    from cryoiso.pipeline.commands import simulation_inputs as inputs

    get, seed = options.__getitem__, options["seed"]
    base = make_particles(
        get("n"), volume.box_px, volume.pixel_size_A, views=views, ctf=ctf, shift_sd_A=get("shift_sd"), seed=seed
    )
    names = inputs.micrograph_names(ctf) if isinstance(ctf, Particles) else None
    noise = None if snr_db is None else get("noise")
    if noise is not None and get("noise_from"):
        noise = inputs.patch_stack(
            Path(get("noise_from")), get("noise_from_pixel"), get("noise_from_as"), volume.pixel_size_A
        )
    objects = inputs.objects(volume, get("model"), nuisances.junk, get("junk_other"), get("resolution"), seed)
    truth = draw_truth(base, volume, nuisances, views=views, ctf=ctf, names=names, axis=axis, seed=seed)
    factor = 1.0 if snr_db is None else float(scale_for_snr(volume, base, snr_db, seed))
    return NuisanceSource(scaled(objects, factor), truth, seed, noise)


def _ctf_applied(phase_flipped: bool, ctf_premultiplied: bool) -> CtfApplied:
    from cryoiso.core.errors import UsageError

    if phase_flipped and ctf_premultiplied:
        raise UsageError(
            "--phase-flipped and --ctf-premultiplied exclude each other: c |c| is neither", code="options-conflict"
        )
    return "premultiplied" if ctf_premultiplied else "flipped" if phase_flipped else ""
