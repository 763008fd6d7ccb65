"""The names of the pipeline's files stand in one module."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import cryoiso
from cryoiso.core import products
from cryoiso.pipeline.workflow import RECORDS

ROOT = Path(cryoiso.__file__).parent
BY_HALF = (
    products.half_map, products.half_reference, products.post_processed, products.micelle_half,
    products.composite_half, products.corrected_half, products.generator,
)  # fmt: skip
NAMES = {value for name, value in vars(products).items() if name.isupper() and isinstance(value, str)}
NAMES |= {products.facts(kind) for kind in RECORDS} | {name(half) for name in BY_HALF for half in ("{}", "1", "2")}
OTHER_THINGS = {
    ("pipeline/commands/simulate.py", products.PARTICLES),  # of a simulated set
    ("cli/init_cmd.py", products.REFERENCE),  # stands for the user's own
}


def literals(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of the strings that are neither documentation nor help; what an f-string fills in is {}."""
    if isinstance(tree, ast.Expr) and isinstance(tree.value, ast.Constant):
        return
    if isinstance(tree, ast.keyword) and tree.arg == "help":
        return
    if isinstance(tree, ast.JoinedStr):
        yield tree.lineno, "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in tree.values)
        for part in tree.values:
            if isinstance(part, ast.FormattedValue):
                yield from literals(part.value)
        return
    if isinstance(tree, ast.Constant) and isinstance(tree.value, str):
        yield tree.lineno, tree.value
    for child in ast.iter_child_nodes(tree):
        yield from literals(child)


def written_out(source: str) -> list[tuple[int, str]]:
    """Where a product's name stands in a source, alone or at the end of a path."""
    return [(line, text) for line, text in literals(ast.parse(source)) if text.rpartition("/")[2] in NAMES]


def test_no_name_is_written_out_elsewhere():
    for path in sorted(ROOT.rglob("*.py")):
        if path == Path(products.__file__):
            continue
        where = path.relative_to(ROOT).as_posix()
        for line, text in written_out(path.read_text(encoding="utf-8")):
            assert (where, text) in OTHER_THINGS, f"{where}:{line}: {text!r} has a name in core/products.py"


def test_the_search_finds_them():
    lines = [
        '"""half1.mrc"""', 'a = f"half{h}.mrc"', 'b = f"x/{c / \'map.mrc\'}"', 'd = "../reference.json"',
        'e = f("seal.json", help="map.mrc")', 'g = "map.mrc is a mean"',
    ]  # fmt: skip
    assert written_out("\n".join(lines)) == [
        (2, "half{}.mrc"), (3, "map.mrc"), (4, "../reference.json"), (5, "seal.json"),
    ]  # fmt: skip


def test_names_are_different():
    assert len({value.lower() for value in NAMES}) == len(NAMES)
    assert products.half_map(2) == "half2.mrc" and products.facts("corefine") == "corefine.json"
