"""Measures how the source tree is laid out, so that a change of it can be judged by numbers.

    python benchmarks/structure.py [--tree FOLDER] [--json]

rooms          folders of modules, with their files and the largest one
arrows         imports from one room of ``cryoiso.pipeline`` to another, each pair of rooms counted once
floors         longest chain of imports between modules of ``cryoiso.pipeline``
circles        groups of modules of one package that import each other
functions      lines of function bodies: median, 90th percentile, longest
any            occurrences of ``Any`` in annotations
shapes         share of functions with arrays in their signature whose shapes are in the types
stage, batch   files that name a stage (``reconstruct``) or a batch system (``slurm``) in code, not in a comment
"""

from __future__ import annotations

import argparse
import ast
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Graph = dict[str, set[str]]


def modules(tree: Path) -> dict[str, ast.Module]:
    """Dotted name -> syntax tree of every module of the package."""
    found = {}
    for path in sorted((tree / "cryoiso").rglob("*.py")):
        name = ".".join(path.relative_to(tree).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(known: dict[str, ast.Module]) -> Graph:
    """Module -> modules of the package that it imports, lazily or for types only as well."""
    graph: Graph = {}
    for name, tree in known.items():
        targets = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("cryoiso"):
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    targets.add(inner if inner in known else node.module)
        graph[name] = {t for t in targets if t in known and t != name}
    return graph


def circles(graph: Graph) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def floors(graph: Graph, package: str) -> int:
    """Modules in the longest chain of imports inside a package; circles count as one floor."""
    inside = {n: {t for t in targets if t.startswith(f"{package}.")} for n, targets in graph.items()
              if n.startswith(f"{package}.")}  # fmt: skip
    depth: dict[str, int] = {}

    def of(node: str, above: frozenset[str]) -> int:
        if node not in depth:
            below = [of(t, above | {node}) for t in inside.get(node, ()) if t not in above]
            depth[node] = 1 + max(below, default=0)
        return depth[node]

    return max((of(node, frozenset()) for node in inside), default=0)


def arrows(graph: Graph, package: str) -> int:
    """Pairs of rooms (sub-packages, or modules that lie in the package itself) of which one imports the other."""

    def room(name: str) -> str:
        return name[len(package) + 1 :].split(".")[0]

    return len({
        (room(a), room(b))
        for a, targets in graph.items() for b in targets
        if a.startswith(f"{package}.") and b.startswith(f"{package}.") and room(a) != room(b)
    })  # fmt: skip


def functions(known: dict[str, ast.Module]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for tree in known.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function's body without its docstring."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def annotations(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [ast.unparse(a) for a in [*(x.annotation for x in arguments), node.returns] if a is not None]


def naming(known: dict[str, ast.Module], word: str) -> list[str]:
    """Modules with the word in a string or a name of their code, docstrings and comments left out."""
    found = []
    for name, tree in known.items():
        docs = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}
        words = [
            n.value
            for n in ast.walk(tree)
            if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in docs
        ]
        words += [n.id for n in ast.walk(tree) if isinstance(n, ast.Name)]
        if any(word in text.lower() for text in words):
            found.append(name)
    return found


def measured(tree: Path) -> dict[str, Any]:
    """All numbers of a tree."""
    known = modules(tree)
    graph = imports(known)
    rooms: dict[str, list[int]] = defaultdict(list)
    for path in sorted((tree / "cryoiso").rglob("*.py")):
        rooms[str(path.parent.relative_to(tree))].append(len(path.read_text(encoding="utf-8").splitlines()))
    lengths = sorted(body_lines(f) for f in functions(known))
    with_arrays = [
        a for f in functions(known) for a in [annotations(f)] if any("ndarray" in x or "Tensor" in x for x in a)
    ]
    shaped = [
        f for f in functions(known) if any("Float[" in x or "Complex[" in x or "Int[" in x for x in annotations(f))
    ]
    packages = {n.rsplit(".", 1)[0] for n in known if n.count(".") > 1}
    return {
        "files": len(known), "lines": sum(map(sum, rooms.values())),
        "rooms": {name: {"files": len(sizes), "largest": max(sizes)} for name, sizes in rooms.items()},
        "pipeline_arrows": arrows(graph, "cryoiso.pipeline"), "pipeline_floors": floors(graph, "cryoiso.pipeline"),
        "packages": len(packages), "circles": circles(graph),
        "function_lines": {
            "median": statistics.median(lengths), "p90": lengths[int(0.9 * len(lengths))], "longest": lengths[-1],
        },
        "any": sum(a.count("Any") for f in functions(known) for a in annotations(f)),
        "shapes_in_types": round(len(shaped) / max(len(with_arrays) + len(shaped), 1), 3),
        "files_that_name_a_stage": len(naming(known, "reconstruct")),
        "files_that_name_a_batch_system": naming(known, "slurm"),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=Path(__file__).resolve().parents[1], help="folder with cryoiso/")
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    sys.setrecursionlimit(10_000)
    found = measured(a.tree)
    if a.json:
        print(json.dumps(found, indent=1))
        return
    for name, value in found.items():
        if name == "rooms":
            for room, facts in value.items():
                print(f"  {room:36s} {facts['files']:3d} files, largest {facts['largest']}")
        else:
            print(f"{name}: {value}")


if __name__ == "__main__":
    main()
