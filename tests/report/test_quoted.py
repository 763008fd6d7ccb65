"""Where the mask makes the half-maps' agreement, no part of the result quotes a number that was measured with it."""

from __future__ import annotations

from typing import Any

from test_deposit import facts as deposit_facts

from cryoiso.report import figure_list, figures
from cryoiso.report.collect import numbers, summary
from cryoiso.report.methods_text import methods, warnings
from cryoiso.report.quoted import IN_THE_MASK, WITHOUT_A_MASK, quoted_resolution
from cryoiso.report.sections import anisotropy, measured


def a_report(unmasked: bool) -> dict[str, Any]:
    """A report's data with numbers of masked half-maps, and, if asked for, those on which the verdict rests instead."""
    data = {**deposit_facts("refine"), "stages": [], "provenance": []}
    data["diagnose"]["directional"] |= {"cfsc_mean": [1.0], "resolution_A": [4.8, 5.5], "mask": {"share": 0.6}}
    if unmasked:
        data["diagnose"]["directional"]["unmasked"] = {"cfar": 0.1, "resolution_min_A": 5.2, "resolution_max_A": 30.0}
    return data


def test_the_resolution_inside_the_mask_is_quoted_where_the_mask_does_not_make_it():
    data = a_report(False)
    assert quoted_resolution(data["diagnose"]) == (5.0, IN_THE_MASK) and not warnings(data)
    assert "agree to 5.0 Å (FSC 0.143, corrected for the mask)" in summary(data)[0]
    rows = dict(measured.text(data).rows)
    assert rows["by direction"] == "4.8 to 5.5 Å" and rows["resolution of the half-maps (FSC 0.143)"] == "5.0 Å"


def test_else_the_one_without_a_mask():
    data = a_report(True)
    assert quoted_resolution(data["diagnose"]) == (5.8, WITHOUT_A_MASK)
    assert "agree to 5.8 Å without a mask (FSC 0.143); the 5.0 Å inside the mask come largely" in summary(data)[0]
    rows = dict(measured.text(data).rows)
    assert rows["by direction, without the mask"] == "5.2 to 30.0 Å"
    assert rows["resolution of the half-maps (FSC 0.143, without the mask)"] == "5.8 Å"
    assert rows["cFAR (1: all directions alike), without the mask"] == "0.10"
    assert rows["agreement of the half-maps that comes from the mask"] == "60.0 %"
    assert "quote 5.80 Å (without a mask), not 5.00 Å" in warnings(data)[0]
    assert "the number without a mask is the one to quote" in methods(data)
    table = {row["label"]: row["value"] for row in numbers(data)}
    assert table["resolution, coarsest direction, without the mask"] == 30.0
    captions = {entry[0]: entry[3] for entry in anisotropy.entries(data["diagnose"])}
    assert all(
        "without it, directions are resolved to 5.2 to 30.0 Å" in captions[key] for key in ("directions", "sphere")
    )


def test_the_figure_of_the_half_maps_marks_what_may_be_quoted(monkeypatch):
    marked = []
    monkeypatch.setattr(figures, "_mark", lambda ax, resolution_A, *_: marked.append(resolution_A))
    for unmasked in (False, True):
        data = a_report(unmasked)
        curves = {key: [] for key in data["diagnose"] if key.startswith("fsc_")}
        data["diagnose"] |= {**curves, "frequency_invA": [0.0, 0.1, 0.2], "fsc_unmasked": [1.0, 0.5, 0.1]}
        sections = data["diagnose"]["directional"]
        data["diagnose"]["directional"] = {key: sections[key] for key in ("unmasked",) if key in sections}
        (figure,) = [f for f in figure_list.figures(data, []) if f.key == "fsc"]
        assert ("quote 5.80 Å (without a mask)" in figure.caption) == unmasked
    assert marked == [5.0, 5.8]
