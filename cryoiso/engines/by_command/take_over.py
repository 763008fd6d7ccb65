"""What the user's program left behind: checked as a whole before anything of it is used."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cryoiso.core.config import CommandSection
from cryoiso.core.errors import CryoisoError, InputError
from cryoiso.core.protocols import RefineRequest
from cryoiso.core.types import HALVES, Particles
from cryoiso.engines.by_command.template import out_half
from cryoiso.engines.relion.images import rows_of_names
from cryoiso.io.cistem import Parameters, is_cistem, read_cistem, read_par
from cryoiso.io.cs import joined_fields, particles_of_fields
from cryoiso.io.cs_write import image_names
from cryoiso.io.mrc import read_map
from cryoiso.io.restore import in_our_frame
from cryoiso.io.star.columns import Columns
from cryoiso.io.star.read import particles_of_blocks
from cryoiso.io.star.text import read_blocks
from cryoiso.refine.offsets import check_poses

NUMBERS = ("rlnLogLikeliContribution", "rlnMaxValueProbDistribution", "rlnNormCorrection")
PIXEL_TOLERANCE = 0.01


@dataclass(frozen=True)
class Poses:
    """Of the particles that the program was given, in their order."""

    rotation: np.ndarray
    shift_A: np.ndarray
    columns: dict[str, np.ndarray]


def returned_poses(file: Path, originals: Particles, names: list[str], symmetry: str = "C1") -> Poses:
    """Poses out of the program's file, by uid, else by image, or by the place in the stack.

    Args:
        originals: the particles that it was given. names: of their images.
        symmetry: point group, in whose frame of cryoSPARC the poses of a .cs file are.

    Raises:
        CryoisoError: the file is missing or cannot be used, or lacks particles.
    """
    if not file.is_file():
        raise CryoisoError(f"the command ended well but wrote no {file.name} (command.out_particles): {file}",
                           code="command-result-invalid")  # fmt: skip
    try:
        if file.suffix == ".par":
            return _by_position(read_par(file), originals, file)
        if file.suffix == ".cs":
            return _of_cs(file, originals, names, symmetry)
        blocks = read_blocks(file)
        if is_cistem(blocks):
            return _by_position(read_cistem(file, blocks), originals, file)
        returned = particles_of_blocks(blocks, file, "", ("pose",))
    except InputError as error:
        raise CryoisoError(f"the command's poses cannot be used: {error}", code="command-result-invalid") from None
    table = Columns(returned.table, file)
    rows = _rows_of_uids(returned.uid, originals.uid) if table.has("cryoisoUid") else None
    if rows is None:
        rows = rows_of_names(table.text("rlnImageName") if table.has("rlnImageName") else [], names, file)
    _require_same_halves(returned.half, rows, originals, file)
    rotation, shift_A = returned.require_poses(file)
    columns = {name: table.number(name)[rows] for name in NUMBERS if table.has(name)}
    return Poses(rotation[rows], shift_A[rows], columns)


def _of_cs(file: Path, originals: Particles, names: list[str], symmetry: str) -> Poses:
    """Poses of a .cs file, by uid, else by image: cryoSPARC puts a number before the names of stacks it imports."""
    returned = in_our_frame(particles_of_fields(joined_fields(file, ("image", "pose")), file, "", ()), symmetry)
    rows = _rows_of_uids(returned.uid, originals.uid)
    if rows is None:
        images = [f"{i + 1}@{_plain(stack)}" for stack, i in zip(*image_names(returned, file), strict=True)]
        rows = rows_of_names(images, [f"{int(n.partition('@')[0])}@{_plain(n)}" for n in names], file)
    _require_same_halves(returned.half, rows, originals, file)
    rotation, shift_A = returned.require_poses(file)
    return Poses(rotation[rows], shift_A[rows], {})


def _plain(name: str) -> str:
    """File name of a stack without folders and cryoSPARC's number.

    >>> _plain("J1/imported/000090334788266266069_particles-001.mrcs")
    'particles-001.mrcs'
    """
    return re.sub(r"^\d{15,}_", "", name.rpartition("/")[2])


def _require_same_halves(half: np.ndarray | None, rows: np.ndarray, originals: Particles, file: Path) -> None:
    if half is not None and half.any() and (half[rows] != originals.half).any():
        raise CryoisoError(f"{file}: the half-sets were changed", code="command-result-invalid")


def _rows_of_uids(uids: np.ndarray, wanted: np.ndarray) -> np.ndarray | None:
    """(n,) row of each particle; None where the numbers or uids are others."""
    order = np.argsort(uids, kind="stable")
    place = np.minimum(np.searchsorted(uids[order], wanted), len(uids) - 1)
    rows: np.ndarray = order[place]
    return rows if len(uids) == len(wanted) and (uids[rows] == wanted).all() else None


def _by_position(returned: Parameters, originals: Particles, file: Path) -> Poses:
    order = np.argsort(returned.position, kind="stable")
    if not np.array_equal(returned.position[order], np.arange(len(originals))):
        raise CryoisoError(
            f"{file}: not each particle exactly once ({len(originals):,} were given, "
            f"{len(returned.position):,} came back)",
            code="relion-particles-lost",
        )
    columns = {} if returned.score is None else {"cisTEMScore": returned.score[order]}
    return Poses(returned.rotation[order], returned.shift_A[order], columns)


def require_possible(particles: Particles, box_px: int, file: object) -> None:
    """
    Raises:
        CryoisoError: a pose or offset that cannot be.
    """
    try:
        check_poses(particles, box_px, file)
    except InputError as error:
        raise CryoisoError(f"the command's poses cannot be used: {error}", code="command-result-invalid") from None


def returned_maps(folders: dict[int, Path], section: CommandSection, request: RefineRequest) -> dict[int, np.ndarray]:
    """Half -> (D, D, D) map that the program wrote.

    Args:
        folders: half -> where it ran.

    Raises:
        CryoisoError: a map is missing, on another grid or not finite, or both are one map.
    """
    maps = {half: _map(folders[half] / out_half(section, half), request) for half in HALVES}
    if np.array_equal(maps[1], maps[2]):
        raise CryoisoError("the command's two half-maps are one map", code="half-maps-identical")
    return maps


def _map(file: Path, request: RefineRequest) -> np.ndarray:
    if not file.is_file():
        raise CryoisoError(
            f"the command ended well but wrote no {file.name}: {file}. command.out_half names its half-maps; empty: "
            "they are reconstructed from its poses",
            code="command-result-invalid",
        )
    box, pixel = request.source.box_px, request.reference.pixel_size_A
    try:
        returned = read_map(file)
    except InputError as error:
        raise CryoisoError(f"the command's map cannot be used: {error}", code="command-result-invalid") from None
    if returned.box_px != box or abs(returned.pixel_size_A / pixel - 1) > PIXEL_TOLERANCE:
        raise CryoisoError(
            f"{file}: the command's map has another grid (expected {box} px of {pixel:g} Å, "
            f"found {returned.box_px} px of {returned.pixel_size_A:g} Å)",
            code="command-result-invalid",
        )
    if not np.isfinite(returned.data).all() or not np.any(returned.data):
        raise CryoisoError(f"{file}: the command's map is empty or not finite", code="command-result-invalid")
    return np.asarray(returned.data, np.float32)
