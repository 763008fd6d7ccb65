"""Names in the source: one class name for one thing, no outgrown name, locals that say what they hold."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import cryoiso

ROOT = Path(cryoiso.__file__).parent
SOURCES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(ROOT.rglob("*.py"))}

OUTGROWN = {
    "StopBell", "keep_watch", "Desk", "KeptSearches", "Given", "Course", "Done", "Frame", "Task", "Progress",
    "Stopped", "Comparison", "Confirmation", "Event", "Start", "State", "Ledger", "Later", "later_stages",
}  # fmt: skip
"""Classes and functions under names that they no longer have."""
MODULES = {
    "bell", "vigil", "handover", "pairs", "route", "probe", "ancestry", "kept", "start", "evidence", "normal", "belt",
    "frames", "sink", "lease", "contrast", "startable", "alone", "follow", "words", "pages", "origin", "apart",
    "remainder", "examine", "kernels", "wire", "later", "watch",
}  # fmt: skip
"""Likewise modules."""
SAYING_NOTHING = {"found", "told", "made", "given", "whole", "one", "both", "mine"}
"""No names of locals and parameters; ``found`` only where an error reports it beside what was expected or is wrong."""
REPORT = {"expected", "problem"}


def definitions(source: str) -> Iterator[str]:
    """Names of the classes and functions that a module defines, nested ones as well."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name


def classes(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            yield node.name


def vague_names(source: str) -> list[tuple[int, str]]:
    """Line and name of the locals and parameters of functions that are called by a word that says nothing."""
    lines = []
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        parameters = [node for node in ast.walk(function.args) if isinstance(node, ast.arg)]
        reports = bool(REPORT & {p.arg for p in parameters})
        bound = [(p.lineno, p.arg) for p in parameters if not (reports and p.arg == "found")]
        bound += [
            (node.lineno, node.id)
            for node in ast.walk(function)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        ]
        lines += [(line, name) for line, name in bound if name in SAYING_NOTHING]
    return sorted(set(lines))


def test_a_class_name_stands_for_one_thing():
    places = defaultdict(list)
    for path, source in SOURCES.items():
        for name in classes(source):
            places[name].append(path)
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}


def test_outgrown_names_do_not_come_back():
    back = [(path, name) for path, source in SOURCES.items() for name in definitions(source) if name in OUTGROWN]
    back += [(path, Path(path).stem) for path in SOURCES if Path(path).stem in MODULES]
    assert back == []


@pytest.mark.parametrize("package", sorted({path.split("/")[0] for path in SOURCES if "/" in path}))
def test_locals_say_what_they_hold(package):
    vague = [
        f"{path}:{line}: {name}"
        for path, source in SOURCES.items()
        if path.startswith(f"{package}/")
        for line, name in vague_names(source)
    ]
    assert vague == []


def test_the_search_finds_them():
    source = (
        "def f(given, *, found):\n    whole = [one for one in given]\n    return lambda mine: whole\n"
        "class A:\n    made: int\n    def g(self, expected, found):\n        return found\n"
    )
    assert vague_names(source) == [(1, "found"), (1, "given"), (2, "one"), (2, "whole"), (3, "mine")]
    assert set(classes(source)) == {"A"} and set(definitions(source)) == {"f", "A", "g"}
