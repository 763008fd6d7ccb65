"""Groups of options that commands share: what one command of a kind can be told, all of them can."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cryoiso.cli.options import help_of, keys
from cryoiso.core.config import CommandSection, CryosparcSection, RelionSection
from cryoiso.core.sections.base import Section

SYMMETRY = keys("sample", "Sample", "symmetry")
SAMPLE = keys("sample", "Sample", "symmetry", "diameter_A", "mask")

MODEL_KEYS = ("chains", "assembly", "confidence", "min_confidence", "full_confidence")
GRID = keys("reference", "Reference", ("pixel_size_A", "--ref-pixel-size"), "resample", *MODEL_KEYS)
REFERENCE = keys(
    "reference", "Reference", "lowpass_A", ("pixel_size_A", "--ref-pixel-size"), "resample", "fit", "fit_resolution_A",
    *MODEL_KEYS,
)  # fmt: skip

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
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result in --out.")]

RefineKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--refine", metavar="KEY=VALUE", rich_help_panel=ENGINE.panel,
        help="A key of the job file's [refine], instead of its option, e.g. --refine view_density=false. May be "
        "repeated.",
    ),
]  # fmt: skip


def _keys_of_engine(engine: str, section: type[Section], example: str) -> typer.models.OptionInfo:
    """The option that sets keys of the job file's section of an engine."""
    option: typer.models.OptionInfo = typer.Option(
        f"--{engine}", metavar="KEY=VALUE", rich_help_panel=ENGINE.panel,
        help=f"With --engine {engine}: a key of the job file's [{engine}] ({', '.join(section.model_fields)}), e.g. "
        f"{example}. May be repeated.",
    )  # fmt: skip
    return option


RelionKeys = Annotated[
    list[str] | None, _keys_of_engine("relion", RelionSection, "--relion ranks=5 --relion 'extra=--gpu 0'")
]
CommandKeys = Annotated[
    list[str] | None,
    _keys_of_engine("command", CommandSection, "--command 'run=my_refine {particles} {reference} {out_particles}'"),
]
CryosparcKeys = Annotated[
    list[str] | None,
    _keys_of_engine("cryosparc", CryosparcSection, "--cryosparc project=P3 --cryosparc workspace=W1"),
]
