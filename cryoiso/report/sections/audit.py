"""What the report says of the controls: their verdicts in a table, a figure for each, and a page of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryoiso.core import products
from cryoiso.report.run_reader import read_json
from cryoiso.report.text import Entry, Text, number, numbers_of, section

KEY = "audit"
SIGNS = {"pass": "● pass", "fail": "✖ FAIL", "inconclusive": "◐ inconclusive", "not applicable": "– not applicable"}
HEAD = ("control", "verdict", "result", "measured", "95 % interval", "threshold")


def collect_audit(folder: Path) -> dict[str, Any]:
    """audit.json of a run folder; empty where there is none."""
    return read_json(folder / products.AUDIT)


def controls_of(part: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of the controls."""
    controls = part.get("controls")
    return [control for control in controls if isinstance(control, dict)] if isinstance(controls, list) else []


def sentences(part: dict[str, Any]) -> list[str]:
    """One sentence for the summary."""
    counts: dict[str, list[str]] = {}
    for control in controls_of(part):
        counts.setdefault(str(control.get("verdict")), []).append(str(control.get("title")))
    if not counts:
        return []
    parts = [
        f"{len(counts[v])} {word}{' (' + '; '.join(counts[v]) + ')' if v != 'pass' else ''}"
        for v, word in (("pass", "passed"), ("fail", "failed"), ("inconclusive", "were inconclusive"))
        if v in counts
    ]
    return ["Controls: " + ", ".join(parts) + "."]


def text(part: dict[str, Any]) -> Text:
    """The table of the controls."""
    n, of = number(part, "particles"), number(part, "of")
    said = (
        "Each control but the first repeats this run's workflow with one thing changed"
        + (f", on {n:,.0f} of its {of:,.0f} particles" if n and of else "")
        + ". A control that passes does not prove that the map is right: it excludes one way of being wrong."
    )
    return Text((said, *_power(part)), HEAD, tuple(_row(control) for control in controls_of(part)))


def _power(part: dict[str, Any]) -> list[str]:
    return [f"{control.get('title')}: {control['power']}" for control in controls_of(part) if control.get("power")]


def _row(control: dict[str, Any]) -> tuple[str, ...]:
    unit, ends = str(control.get("unit") or ""), numbers_of(control, "interval")
    interval = f"{_say(ends[0])} to {_say(ends[1])}" if len(ends) == 2 and None not in ends else ""
    shown = tuple(f"{_say(number(control, key))} {unit}".strip() for key in ("number", "threshold"))
    value = f"{shown[0]} ({control.get('measure')})" if shown[0] else ""
    return (
        str(control.get("title")), SIGNS.get(str(control.get("verdict")), str(control.get("verdict"))),
        str(control.get("sentence")),
        value, interval, shown[1],
    )  # fmt: skip


def _say(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def entries(part: dict[str, Any]) -> list[Entry]:
    """The section and its figures, as `cryoiso.report.figure_list` wants them."""
    controls = controls_of(part)
    if not controls:
        return []
    items: list[Entry] = [(KEY, "Controls", True, "", lambda: "")]
    for control in controls:
        if figure := section(control, "figure"):
            title = f"Control: {control.get('title')}"
            items.append(
                (f"{KEY}-{control.get('name')}", title, True, str(figure.get("caption") or ""), _drawn(figure))
            )
    return items


def _drawn(figure: dict[str, Any]) -> Callable[[], str]:
    def draw() -> str:
        from cryoiso.report.sections.audit_figures import draw_control

        return draw_control(figure)

    return draw
