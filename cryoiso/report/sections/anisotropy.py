"""What the report says about directions: sentences, numbers, and which figures there are."""

from __future__ import annotations

from typing import Any

from cryoiso.core.records import DiagnoseRecord
from cryoiso.report.quoted import judged
from cryoiso.report.text import Entry, number, section

BY_DIRECTION = (
    "FSC of the masked half-maps in double cones of 20° about 256 axes: mean, one standard deviation either way, and "
    "the extremes; and the Fourier shell occupancy, the fraction of directions with an FSC of 0.143 or more. Isotropic "
    "maps have a narrow band, and an occupancy that falls at once. On the right, the resolution of each direction."
)
SPHERE = (
    "Resolution by direction, and how many views measure each direction, on the half sphere in equal areas (opposite "
    "directions are one): z at the centre, x to the right. A direction is measured by the views perpendicular to it. "
    "Where a well sampled direction is poorly resolved, views were assigned that do not belong there."
)
FSC3D = (
    "3DFSC: the half-map FSC at every point of Fourier space, from the coefficients of its shell within 20°; planes "
    "through the origin. Lines at 0.143 (white) and 0.5 (black): round if the map is isotropic."
)

Row = tuple[str, str, Any, str, Any]


def sentences(d: DiagnoseRecord) -> list[str]:
    """The verdict in words, where there is one."""
    verdict = section(d, "verdict")
    if not verdict.get("sentence"):
        return []
    return [f"Verdict: {verdict['verdict']}. {verdict['sentence']} {verdict.get('advice') or ''}".strip()]


def number_rows(d: DiagnoseRecord) -> list[Row]:
    """Rows of the table of numbers, None for what is not known: group, label, value, unit, value of the true poses."""
    part = d.get("directional") or {}
    expected = part.get("expected") or {}
    even, views = expected.get("even") or {}, expected.get("views") or {}
    sampled, true = ((d.get("sampling") or {}).get(kind) or {} for kind in ("estimated", "true"))
    group, poses = "By direction", "Sampling by the views"
    mask, plain = part.get("mask") or {}, part.get("unmasked") or {}
    return [
        (group, "cFAR, open definition (below 0.5: anisotropic)", part.get("cfar"), "", None),
        (group, "cFAR without the mask", mask.get("cfar_unmasked"), "", None),
        (group, "resolution, finest direction, without the mask", plain.get("resolution_min_A"), "Å", None),
        (group, "resolution, coarsest direction, without the mask", plain.get("resolution_max_A"), "Å", None),
        (group, "agreement that the mask makes (above 50 %: too much)", _percent(mask.get("share")), "%", None),
        (group, "the same, directions that agree least", _percent(mask.get("share_worst")), "%", None),
        (group, "cFAR that noise leaves to an isotropic map", even.get("cfar"), "", None),
        (group, "cFAR that these views give if their poses are right", views.get("cfar"), "", None),
        (group, "directions below half of what the views promise", _percent(views.get("short_fraction")), "%", None),
        (group, "resolution, finest direction", part.get("resolution_min_A"), "Å", None),
        (group, "resolution, mean of the directions", part.get("resolution_mean_A"), "Å", None),
        (group, "resolution, coarsest direction", part.get("resolution_max_A"), "Å", None),
        (group, "sphericity of the 3DFSC at 0.5 (1 = isotropic)", part.get("sphericity"), "", None),
        *((group, f"Fourier shell occupancy below {v}", part.get(f"fso_{k}_A"), "Å", None) for k, v in _LEVELS),
        (poses, "SCF* (1 = even, 0.81 = side views)", sampled.get("scf_star"), "", true.get("scf_star")),
        (poses, "SCF* of as many even views", sampled.get("scf_star_even"), "", None),
        (poses, "directions that no view measures", _empty(sampled), "%", _empty(true)),
        (poses, "efficiency of the views (1 = even)", sampled.get("efficiency"), "", true.get("efficiency")),
    ]


def _without_the_mask(d: DiagnoseRecord) -> str:
    """Said of masked numbers where the mask makes much of them."""
    part, unmasked = judged(d)
    low, high = number(part, "resolution_min_A"), number(part, "resolution_max_A")
    if not unmasked or low is None or high is None:
        return ""
    return (
        " In this run the mask makes much of that agreement; without it, directions are resolved to "
        f"{low:.1f} to {high:.1f} Å."
    )


_LEVELS = (("09", 0.9), ("05", 0.5), ("01", 0.1))


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else 100 * fraction


def _empty(sampling: dict[str, Any]) -> float | None:
    return _percent(sampling.get("empty_fraction"))


def entries(d: DiagnoseRecord) -> list[Entry]:
    """Figures, as `cryoiso.report.figure_list` wants them."""
    from cryoiso.report.sections import anisotropy_figures as draw

    part = d.get("directional") or {}
    slices, without = part.get("fsc3d_slices"), _without_the_mask(d)
    return [
        (
            "directions",
            "Agreement by direction",
            part.get("cfsc_mean"),
            BY_DIRECTION + without,
            lambda: draw.by_direction(d),
        ),
        ("sphere", "Directions and views", part.get("resolution_A"), SPHERE + without, lambda: draw.spheres(d)),
        ("fsc3d", "3DFSC", slices, FSC3D, lambda: draw.fsc3d_slices(part["fsc3d_slices"])),
    ]
