"""What a report may say to others: no folder of the user's machine, and nothing that steers a terminal or a page."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from cryoiso.core.log import printable
from cryoiso.report.figure_list import Figure
from cryoiso.report.records import ReportData
from cryoiso.report.text import Text

_PATH = re.compile(r"""(?<![\w.)\]}/:~-])/(?:[^\s/'"<>,;:()|]+/)+[^\s/'"<>,;:()|]*""")
"""An absolute path of at least one folder in running text (and no part of an address or a fraction)."""


_QUOTED = re.compile(r"""(['"])/[^'"\n]*/([^'"/\n]*)\1""")
"""An absolute path in quotes, in which it may have blanks."""


def for_others(data: ReportData, folder: Path) -> ReportData:
    """The data of a report with every absolute path cut to the file's name, or, inside of the run folder, to its name
    from there.

    Args:
        data: from `cryoiso.report.collect.collect`. folder: the run folder.
    """
    cut: ReportData = _cut(data, _known(data, folder))
    return cut


def figures_for_others(figures: list[Figure], data: ReportData, folder: Path) -> list[Figure]:
    """The figures with their words cut likewise."""
    known = _known(data, folder)

    def cut(text: str) -> str:
        return str(_cut(text, known))

    return [
        replace(
            figure, title=cut(figure.title), caption=cut(figure.caption),
            text=Text(tuple(map(cut, figure.text.sentences)), tuple(map(cut, figure.text.head)),
                      tuple(tuple(map(cut, row)) for row in figure.text.rows)),
        )
        for figure in figures
    ]  # fmt: skip


def name_of(path: object) -> str:
    """A path without its folders.

    >>> name_of("/home/a b/x.star"), name_of("x.star"), name_of("/")
    ('x.star', 'x.star', '/')
    """
    return PurePosixPath(str(path)).name or str(path)


def _known(data: ReportData, folder: Path) -> list[tuple[str, str]]:
    """Paths that the run is known to have, and what is said instead; the longest first. They may contain blanks."""
    run = str(folder.absolute())
    names = {f"{run}/": "", run: folder.absolute().name}
    for section in data.get("job", {}).values():
        for value in section.values() if isinstance(section, dict) else ():
            if isinstance(value, str) and value.startswith("/") and " -" not in value:
                names.setdefault(value, name_of(value))
                if (parent := PurePosixPath(value).parent) != PurePosixPath("/"):
                    names.setdefault(f"{parent}/", "")
    return sorted(names.items(), key=lambda pair: -len(pair[0]))


def _cut(value: Any, known: list[tuple[str, str]]) -> Any:
    if isinstance(value, dict):
        return {_cut(key, known): _cut(part, known) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_cut(part, known) for part in value)
    if not isinstance(value, str):
        return value
    for path, short in known:
        value = value.replace(path, short)
    if value.startswith("/") and " -" not in value and " /" not in value:
        value = name_of(value)
    value = _QUOTED.sub(r"\1\2\1", value)
    return printable(_PATH.sub(lambda match: name_of(match[0]), value))
