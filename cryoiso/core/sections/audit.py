"""Controls of a finished run: which ones, on how many particles."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cryoiso.core.sections.base import Section

ControlName = Literal["reference", "null", "omitted", "added", "decoy", "other-reference", "stability", "leak"]


class AuditSection(Section):
    """Controls for model bias, overfitting and leaks between the half-sets."""

    enable: bool = Field(False, description="run the controls at the end of the run, before the report")
    controls: list[ControlName] = Field(
        [],
        description="controls to run: reference, null, omitted, added, decoy, other-reference, stability, leak "
        "(default: all that apply)",
    )
    particles: int | None = Field(
        None,
        ge=50,
        description="particles of each control, a random subset (default: as many as make the controls cost about "
        "twice the run, 500 to 20,000)",
    )
    regions: int = Field(
        2,
        ge=1,
        le=6,
        description="omitted: number of regions, each left out alone; with one there is no matched control",
    )
    region_share: float = Field(
        0.2, ge=0.05, le=0.34, description="omitted: share of the reference's mass that a region has"
    )
    other_reference: str = Field(
        "", description="other-reference: a second reference, e.g. another homologue (PDB, mmCIF or MRC)"
    )
    background: str = Field(
        "",
        description="null: real background instead of Gaussian noise, an MRC stack of patches without particles, at "
        "least as large as the particle images",
    )
