"""The controls in the report: first after the verdict, with a figure each, and a page of their own."""

from __future__ import annotations

import json
from pathlib import Path

from cryoiso.methods.audit.record import ControlRecord, FigureData, Line
from cryoiso.report.audit_page import write_page
from cryoiso.report.figure_list import Figure
from cryoiso.report.page import page
from cryoiso.report.sections import audit

RECORDS = [
    ControlRecord(
        "null", "Noise <instead> of images", "pass", "It is not noise.", "correlation", 0.4, (0.3, 0.5), 0.0,
        power="0.1 would have been seen.",
        figure=FigureData("1/Å", "FSC", [Line("noise", [0, 0.1, 0.2], [1, float("nan"), 0])], level=0.0, caption="C."),
    ),
    ControlRecord(
        "omitted", "Regions", "fail", "They are missing.", "Ω", 0.4, (0.3, float("inf")), 0.1,
        figure=FigureData("Ω", "", intervals=[("one", 0.4, 0.3, 0.5), ("two", 0.1, float("nan"), 0.2)], level=0.1),
    ),
    ControlRecord("decoy", "Decoy", "not applicable", "Not asked for."),
]  # fmt: skip
AUDIT = {"verdict": "fail", "particles": 50, "of": 1000, "controls": [r.as_dict() for r in RECORDS]}


def test_controls_stand_between_the_verdict_and_the_maps():
    figures = [
        Figure(key, title, caption, draw(), audit.text(AUDIT) if key == "audit" else Figure("", "", "", "").text)
        for key, title, _, caption, draw in audit.entries(AUDIT)
    ]
    maps = Figure("maps", "Maps", "", "data:,")
    html = page({"title": "t", "summary": ["The verdict."], "numbers": [], "provenance": [], "stages": []},
                [maps, *figures])  # fmt: skip
    places = [html.index(x) for x in ("The verdict.", "It is not noise.", "data:image/svg", 'id="maps"')]
    assert places == sorted(places)
    assert "Noise &lt;instead&gt; of images" in html and "FAIL" in html and "0.3 to 0.5" in html
    assert html.count("data:image/svg") == 2  # the third control has no figure
    assert '<td class="pass">● pass</td>' in html and '<td class="fail">✖ FAIL</td>' in html


def test_the_summary_names_what_did_not_pass():
    assert audit.sentences(AUDIT) == ["Controls: 1 passed, 1 failed (Regions)."]
    assert audit.sentences({}) == [] and audit.entries({}) == []


def test_a_page_of_their_own_beside_their_numbers(tmp_path: Path):
    folder = tmp_path / "run"
    (folder / "audit").mkdir(parents=True)
    (folder / "audit" / "audit.json").write_text(json.dumps(AUDIT))
    html = write_page(folder).read_text()
    assert "Controls of run" in html and "They are missing." in html and str(tmp_path) not in html


def test_bars_read_from_the_top_as_they_are_named(monkeypatch):
    from cryoiso.report.sections import audit_figures

    drawn = []
    monkeypatch.setattr(audit_figures, "address", lambda canvas: drawn.append(canvas) or "data:,")
    audit_figures.draw_control(AUDIT["controls"][1]["figure"])
    ax = drawn[0].axes[0]
    places = {
        label.get_text(): ax.transData.transform((0, label.get_position()[1]))[1] for label in ax.get_yticklabels()
    }
    assert [*places] == ["one", "two"] and places["one"] > places["two"]


def test_damaged_numbers_do_not_stop_a_report():
    odd = {"name": "x", "figure": {"intervals": [[1], ["a", None, 1, 2]]}}
    for part in ({"controls": 3}, {"controls": [None, odd]}):
        for _, _, _, _, draw in audit.entries(part):
            draw()
        audit.text(part)
