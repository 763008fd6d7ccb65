"""Whether a particle STAR file is of images, of subtomograms as volumes, or of subtomograms as stacks of tilt images.

RELION says it in ``rlnImageDimensionality`` (optics table, 3.1 and later) and, from 5.0 on, in
``rlnTomoSubTomosAre2DStacks`` (``data_general``). Where a file says nothing, its first image does. ``rlnCtfImage`` says
nothing: it is a subtomogram's CTF volume, or the power spectrum of a micrograph beside single-particle images.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from cryoiso.core.errors import InputError
from cryoiso.io.mrc import read_header
from cryoiso.io.regular_file import open_regular
from cryoiso.io.star.read import resolve_paths

Kind = Literal["images", "volumes", "stacks"]
DIMENSIONS, ARE_STACKS, FRAMES = "rlnImageDimensionality", "rlnTomoSubTomosAre2DStacks", "rlnTomoVisibleFrames"
CTF_VOLUME = "rlnCtfImage"
HEAD_BYTES = 2**20


@dataclass
class _Block:
    name: str
    columns: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    """words of the first rows; of a list its values, as one row"""

    def values(self, name: str) -> list[str]:
        place = self.columns.index(name) if name in self.columns else -1
        return [row[place] for row in self.rows if len(row) == len(self.columns)] if place >= 0 else []


def kind_of_particles(path: object, project: str = "") -> Kind:
    """What the images of a particle file are. Looks at the beginning of the file and at its first image.

    Args:
        path: any file; what is no STAR file is of "images".
        project: folder that relative image paths start from (empty: found as RELION does).
    """
    if not (str(path).endswith(".star") and os.path.isfile(str(path))):
        return "images"
    try:
        blocks = list(_head(path))
    except (OSError, InputError):
        return "images"
    optics = next((b for b in blocks if b.name == "optics"), _Block(""))
    particles = next((b for b in blocks if "rlnImageName" in b.columns and b.name != "optics"), _Block(""))
    said = [value for block in blocks for value in block.values(ARE_STACKS)]
    dimensions = {value.split(".")[0] for value in optics.values(DIMENSIONS)}
    if said and said[0] not in ("0", "false"):
        return "stacks"
    if "3" in dimensions:
        return "volumes"
    if FRAMES in particles.columns and not said:
        return "stacks"
    return "volumes" if _first_is_volume(particles, path, project, bool(dimensions)) else "images"


def _first_is_volume(particles: _Block, path: object, project: str, said_flat: bool) -> bool:
    """Whether the first image is a cube in a file of its own; a missing one if it has a CTF and its name says so."""
    name = next(iter(particles.values("rlnImageName")), "")
    if not name or "@" in name:
        return False
    file = str(resolve_paths([name], path, project)[0])
    try:
        depth, height, width = read_header(file).shape
    except InputError:
        return not said_flat and CTF_VOLUME in particles.columns and name.endswith(".mrc")
    return depth == height == width > 1


def _head(path: object) -> Iterator[_Block]:
    """Blocks of the file's beginning, with at most 100 rows each."""
    block: _Block | None = None
    with open_regular(path) as stream:
        text = stream.read(HEAD_BYTES).decode("utf-8", errors="replace")
    for words in filter(None, (line.split() for line in text.splitlines())):
        if words[0].startswith("data_"):
            if block is not None:
                yield block
            block = _Block(words[0].removeprefix("data_"))
        elif block is None or words[0].startswith(("#", "loop_")):
            continue
        elif words[0].startswith("_"):
            block.columns.append(words[0][1:])
            if len(words) > 1 and not words[1].startswith("#"):
                block.rows = [[*(block.rows[0] if block.rows else []), words[1]]]
        elif len(block.rows) < 100:
            block.rows.append(words)
    if block is not None:
        yield block


def require_images(path: object, project: str = "") -> None:
    """
    Raises:
        InputError: the particles are subtomograms.
    """
    kind = kind_of_particles(path, project)
    if kind == "stacks":
        raise InputError(
            "these particles are subtomograms as 2D stacks of tilt images, which are not supported", file=path,
            expected="single-particle images, or subtomograms as volumes", found=f"{ARE_STACKS} or {FRAMES}",
            hint="Extract them in RELION without 'Write output as 2D stacks'; 'cryoiso refine' and 'cryoiso realign' "
            "take volumes with --engine relion.", code="subtomograms-unsupported",
        )  # fmt: skip
    if kind == "volumes":
        raise InputError(
            "these particles are subtomograms, not images", file=path,
            expected=f"{DIMENSIONS} 2, images NUMBER@STACK",
            hint="Only 'cryoiso refine' and 'cryoiso realign' take them, with --engine relion.",
            code="subtomograms-unsupported",
        )  # fmt: skip
