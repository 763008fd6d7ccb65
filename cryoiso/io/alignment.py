"""Columns of a particle STAR file that describe one alignment: no longer true once the poses are others.

Programs read them back. RELION centres local searches on ``rlnAngle*Prior`` and ``rlnOrigin*Prior*`` where they are
there, and divides images by ``rlnNormCorrection``. Names are those of RELION 3.0 to 5.0; docs/formats.md has the table.
"""

from __future__ import annotations

from collections.abc import Container

ANGLES = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")
POSES = (
    *ANGLES,
    *(f"rlnOrigin{axis}{unit}" for axis in "XYZ" for unit in ("", "Angst")),
)

ANGLE_PRIORS = tuple(f"{angle}Prior" for angle in ANGLES)
PRIORS = (
    *ANGLE_PRIORS,
    *(f"rlnOrigin{axis}Prior{unit}" for axis in "XYZ" for unit in ("", "Angst")),
    "rlnAngleRotFlipRatio",
    "rlnAnglePsiFlipRatio",
    "rlnAnglePsiFlip",
    "rlnIsFlip",
    "rlnOrientationsID",
)

FITS = (
    "rlnNormCorrection",
    "rlnNrOfSignificantSamples",
    "rlnLogLikeliContribution",
    "rlnMaxValueProbDistribution",
    "rlnKullbackLeiblerDivergence",
    "rlnClassNumber",
    "rlnGroupNumber",
    "rlnGroupNrParticles",
    "cryoisoPoseEntropy",
    "cryoisoPoseSpread",
    "cryoisoBalanced",
    "cryoisoScale",
    "cryoisoNoiseLevel",
    "cryoisoClassProbability",
    "cryoisoJunkProbability",
)
"""How particles fitted the reference, and numbers that point into that refinement's model file."""

OFFSETS_Z = ("rlnOriginZ", "rlnOriginZAngst")
SUBTOMOGRAM_FRAME = tuple(f"rlnTomoSubtomogram{angle}" for angle in ("Rot", "Tilt", "Psi"))
BODY_TABLES = ("images_body_",)
"""How tables are called in which multi-body refinement keeps the poses of bodies, relative to the particle's."""


def outdated(columns: Container[str]) -> tuple[str, ...]:
    """Names that new poses leave without a meaning, in a table with these columns; the poses' own are not among them.

    Where a subtomogram's frame is given (rlnTomoSubtomogramRot, Tilt, Psi), priors of angles are relative to that frame
    and stay true.
    """
    names = (*PRIORS, *FITS, *OFFSETS_Z)
    if all(name in columns for name in SUBTOMOGRAM_FRAME):
        names = tuple(name for name in names if name not in ANGLE_PRIORS)
    return tuple(name for name in names if name in columns)


def is_body_table(name: str) -> bool:
    return name.startswith(BODY_TABLES)
