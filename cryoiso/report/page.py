"""The report as one self-contained HTML page: no network, prints on paper, follows a dark screen.

Its one script (`assets/report.js`) adds values under the mouse and turns the surface; without it nothing is missing.
"""

from __future__ import annotations

import html
import json
import re
from importlib.resources import files
from typing import Any

from cryoiso.core.log import duration, printable
from cryoiso.report.figure_list import Figure
from cryoiso.report.hover import Picture
from cryoiso.report.records import ReportData
from cryoiso.report.sections.audit import SIGNS
from cryoiso.report.text import Text

_CSS = """
:root{--ink:#1b1f24;--soft:#5b6470;--line:#d9dee4;--page:#f6f7f9;--card:#fff;--accent:#0072B2;
--pass:#00734f;--fail:#b3360b;--inconclusive:#8a5a00}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaed;--soft:#a2abb6;--line:#3a414a;--page:#15181c;--card:#1e2328;
--accent:#56B4E9;--pass:#4fd1a5;--fail:#ff8a65;--inconclusive:#f0c060}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1020px;margin:0 auto;padding:2.2rem 1.2rem 4rem}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 .2rem}
h2{font-size:1.2rem;margin:2.4rem 0 .6rem}
.kind{color:var(--soft);margin:0 0 1.4rem}
.summary,figure,.table{background:var(--card);border:1px solid var(--line);border-radius:10px}
.summary{padding:1rem 1.3rem;border-left:5px solid var(--accent);font-size:1.06rem}
.summary p{margin:.35rem 0}
.summary p:first-child{font-weight:600}
figure{margin:0 0 .4rem;padding:.9rem}
figure img{display:block;width:100%;height:auto;margin:0 auto;background:#fff;border-radius:6px;padding:6px}
figure.narrow img,figure canvas{max-width:700px;margin:0 auto}
figure{position:relative}figure canvas{display:block;width:460px;max-width:100%;cursor:grab;touch-action:none}
.scale{display:flex;align-items:center;gap:.6rem;max-width:460px;margin:.5rem auto 0;font-size:.86rem;color:var(--soft)}
.scale i{flex:1;height:.7rem;border-radius:4px}
#tip{position:fixed;z-index:9;pointer-events:none;background:var(--card);color:var(--ink);border:1px solid var(--line);
border-radius:6px;padding:.25rem .5rem;font-size:.84rem;box-shadow:0 2px 8px #0003;max-width:22rem}
#tip i{display:inline-block;width:.7em;height:.7em;border-radius:50%;margin-right:.4em}
.rule{position:absolute;width:1px;background:#555a;pointer-events:none}
figcaption{color:var(--soft);font-size:.92rem;margin:.7rem .2rem 0}
.table{overflow-x:auto;padding:.3rem .9rem}
table{border-collapse:collapse;width:100%;font-size:.94rem}
th,td{padding:.34rem .5rem;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
tr:last-child td{border-bottom:0}
th{font-weight:600;color:var(--soft)}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.pass,.fail,.inconclusive{font-weight:600;white-space:nowrap}
.pass{color:var(--pass)}.fail{color:var(--fail)}.inconclusive{color:var(--inconclusive)}
.table.named td:first-child{color:var(--soft);width:34%}
.words{margin:0 .2rem .8rem}.words p{margin:.3rem 0}.table+figure{margin-top:.8rem}
tr.group td{font-weight:600;padding-top:.9rem;border-bottom:1px solid var(--line)}
footer{margin-top:3rem;color:var(--soft);font-size:.86rem}
footer table{width:auto}footer td{border:0;padding:.12rem .5rem .12rem 0;overflow-wrap:anywhere}
footer td:first-child{white-space:nowrap;padding-right:1.2rem}
summary{cursor:pointer}
@media(max-width:700px){main{padding:1.4rem .8rem 3rem}.summary{padding:.8rem 1rem;font-size:1rem}figure{padding:.6rem}
.scroll{overflow-x:auto}.scroll img{width:max(100%,700px)}.narrow .scroll img{width:max(100%,460px)}
.table.named td{display:block;width:auto}.table.named td:first-child{width:auto;border:0;padding-bottom:0}
.numbers tr{display:grid;grid-template-columns:repeat(var(--columns),1fr);border-bottom:1px solid var(--line)}
.numbers tr>*{border:0;padding:.2rem .3rem}.numbers tr>:first-child{grid-column:1/-1}
.numbers tr>:empty:first-child{display:none}
.numbers td.n,.numbers th.n{text-align:left;white-space:normal}.numbers td:first-child{color:var(--soft)}
.numbers tr.group td{color:var(--ink)}}
@media print{:root{--ink:#000;--soft:#333;--line:#bbb;--page:#fff;--card:#fff;--pass:#00734f;--fail:#b3360b;
--inconclusive:#8a5a00}body{font-size:11pt}
main{max-width:none;padding:0}
figure,.summary,.words p,tr{break-inside:avoid}h2{break-after:avoid}}
"""

_LIGHTS = {words: verdict for verdict, words in SIGNS.items() if verdict != "not applicable"}
"""Words of a verdict -> its class, which has the colour; their signs differ in shape too."""
_NARROW = {"measured", "fsc", "errors", "moved", "correct"}
PX_PER_IN = 106
"""Pixels of the page per inch of a figure: the widest, of 9.2 to 10 inches, fill it."""
_FIRST = ("maps", "measured")
"""Figures before the table of numbers."""
_COLUMNS = (("before", "before"), ("value", "this run"), ("true_poses", "true poses"))


def escape(text: str) -> str:
    """A text as it may stand in a page: no tags, no control characters, nothing that turns the direction of reading."""
    return html.escape(printable(text))


def page(data: ReportData, figures: list[Figure]) -> str:
    """The whole page.

    Args:
        data: from `cryoiso.report.collect.collect`.
        figures: from `cryoiso.report.figure_list.figures`.
    """
    title = escape(str(data["title"]))
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{title} - cryoiso report</title><style>{_CSS}</style></head><body><main>",
        f'<h1>{title}</h1><p class="kind">cryoiso report: what this run measured of its maps and poses.</p>',
        _summary(data["summary"]),
        *[_figure(f) for f in figures if _is_control(f)],
        *[_figure(f) for f in figures if f.key in _FIRST],
        _numbers(data["numbers"]),
        *[_figure(f) for f in figures if f.key not in _FIRST and not _is_control(f)],
        _footer(data),
        "</main>",
        _script(figures),
        "</body></html>",
    ]
    return "\n".join(p for p in parts if p) + "\n"


def _is_control(figure: Figure) -> bool:
    """Whether it belongs to the controls, which stand first after the verdict."""
    return figure.key.split("-")[0] == "audit"


def _summary(sentences: list[str]) -> str:
    shown = sentences or ["This run has not been measured yet."]
    return '<div class="summary">' + "".join(f"<p>{_verdict_first(escape(s))}</p>" for s in shown) + "</div>"


def _verdict_first(sentence: str) -> str:
    """The verdict's name stands out; the reasons follow in the same paragraph."""
    return re.sub(r"\A(Verdict: [^.]*\.)", r"<strong>\1</strong>", sentence)


def _figure(figure: Figure) -> str:
    kind = ' class="narrow"' if figure.key in _NARROW else ""
    parts = [f'<h2 id="{escape(figure.key)}">{escape(figure.title)}</h2>', _text(figure.text)]
    if figure.image:
        parts.append(
            f'<figure{kind} id="figure-{escape(figure.key)}"><div class="scroll">'
            f'<img alt="{escape(figure.title)}" {_widest(figure.image)}src="{figure.image}"></div>'
            f"{_scale(figure.surface)}<figcaption>{escape(figure.caption)}</figcaption></figure>"
        )
    return "".join(parts)


def _widest(image: str) -> str:
    """No picture is enlarged beyond the size that its words were drawn for."""
    width_in = image.width_in if isinstance(image, Picture) else 0.0
    return f'style="max-width:{round(PX_PER_IN * width_in)}px" ' if width_in else ""


def _scale(surface: dict[str, Any] | None) -> str:
    """The colours of a surface, from its lowest value to its highest."""
    if not surface or not surface.get("ends"):
        return ""
    low, high = (escape(str(words)) for words in surface["ends"])
    colours = ",".join(f"rgb({r},{g},{b})" for r, g, b in surface["stops"])
    return f'<div class="scale">{low}<i style="background:linear-gradient(90deg,{colours})"></i>{high}</div>'


def _script(figures: list[Figure]) -> str:
    """The script with the numbers that it shows; nothing in them can end the element that they stand in."""
    numbers = {
        "hover": {f.key: f.image.hover for f in figures if isinstance(f.image, Picture) and f.image.hover},
        "surfaces": {f.key: f.surface for f in figures if f.surface},
    }
    if not any(numbers.values()):
        return ""
    text = json.dumps(numbers, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    program = files("cryoiso.report").joinpath("assets", "report.js").read_text(encoding="utf-8")
    return f'<script type="application/json" id="cryoiso-data">{text}</script>\n<script>{program}</script>'


def _text(text: Text) -> str:
    """Sentences and a table of words; with no head, the first column names the rows."""
    said = "".join(f"<p>{escape(s)}</p>" for s in text.sentences)
    said = f'<div class="words">{said}</div>' if said else ""
    if not text.rows:
        return said
    head = "<tr>" + "".join(f"<th>{escape(h)}</th>" for h in text.head) + "</tr>" if text.head else ""
    lines = ["<tr>" + "".join(map(_cell, row)) + "</tr>" for row in text.rows]
    kind = "" if text.head else " named"
    return f'{said}<div class="table{kind}"><table>{head}' + "\n".join(lines) + "</table></div>"


def _cell(words: str) -> str:
    """A cell of a table of words, a verdict in its colour."""
    light = _LIGHTS.get(words)
    return f'<td class="{light}">{escape(words)}</td>' if light else f"<td>{escape(words)}</td>"


def _numbers(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    columns = [(key, name) for key, name in _COLUMNS if key == "value" or any(r.get(key) is not None for r in rows)]
    head = "<tr><th></th>" + "".join(f'<th class="n">{name}</th>' for _, name in columns) + "</tr>"
    lines, group = [head], None
    for row in rows:
        if row["group"] != group:
            group = row["group"]
            lines.append(f'<tr class="group"><td colspan="{len(columns) + 1}">{escape(group)}</td></tr>')
        values = "".join(f'<td class="n">{_number(row.get(key), row["unit"])}</td>' for key, _ in columns)
        lines.append(f"<tr><td>{escape(row['label'])}</td>{values}</tr>")
    table = f'<table style="--columns:{len(columns)}">' + "\n".join(lines) + "</table>"
    return f'<h2 id="numbers">Numbers</h2><div class="table numbers">{table}</div>'


def _number(value: Any, unit: str) -> str:
    """A value with its unit as people write it; empty if there is none.

    >>> _number(24.713, "Å"), _number(1234, ""), _number(None, "%"), _number(0.913, "")
    ('24.7 Å', '1,234', '', '0.913')
    """
    if value is None:
        return ""
    if isinstance(value, int):
        text = f"{value:,}"
    elif isinstance(value, float):
        text = (
            f"{value:.3f}"
            if unit in ("", "nats", "dB")
            else f"{value:.2f}"
            if unit == "Å" and value < 3
            else f"{value:.1f}"
        )
    else:
        text = str(value)
    return escape(text) + ("" if not unit else unit if unit == "°" else f" {escape(unit)}")


def _footer(data: ReportData) -> str:
    rows = [(escape(str(k)), escape(str(v))) for k, v in data["provenance"]]
    times = [s for s in data["stages"] if isinstance(s.get("seconds"), int | float)]
    if times:
        text = ", ".join(f"{s['stage']} {duration(s['seconds'] or 0.0)}" for s in times)
        rows.append(("time", escape(f"{text}; together {duration(sum(s['seconds'] or 0.0 for s in times))}")))
    if not rows:
        return ""
    table = "".join(f"<tr><td>{k}</td><td>{v}</td></tr>" for k, v in rows)
    hint = "The same numbers are in report.json beside this page."
    return f"<footer><h2>Where this comes from</h2><table>{table}</table><p>{hint}</p></footer>"
