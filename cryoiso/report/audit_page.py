"""The controls of a run as a page of their own, for a run whose report is not made again."""

from __future__ import annotations

from pathlib import Path

from cryoiso.core import products
from cryoiso.io.atomic import write_text
from cryoiso.report.figure_list import Figure
from cryoiso.report.page import page
from cryoiso.report.records import ReportData
from cryoiso.report.sections.audit import KEY, collect_audit, entries, sentences, text
from cryoiso.report.text import Text

PAGE = "audit.html"


def write_page(folder: Path) -> Path:
    """Writes the page beside audit.json and returns its path."""
    part = collect_audit(folder)
    figures = [
        Figure(key, title, caption, draw(), text(part) if key == KEY else Text())
        for key, title, _, caption, draw in entries(part)
    ]
    data: ReportData = {
        "title": f"Controls of {folder.resolve().name}", "summary": sentences(part), "numbers": [], "provenance": [],
        "stages": [],
    }  # fmt: skip
    path = (folder / products.AUDIT).with_name(PAGE)
    write_text(path, page(data, figures))
    return path
