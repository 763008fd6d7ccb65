"""What the packages offer to somebody who writes Python: names, lazily imported, and one process without MPI."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cryoiso

FACES = ("core", "physics", "metrics", "io", "nets", "refine", "methods", "engines", "parallel")
ROOT = Path(cryoiso.__file__).parent


def exported(package: str) -> dict[str, Any]:
    """Name -> what it stands for, of everything that a package offers."""
    module = importlib.import_module(f"cryoiso.{package}")
    return {name: getattr(module, name) for name in module.__all__}


@pytest.mark.parametrize("package", FACES)
def test_no_name_is_hidden_by_a_module(package):
    names = exported(package)
    for path in sorted((ROOT / package).glob("*.py")):
        if path.stem != "__init__":
            importlib.import_module(f"cryoiso.{package}.{path.stem}")
            assert path.stem not in names
    assert names == exported(package)


@pytest.mark.parametrize("package", FACES)
def test_type_checkers_see_the_names_that_are_imported_lazily(package):
    tree = ast.parse((ROOT / package / "__init__.py").read_text())
    guard = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    seen = {a.name: n.module for n in guard.body if isinstance(n, ast.ImportFrom) for a in n.names}
    call = next(n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "lazy_exports")
    table = ast.literal_eval(call.args[1])
    assert seen == {name: f"cryoiso.{package}.{module}" for module, names in table.items() for name in names}
    module = importlib.import_module(f"cryoiso.{package}")
    assert sorted(seen) == sorted(module.__all__) and set(module.__all__) <= set(dir(module))


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(importlib.import_module("cryoiso.physics"), "nothing")  # noqa: B009
    with pytest.raises(ImportError):
        exec("from cryoiso.metrics import nothing")


def test_functions_are_reached_whatever_was_imported_before():
    from cryoiso.metrics import fsc
    from cryoiso.physics import ctf, project, simulate

    assert all(callable(f) for f in (fsc, ctf, project, simulate))


HEAVY = ("torch", "numpy", "scipy", "numba", "pandas", "jaxtyping", "mpi4py")


@pytest.mark.parametrize("statement", [
    "import cryoiso",
    "import " + ", ".join(f"cryoiso.{p}" for p in FACES),
    "from cryoiso.cli.main import main; sys.argv[1:] = ['--help']; import contextlib, io\n"
    "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit): main()",
])  # fmt: skip
def test_importing_a_package_imports_nothing_heavy(statement):
    code = f"import sys\n{statement}\nprint([m for m in {HEAVY!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_program_runs_without_jaxtyping():
    code = "import sys; sys.modules['jaxtyping'] = None; from cryoiso.physics import phantom_map, project, lowpass\n"
    code += (
        "from cryoiso.metrics import fsc; m = phantom_map(20, 8.0, 20.0).data; print(len(fsc(m, lowpass(m, 8, 40))))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "11"


def test_without_a_communicator_this_process_works_alone():
    from cryoiso.parallel import Context
    from cryoiso.physics import phantom_map, simulate
    from cryoiso.refine import reconstruct_full, reconstruct_halves, reconstruct_references

    source = simulate(phantom_map(20, 8.0, resolution_A=20.0), 40, snr_db=10.0, seed=3)
    particles = source.particles
    if particles.half is None:
        from dataclasses import replace

        particles = replace(particles, half=(np.arange(40) % 2 + 1).astype(np.int8))
    with_ranks = reconstruct_halves(source, particles, Context())
    alone = reconstruct_halves(source, particles)
    assert all((alone[h].data == with_ranks[h].data).all() for h in (1, 2))
    plain, _, curve = reconstruct_references(source, particles)
    assert (plain[1].data == alone[1].data).all() and curve.shape == (11,)
    full = reconstruct_full(source, particles, None, lambda density: np.ones_like(density.data))
    assert full.weighted is not None and full.fsc.shape == (11,)
