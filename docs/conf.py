"""Configuration of the site: sphinx-build -W -b html docs docs/_build. Each build generates two pages from the code."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from cryoiso import __version__  # noqa: E402

project = "cryoiso"
author = "The cryoiso developers"
copyright = author
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"cryoiso {release}"
html_copy_source = False
myst_heading_anchors = 3
myst_enable_extensions = ["smartquotes"]


def commands() -> str:
    """Every command with its help."""
    import click
    import typer.main

    from cryoiso.cli.main import build_app

    def walk(command: click.Command, name: str) -> list[str]:
        inner = getattr(command, "commands", {})
        context = click.Context(command, info_name=name, max_content_width=110, terminal_width=110)
        text = [] if inner else [f"## {name}", "", "```text", command.get_help(context), "```", ""]
        return text + [line for key, one in inner.items() for line in walk(one, f"{name} {key}")]

    head = ["# Commands", "", "Help texts of all commands, as printed by `cryoiso COMMAND --help`.", ""]
    return "\n".join(head + walk(typer.main.get_command(build_app()), "cryoiso"))


def job_file() -> str:
    """Every key of the job file with its default."""
    from cryoiso.core.config import job_to_toml, parse_job

    job = parse_job({"particles": {"file": "particles.star"}, "reference": {"file": "reference.mrc"}})
    head = "# The job file\n\nEvery key with its default, as written by `cryoiso init` and in `resolved.toml`."
    return f"{head} Only the two files have no default.\n\n```toml\n{job_to_toml(job)}```\n"


def write_pages(app: object) -> None:
    """The generated pages; left alone where nothing changed, so that a rebuild is quick."""
    for name, text in (("commands.md", commands()), ("job-file.md", job_file())):
        path = HERE / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def setup(app: object) -> None:
    app.connect("builder-inited", write_pages)  # type: ignore[attr-defined]
