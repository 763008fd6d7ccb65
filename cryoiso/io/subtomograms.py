"""Particle files of subtomograms: small volumes, one a file, with a volume of their CTF and missing wedge.

They are RELION's, from its tomography pipeline (``rlnImageName`` x.mrc, ``rlnCtfImage`` y.mrc); how they are told from
images is in ``dimensionality``. This program does not
look into them; it hands them to RELION, with every column as it is, and takes poses back.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.types import Particles
from cryoiso.io.alignment import ANGLES, OFFSETS_Z, is_body_table, outdated
from cryoiso.io.dimensionality import CTF_VOLUME, DIMENSIONS
from cryoiso.io.mrc import read_header
from cryoiso.io.stack import NO_STACK
from cryoiso.io.star.read import read_particles, resolve_paths
from cryoiso.io.star.text import StarBlock, block_of_frame, write_blocks


class SubtomogramSource:
    """Subtomograms as an ``ImageSource`` for engines whose program reads them itself."""

    dimensions = 3

    def __init__(self, path: object, project: str = "") -> None:
        """
        Args:
            path: STAR file.
            project: folder that relative paths start from (empty: found as RELION does).

        Raises:
            InputError: a volume is missing or no cube, or boxes differ.
        """
        self.file = path
        self.particles = read_particles(path, project, ("image",))
        table = self.particles.table
        self.has_ctf = CTF_VOLUME in table
        self.volumes = [os.path.abspath(name) for name in self.particles.stack.tolist()]
        self.ctf_volumes = (
            [os.path.abspath(name) for name in resolve_paths([str(v) for v in table[CTF_VOLUME]], path, project)]
            if self.has_ctf
            else []
        )
        self.box_px = self._check()
        groups = tuple(replace(group, box_px=self.box_px) for group in self.particles.groups)
        self.particles = replace(self.particles, groups=groups)

    def _check(self) -> int:
        """All files are there, and the first volume of each optics group is a cube of one size."""
        for names in (self.volumes, self.ctf_volumes):
            for row, name in enumerate(names):
                if not os.path.isfile(name):
                    raise InputError(
                        f"no such file: {name}", file=self.file, row=row + 1,
                        hint=NO_STACK,
                        code="file-not-found",
                    )  # fmt: skip
        table = self.particles.optics_table
        flat = [] if table is None or DIMENSIONS not in table else [d for d in table[DIMENSIONS].tolist() if d != "3"]
        if flat and len(flat) < len(table):
            raise InputError(
                f"some optics groups are of volumes and some of images ({DIMENSIONS})", file=self.file, expected="3",
                found=flat[0], hint="Refine them separately.", code="subtomograms-inconsistent",
            )  # fmt: skip
        _, firsts = np.unique(self.particles.optics, return_index=True)
        shapes = {read_header(self.volumes[row]).shape for row in firsts.tolist()}
        box = next(iter(shapes))[0]
        if shapes != {(box, box, box)}:
            raise InputError(
                "subtomograms must be cubes of one size", file=self.file, expected="D x D x D voxels",
                found=sorted(shapes), code="subtomograms-inconsistent",
            )  # fmt: skip
        return int(box)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Not for subtomograms.

        Raises:
            InputError: always.
        """
        raise InputError(
            "these particles are subtomograms, which only RELION refines", file=self.file,
            hint="Use --engine relion.", code="subtomograms-unsupported",
        )  # fmt: skip

    def write(self, path: Path, particles: Particles, *, with_poses: bool) -> None:
        """The particle file that RELION starts from: absolute paths, half-sets, all other columns as they are, but for
        those that describe an earlier alignment (``io.alignment``): RELION would take them for its own. Angles stay for
        a search that starts from them; offsets stay, and are the centre of the prior on shifts."""
        columns = block_of_frame("particles", particles.table).columns
        columns["rlnImageName"] = list(self.volumes)
        if self.has_ctf:
            columns[CTF_VOLUME] = list(self.ctf_volumes)
        if particles.half is not None:
            columns["rlnRandomSubset"] = [str(half) for half in particles.half.tolist()]
        gone = set(outdated(columns)) - set(OFFSETS_Z) | (set() if with_poses else set(ANGLES))
        columns = {name: values for name, values in columns.items() if name not in gone}
        for axis in "XYZ":
            if f"rlnOrigin{axis}Angst" in columns:
                columns[f"rlnOrigin{axis}PriorAngst"] = list(columns[f"rlnOrigin{axis}Angst"])
        others = [StarBlock(*b) for b in particles.table.attrs.get("star_others", []) if not is_body_table(b[0])]
        if particles.optics_table is not None:
            optics = block_of_frame("optics", particles.optics_table)
            optics.columns[DIMENSIONS] = ["3"] * len(optics)
            others.append(optics)
        write_blocks(path, [*others, StarBlock("particles", True, columns)])
