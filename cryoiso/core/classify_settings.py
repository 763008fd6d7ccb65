"""Settings of a 3D classification."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cryoiso.core.errors import UsageError


class ClassifySection(BaseModel):
    """How particles are sorted into classes."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    classes: int = Field(2, ge=1, le=64, description="number of classes of particles")
    align: Literal["none", "local", "global"] = Field(
        "none",
        description="none: the poses of the particle file stay as they are; local: searched within local_deg of them; "
        "global: all views are searched",
    )
    local_deg: float = Field(10.0, gt=0, le=90, description="range of a local search about the given poses")
    lowpass_A: float = Field(30.0, gt=0, description="the first references are low-passed to this resolution")
    junk: bool = Field(False, description="a further class of images without a particle, judged within viewing cones")
    max_iterations: int = Field(40, ge=1, description="upper bound; it stops by itself when the classes have settled")
    min_change: float = Field(
        0.01, gt=0, lt=1, description="settled: a smaller share of the particles changes class in an iteration"
    )


def parse_classify(data: dict[str, Any]) -> ClassifySection:
    """Checks settings that were given as options.

    Raises:
        UsageError: names every bad value.
    """
    try:
        return ClassifySection.model_validate(data)
    except ValidationError as error:
        wrong = (
            f"classify.{'.'.join(map(str, e['loc']))}: {e['msg']} (found {e.get('input')!r})" for e in error.errors()
        )
        raise UsageError("options: " + "; ".join(wrong)) from None
