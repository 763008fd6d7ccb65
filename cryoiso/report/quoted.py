"""Which of a run's resolutions may be quoted: inside the mask, unless the mask itself makes the agreement."""

from __future__ import annotations

from typing import Any

from cryoiso.core.records import DiagnoseRecord
from cryoiso.report.text import number, section

IN_THE_MASK = "FSC 0.143, half-maps, corrected for the mask"
WITHOUT_A_MASK = "FSC 0.143, half-maps, without a mask"


def judged(d: DiagnoseRecord) -> tuple[dict[str, Any], bool]:
    """The numbers by direction on which the verdict rests, and whether they are of the half-maps without the mask."""
    masked = section(d, "directional")
    plain = section(masked, "unmasked")
    return (plain, True) if plain else (masked, False)


def quoted_resolution(d: DiagnoseRecord) -> tuple[float | None, str]:
    """The resolution (Å) that may be quoted, and how it was measured."""
    unmasked_A = number(d, "resolution_0143_unmasked_A") if judged(d)[1] else None
    return (number(d, "resolution_0143_A"), IN_THE_MASK) if unmasked_A is None else (unmasked_A, WITHOUT_A_MASK)


def mask_warning(d: DiagnoseRecord) -> list[str]:
    """What must be said where the resolution inside the mask may not be quoted."""
    resolution_A, criterion = quoted_resolution(d)
    masked_A = number(d, "resolution_0143_A")
    if criterion == IN_THE_MASK or resolution_A is None or masked_A is None:
        return []
    return [
        f"Much of the half-maps' agreement inside the mask comes from the mask: quote {resolution_A:.2f} Å (without a "
        f"mask), not {masked_A:.2f} Å, or measure again with a wider mask that has a softer edge."
    ]
