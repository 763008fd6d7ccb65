"""The folder that the names of images in a particle file start from, where the file has left it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from cryoiso.core import products
from cryoiso.core.errors import InputError
from cryoiso.io.regular_file import read_regular_text

logger = logging.getLogger("cryoiso")

INGESTED = ("shards", "../*_ingest")
"""Where a particle file that this program wrote has its shards beside it: of a command, of a run."""
KEY = "project"
"""In the index of the shards."""


def project_of(name: str, path: str) -> str:
    """Absolute folder that a name of a stack was found from, or "" where the name is absolute or leads elsewhere.

    >>> project_of("Extract/a.mrcs", "/data/Extract/a.mrcs"), project_of("/data/a.mrcs", "/data/a.mrcs")
    ('/data', '')
    """
    end = os.sep + os.path.normpath(name)
    path = os.path.abspath(path)
    return "" if os.path.isabs(name) or not path.endswith(end) else path[: -len(end)] or os.sep


def recorded(own: Path) -> Iterator[Path]:
    """Project folders of the shards that belong to a particle file in the folder ``own``."""
    for pattern in INGESTED:
        base, pattern = (own.parent, pattern[3:]) if pattern.startswith("../") else (own, pattern)
        for index in sorted(base.glob(f"{pattern}/{products.INDEX}")):
            try:
                project = json.loads(read_regular_text(index)).get(KEY)
            except (OSError, ValueError, AttributeError, RecursionError, InputError):
                continue  # whoever needs the shards says what is wrong
            if isinstance(project, str) and os.path.isabs(project):
                yield Path(project)


def find_recorded(name: str, own: Path, file: object) -> str:
    """The file of this name in the project folder that the shards beside a particle file record, or empty."""
    for project in recorded(own):
        if (project / name).exists():
            logger.info("%s: its images are found from %s, where its shards were made", file, project)
            return str(project / name)
    return ""


def tell_where_names_start(file: object, name: str, path: str) -> None:
    """Says which --project a particle file needs that is written outside of its project, so that it is known later.

    Args:
        file: the particle file.
        name: of its first image's stack, as written.
        path: where that stack is.
    """
    own = Path(os.path.abspath(str(file))).parent
    project = project_of(name, path)
    if not project or not os.path.exists(path):
        return
    if own == Path(project) or Path(project) in own.parents or Path(project) in recorded(own):
        return
    logger.info("%s: names of images start from %s; where it is read elsewhere, give --project %s",
                file, project, project)  # fmt: skip
