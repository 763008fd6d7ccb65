"""Groups of options that commands share: what one command of a kind can be told, all of them can."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cryoiso.cli.options import help_of, keys
from cryoiso.core.config import CommandSection, CryosparcSection, RelionSection

SYMMETRY = keys("sample", "Sample", "symmetry")
SAMPLE = keys("sample", "Sample", "symmetry", "diameter_A", "mask")

GRID = keys("reference", "Reference", ("pixel_size_A", "--ref-pixel-size"), "resample")
REFERENCE = keys(
    "reference", "Reference", "lowpass_A", ("pixel_size_A", "--ref-pixel-size"), "resample", "fit", "fit_resolution_A"
)

SEARCH = keys(
    "refine", "Search", "max_iterations", "healpix_order", "local_deg", "shift_range_A", "shift_step_A",
    "finest_step_deg", "max_resolution_A", "stalled_iterations", "junk", "image_mask",
    "relax_symmetry",
)  # fmt: skip
REGULARISATION = keys(
    "refine", "References and resolution", "padding", "join_halves_A", "solvent_mask", "regularisation", "weighted_fsc",
    "scale",
)  # fmt: skip
VIEWS = keys(
    "refine", "Density of views", "view_density", "view_axis_odds", "view_polarity_floor", "view_kernel_deg"
)  # fmt: skip
ENGINE = keys("refine", "Engine", "engine")

NETWORK = keys(
    "correct", "Network", "preset", "method", "solvent_steps", "rounds", "sub_maps", "cube_px", "batch",
    "learning_rate", "alpha", "beta", "rotations", "cone_deg", "keep_measured",
)  # fmt: skip

FILES = keys("particles", "Images", "project", "passthrough", "invert")
IMAGES = keys("particles", "Images", "project", "passthrough", "invert", "normalise")
SHARDS = keys("particles", "Images", "storage", "shard_mib")

COMPUTING = keys("run", "Computing", "seed", "device")
SCRATCH = keys("run", "Computing", "scratch")

REFINEMENT = (
    SAMPLE, REFERENCE, SEARCH, REGULARISATION, VIEWS, IMAGES, SHARDS, COMPUTING, SCRATCH, ENGINE,
)  # fmt: skip
"""Options of every command that refines poses."""

ParticlesOrShards = Annotated[
    Path, typer.Argument(help="Particles: a STAR or .cs file, or a folder written by 'cryoiso ingest'.")
]
Posed = Annotated[Path, typer.Argument(help="Particles with poses: a STAR or .cs file of a refinement.")]
Reference = Annotated[Path, typer.Option("--ref", help=help_of("reference", "file"))]
OutputFolder = Annotated[Path, typer.Option("--out", help="Output folder.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run of this command in --out.")]

RefineKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--refine", metavar="KEY=VALUE", rich_help_panel=ENGINE.panel,
        help="A key of the job file's [refine], instead of its option, e.g. --refine view_density=false. May be "
        "repeated.",
    ),
]  # fmt: skip
RelionKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--relion", metavar="KEY=VALUE", rich_help_panel=ENGINE.panel,
        help=f"With --engine relion: a key of the job file's [relion] ({', '.join(RelionSection.model_fields)}), e.g. "
        "--relion ranks=5 --relion 'extra=--gpu 0'. May be repeated.",
    ),
]  # fmt: skip
CommandKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--command", metavar="KEY=VALUE", rich_help_panel=ENGINE.panel,
        help=f"With --engine command: a key of the job file's [command] ({', '.join(CommandSection.model_fields)}), "
        "e.g. --command 'run=my_refine {particles} {reference} {out_particles}'. May be repeated.",
    ),
]  # fmt: skip
CryosparcKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--cryosparc", metavar="KEY=VALUE", rich_help_panel=ENGINE.panel,
        help="With --engine cryosparc: a key of the job file's [cryosparc] "
        f"({', '.join(CryosparcSection.model_fields)}), e.g. --cryosparc project=P3 --cryosparc workspace=W1. May be "
        "repeated.",
    ),
]  # fmt: skip
