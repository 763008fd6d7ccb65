"""Options of ``cryoiso simulate`` that make images as bad as real ones, by group of the help (docs/simulate.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def _option(group: str, text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=group, **more)


_NEIGHBOURS, _JUNK = "Neighbours", "Junk"
_ICE, _MICROGRAPHS = "Ice, scale and B-factor", "Micrographs and defocus"
_OPTICS, _NOISE = "Optics groups", "Real noise"

NeighbourDensity = Annotated[
    float, _option(_NEIGHBOURS, "Other copies around each particle, per square of the diameter; 0: none.", min=0.0)
]
NeighbourDistance = Annotated[float, _option(_NEIGHBOURS, "Least distance of two centres in diameters.", min=0.1)]
Diameter = Annotated[float | None, _option(_NEIGHBOURS, "Of the object in Å (default: measured).", min=1.0)]

IceThickness = Annotated[
    tuple[float, float] | None,
    _option(_ICE, "Range in Å per micrograph; changes contrast and noise (default: none).", metavar="MIN MAX"),
]
IceViewCorrelation = Annotated[
    float,
    _option(_ICE, "Of thickness and angle to the pole; positive: side views in thick ice.", min=-1.0, max=1.0),
]
IceMeanFreePath = Annotated[float, _option(_ICE, "Å; the contrast falls as exp(-thickness / it).", min=1.0)]
IceNoise = Annotated[
    float, _option(_ICE, "Share of the ice in the noise's variance at medium thickness.", min=0.0, max=1.0)
]
ScaleSd = Annotated[float, _option(_ICE, "Scatter of the logarithm of each particle's signal.", min=0.0)]
MicrographScaleSd = Annotated[float, _option(_ICE, "The same per micrograph.", min=0.0)]
Bfactor = Annotated[
    tuple[float, float] | None, _option(_ICE, "Range in Å² per micrograph (default: 0).", metavar="MIN MAX")
]

MicrographCount = Annotated[
    int | None, _option(_MICROGRAPHS, "Number of micrographs (default: one per 100 particles).", min=1)
]
MicrographsFromCtf = Annotated[
    bool,
    _option(_MICROGRAPHS, "Particles lie on the micrographs of their rows of --ctf-from.", "--micrographs-from-ctf"),
]
DefocusPerMicrograph = Annotated[
    bool, _option(_MICROGRAPHS, "One CTF per micrograph instead of per particle.", "--defocus-per-micrograph")
]
FieldSize = Annotated[float, _option(_MICROGRAPHS, "Width of a micrograph in Å.", min=1.0)]
StageTilt = Annotated[
    float, _option(_MICROGRAPHS, "Degrees; makes the true defocus a plane over each micrograph.", min=0.0, max=79.0)
]
HeightSd = Annotated[float, _option(_MICROGRAPHS, "Scatter of the particles' heights (true defocus) in Å.", min=0.0)]
DefocusErrorSd = Annotated[
    float, _option(_MICROGRAPHS, "Error of each particle's defocus in particles.star in Å.", min=0.0)
]
MicrographDefocusErrorSd = Annotated[
    float, _option(_MICROGRAPHS, "The same, shared by a micrograph's particles.", min=0.0)
]
Known = Annotated[
    bool,
    _option(_MICROGRAPHS, "particles.star states true CTFs, scales, B-factors and beam tilts.", "--known"),
]

OpticsGroups = Annotated[int, _option(_OPTICS, "Their number; micrographs are dealt out to them.", min=1)]
BeamTilt = Annotated[
    tuple[float, float], _option(_OPTICS, "Of all groups in mrad, true but not stated.", metavar="X Y")
]
BeamTiltSd = Annotated[float, _option(_OPTICS, "Its scatter between groups in mrad.", min=0.0)]
Grids = Annotated[
    list[str] | None,
    _option(_OPTICS, "Box and pixel size of a further group. May be given several times.", metavar="PXxÅ"),
]

JunkShares = Annotated[
    list[str] | None,
    _option(
        _JUNK, "Share of images that show something else: broken, empty, pair (two stuck together) or other. May be "
        "given several times.", metavar="KIND=SHARE",
    ),
]  # fmt: skip
JunkOther = Annotated[
    str, _option(_JUNK, "Model or map of the other protein (default: a ball of the object's mass).", metavar="FILE")
]
BrokenShare = Annotated[
    float, _option(_JUNK, "Mass that broken particles lack (whole chains of a model).", min=0.01, max=0.99)
]

NoiseFrom = Annotated[
    Path | None, _option(_NOISE, "Stack of real patches of ice without particles; takes the place of --noise.")
]
NoiseFromPixel = Annotated[
    float | None, _option(_NOISE, "Their Å per pixel (default: the stack's, or the images').", min=0.01)
]
NoiseFromAs = Annotated[
    str,
    _option(_NOISE, "patches, field (Gaussian, of their spectrum), or auto: patches if they are large enough."),
]

ViewsFrom = Annotated[
    Path | None,
    typer.Option(help="STAR, .cs or .npz file to draw views from instead; together with CTFs of the same file."),
]
