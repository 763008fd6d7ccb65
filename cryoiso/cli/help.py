"""Help of a command in panels: options under the headings of their groups, as plain text for any terminal."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

ARGUMENTS, OPTIONS = "Arguments", "Options"
NO_BREAK = "\xa0"
LONGEST_NOTES = 40


class PanelledCommand(TyperCommand):
    """A command whose help shows every ``rich_help_panel`` as a section, without importing rich."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes arguments, options without a panel, then the panels in the order of their first option."""
        panels: dict[str, list[tuple[str, str]]] = {ARGUMENTS: [], OPTIONS: []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                usual = ARGUMENTS if parameter.param_type_name == "argument" else OPTIONS
                panels.setdefault(getattr(parameter, "rich_help_panel", None) or usual, []).append(_unbroken(record))
        for name, records in panels.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)
        formatter.buffer[:] = [text.replace(NO_BREAK, " ") for text in formatter.buffer]


def _unbroken(record: tuple[str, str]) -> tuple[str, str]:
    """The record of an option, whose notes in square brackets stay on one line where they fit."""
    name, text = record[0], record[1].replace("]  [", "; ")
    meaning, bracket, notes = text.rpartition("  [")
    short = bracket and len(notes) <= LONGEST_NOTES
    return name, meaning + bracket + notes.replace(" ", NO_BREAK) if short else text
