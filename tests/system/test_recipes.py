"""Packages: recipes for conda, Spack and EasyBuild say what pyproject.toml says; sdist and wheel are complete."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from cryoiso import __version__

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDED = {Requirement(line).name: Requirement(line).specifier for line in PROJECT["dependencies"]}
CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base"}
EASYBUILD_NAMES = {"torch": "PyTorch"}
BUNDLED = {
    "numpy": "SciPy-bundle",
    "scipy": "SciPy-bundle",
    "pandas": "SciPy-bundle",
    "jinja2": "Python-bundle-PyPI",
    "pyarrow": "Arrow",
}
SPACK = ROOT / "containers" / "spack" / "packages" / "py_cryoiso" / "package.py"
(EASYBUILD,) = (ROOT / "containers" / "easybuild").glob("*.eb")


def test_the_conda_recipe_asks_for_what_the_project_asks_for():
    yaml = pytest.importorskip("yaml", reason="PyYAML reads the conda recipe (it comes with the documentation's tools)")
    recipe = yaml.safe_load((ROOT / "containers" / "conda" / "recipe.yaml").read_text())
    assert recipe["context"]["version"] == __version__ and recipe["package"]["name"] == PROJECT["name"]
    wanted = {f"{CONDA_NAMES.get(name, name)} {ranges(limits)}" for name, limits in NEEDED.items()}
    python = f"python {ranges(Requirement('python' + PROJECT['requires-python']).specifier)}"
    assert set(recipe["requirements"]["run"]) == wanted | {python}
    assert {python, "setuptools >=68"} <= set(recipe["requirements"]["host"])
    assert [f"{name} = {where}" for name, where in PROJECT["scripts"].items()] == recipe["build"]["python"][
        "entry_points"
    ]
    assert (ROOT / recipe["about"]["license_file"]).exists() and recipe["about"]["summary"] == PROJECT["description"]


def ranges(limits) -> str:
    """As conda writes them, the lower limit first."""
    return ",".join(sorted(map(str, limits), key=lambda text: text.startswith("<")))


def test_the_spack_package_asks_for_what_the_project_asks_for():
    (package,) = (node for node in ast.parse(SPACK.read_text()).body if isinstance(node, ast.ClassDef))
    calls = [node.value for node in package.body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
    said = [(call.func.id, ast.literal_eval(call.args[0])) for call in calls]  # type: ignore[attr-defined]
    assert [text for what, text in said if what == "version"] == [__version__]
    needs = {f"py-{name}@{spack_range(limits)}" for name, limits in NEEDED.items()}
    python = f"python@{spack_range(Requirement('python' + PROJECT['requires-python']).specifier)}"
    assert {text for what, text in said if what == "depends_on"} == needs | {python, "py-setuptools@68:"}


def spack_range(limits) -> str:
    """Both ends belong to a range of Spack: below 2.14 is up to any 2.13."""
    low = next(limit.version for limit in limits if limit.operator == ">=")
    high = next((Version(limit.version) for limit in limits if limit.operator == "<"), None)
    return f"{low}:" + ("" if high is None else f"{high.major}.{high.minor - 1}")


def test_the_easyconfig_has_versions_that_the_project_takes():
    settings: dict[str, object] = {}
    for node in ast.parse(EASYBUILD.read_text()).body:
        assert isinstance(node, ast.Assign)
        code = compile(ast.Expression(node.value), EASYBUILD.name, "eval")
        settings[node.targets[0].id] = eval(code, {"__builtins__": {}}, settings)  # type: ignore[attr-defined]
    toolchain = settings["toolchain"]
    assert EASYBUILD.name == f"cryoiso-{__version__}-{toolchain['name']}-{toolchain['version']}.eb"  # type: ignore[index]
    listed = {name: version for name, version, *_ in [*settings["dependencies"], *settings["exts_list"]]}  # type: ignore[misc]
    assert (
        listed["cryoiso"] == __version__ and listed["Python"] in Requirement("p" + PROJECT["requires-python"]).specifier
    )
    for name, limits in NEEDED.items():
        if name in BUNDLED:
            assert BUNDLED[name] in listed
        else:
            assert listed[EASYBUILD_NAMES.get(name, name)] in limits, name


def test_sdist_and_wheel_hold_everything_and_the_wheel_works_alone(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "cryoiso", source / "cryoiso", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build(source, "sdist", tmp_path)
    checked = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.4 and later
    shutil.unpack_archive(tmp_path / f"cryoiso-{__version__}.tar.gz", tmp_path, **checked)
    build(tmp_path / f"cryoiso-{__version__}", "wheel", tmp_path)  # from the sdist, as pip would
    (wheel,) = tmp_path.glob("*.whl")

    with zipfile.ZipFile(wheel) as archive:
        info = f"cryoiso-{__version__}.dist-info"
        names, metadata = set(archive.namelist()), Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        points = archive.read(f"{info}/entry_points.txt").decode()
    files = {str(path.relative_to(source)) for path in (source / "cryoiso").rglob("*") if path.is_file()}
    assert files - names == set(), "files that an installation would lack"
    assert metadata["Version"] == __version__ and metadata["Requires-Python"] and metadata["Summary"]
    asked = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    assert {one.name: one.specifier for one in asked if one.marker is None} == NEEDED
    assert set(metadata.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])
    for group in ("console_scripts", "ccpem_pipeliner.jobs"):
        assert f"[{group}]" in points

    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True, env=clean())
    inside = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    (inside / "libraries.pth").write_text(
        sysconfig.get_path("purelib")
    )  # of this environment; cryoiso comes from the wheel
    program = tmp_path / "venv" / "bin" / "cryoiso"
    done = subprocess.run([str(program), "--version"], capture_output=True, text=True, cwd=tmp_path, env=clean())
    assert done.stdout == f"cryoiso {__version__}\n", done.stderr
    where = "import cryoiso, cryoiso.pipeline.run; print(cryoiso.__file__)"
    done = subprocess.run([str(python), "-c", where], capture_output=True, text=True, cwd=tmp_path, env=clean())
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "venv"), done.stderr


def build(source: Path, kind: str, into: Path) -> None:
    """What ``python -m build --no-isolation`` calls."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(into)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True, env=clean())


def clean() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def test_the_release_page_names_the_recipes():
    page = (ROOT / "docs" / "developers" / "testing.md").read_text()
    assert re.search(r"containers/easybuild.*containers/conda.*containers/spack", page, re.DOTALL)
