"""Input data: particles, reference, sample, and the truth of simulated particles."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cryoiso.core.sections.base import Section


class ParticlesSection(Section):
    """Particle images and how they are stored for the refinement."""

    file: str = Field(description="particles: a RELION STAR file or a cryoSPARC .cs file")
    project: str = Field("", description="folder that relative image paths start from (default: found as in RELION)")
    passthrough: list[str] = Field(
        [], description="cryoSPARC passthrough files with fields that the .cs file lacks (default: those beside it)"
    )
    invert: Literal["auto", "yes", "no"] = Field(
        "auto",
        description="multiply images by -1, so that protein is white; yes: protein is dark in the images; auto: decide "
        "from the images",
    )
    normalise: bool = Field(
        True, description="normalise every image to mean 0 and standard deviation 1 of its background"
    )
    storage: Literal["float16", "float32"] = Field("float16", description="number format of the images in the shards")
    shard_mib: int = Field(256, ge=1, description="size of one shard file")


class ReferenceSection(Section):
    """Initial reference."""

    file: str = Field(description="reference: an atomic model (PDB, mmCIF) or a map (MRC)")
    pixel_size_A: float | None = Field(
        None, gt=0, description="pixel size of the reference map, if its header is wrong"
    )
    resample: bool = Field(False, description="resample a map of another box or pixel size onto the particles' grid")
    chains: list[str] = Field(
        [], description="chains of an atomic model that are used, by their names in the file (default: all)"
    )
    assembly: str = Field(
        "auto",
        description="biological assembly of an atomic model, by its name; none: the atoms as in the file; auto: "
        "assembly 1, if it is made by more than one operator",
    )
    confidence: Literal["auto", "yes", "no"] = Field(
        "auto",
        description="whether the B column of an atomic model holds a predicted confidence (pLDDT); auto: decide from "
        "the file",
    )
    min_confidence: float = Field(
        50.0, ge=0, le=100, description="residues of a predicted model below this confidence are left out"
    )
    full_confidence: float = Field(
        70.0, ge=0, le=100, description="confidence from which on a residue of a predicted model has its full weight"
    )
    lowpass_A: float = Field(30.0, gt=0, description="resolution of the initial low-pass filter of the reference")
    fit: str = Field("", description="align the reference to this map first (MRC, any grid)")
    fit_resolution_A: float | None = Field(
        None, gt=0, description="finest information used for that alignment (default: 10 Å, or 2.5 pixels if coarser)"
    )


class SampleSection(Section):
    """The particle."""

    symmetry: str = Field(
        "C1",
        description="point group: Cn, Dn, T, O or I; in a job file also auto: refine without one (C1) and propose one "
        "of the resulting half-maps",
    )
    diameter_A: float | None = Field(None, gt=0, description="particle diameter (default: measured from the reference)")
    mask: str = Field("", description="solvent mask, MRC (default: computed from the half-maps)")


class TruthSection(Section):
    """Truth of simulated particles, for the errors in the report; never used in a refinement."""

    particles: str = Field("", description="STAR file with the true poses of simulated particles")
    map: str = Field("", description="true map of simulated particles (MRC, on the particles' grid)")
