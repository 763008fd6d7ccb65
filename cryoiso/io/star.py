"""RELION STAR files of particles: 3.0 (everything in each row) and 3.1, 4, 5 (optics groups), into ``Particles``.

Reading keeps every row in its place and every column as text (``Particles.table``, ``optics_table``); only the columns that are
used become numbers. Writing is in ``starwrite``.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.rng import stable_hash
from cryoiso.core.types import OpticsGroup, Particles
from cryoiso.io import conventions
from cryoiso.io.startext import StarBlock, read_blocks
from cryoiso.io.starwrite import write_particles

__all__ = ["Columns", "parse_image_names", "particles_from_table", "read_particles", "resolve_paths", "write_particles"]

logger = logging.getLogger("cryoiso")

DEFAULT_AMPLITUDE_CONTRAST = 0.1


class Columns:
    """Numbers out of a table of text, with errors that name file, row and column."""

    def __init__(self, frame: Any, file: object) -> None:
        self.frame, self.file = frame, file

    def __len__(self) -> int:
        return len(self.frame)

    def has(self, *names: str) -> bool:
        return all(name in self.frame.columns for name in names)

    def text(self, name: str) -> list[str]:
        """The column as text.

        Raises:
            InputError: there is no such column.
        """
        if name not in self.frame.columns:
            raise InputError("a column is missing", file=self.file, expected=f"_{name}")
        return [str(v) for v in self.frame[name].tolist()]

    def number(self, name: str, default: float | None = None, finite: bool = True) -> np.ndarray:
        """The column as (n,) float64; ``default`` where the file has no such column (None: an error).

        Raises:
            InputError: missing column, or a value that is no (finite) number.
        """
        if name not in self.frame.columns and default is not None:
            return np.full(len(self.frame), float(default))
        text = self.text(name)
        try:
            values = np.array(text, dtype=str).astype(np.float64) if text else np.zeros(0)
        except ValueError:
            values = np.array([_float_or_none(v) for v in text], np.float64)  # None becomes NaN
        if finite and not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values))[0])
            raise InputError(f"bad value in column _{name}", file=self.file, row=row + 1, expected="a number", found=text[row])
        return values


def _float_or_none(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def read_particles(path: object, project: str = "", require: tuple[str, ...] = ("image", "ctf")) -> Particles:
    """Particles of a STAR file, in the order of its rows.

    Args:
        path: RELION 3.0, 3.1, 4 or 5 STAR file.
        project: folder that relative image paths start from; empty: the current folder (as RELION does), and where
            an image is not there, the STAR file's own folder and the folders above it; the first hit counts.
        require: what must be in the file: any of "image", "ctf", "pose". What is not required may be missing and is then
            empty text, NaN or None.

    Returns:
        Particles; poses are None if any of the three angles is not in the file.

    Raises:
        InputError: no such file, missing column, bad number (with its row), unknown optics group, the same image twice.
    """
    blocks = read_blocks(path)
    block = _particle_block(blocks, path)
    optics = next((b for b in blocks if b.name == "optics" and b is not block), None)
    others = [b for b in blocks if b is not block and b is not optics]
    table = block.frame()
    table.attrs["star_block"] = block.name
    table.attrs["star_others"] = [(b.name, b.loop, b.columns) for b in others]
    return particles_from_table(table, optics.frame() if optics else None, path, project, require)


def _particle_block(blocks: list[StarBlock], path: object) -> StarBlock:
    loops = [b for b in blocks if b.loop and b.name != "optics"]
    for wanted in (
        [b for b in loops if b.name == "particles"],
        [b for b in loops if "rlnImageName" in b.columns],
        [b for b in loops if "rlnAngleRot" in b.columns],
    ):
        if wanted:
            return wanted[0]
    found = ", ".join(f"data_{b.name}" for b in blocks[:5])
    raise InputError("no table of particles", file=path, expected="a loop with _rlnImageName", found=found)


def particles_from_table(
    table: Any, optics_table: Any, path: object, project: str = "", require: tuple[str, ...] = ("image", "ctf")
) -> Particles:
    """Particles of tables of text as a STAR file has them; arguments and errors as ``read_particles``."""
    columns = Columns(table, path)
    n = len(columns)
    if n == 0:
        raise InputError("the table of particles is empty", file=path)
    for what, names in (
        ("image", ("rlnImageName",)),
        ("ctf", ("rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle")),
        ("pose", ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")),
    ):
        missing = [name for name in names if what in require and not columns.has(name)]
        if missing:
            raise InputError("a column is missing", file=path, expected=f"_{missing[0]}", hint=_HINTS[what])
    stack, index = _images(columns, path, project)
    if optics_table is not None:
        groups, optics = _optics_of_table(columns, Columns(optics_table, path), "ctf" in require)
    else:
        groups, optics = _optics_of_rows(columns, "ctf" in require)
    groups = _with_boxes(groups, optics, stack)
    nan = float("nan")
    pixel = np.array([g.pixel_size_A for g in groups])[optics]
    return Particles(
        uid=_uids(columns, path, "image" in require),
        optics=optics.astype(np.int32),
        groups=tuple(groups),
        stack=stack,
        index=index,
        defocus_u_A=columns.number("rlnDefocusU", nan),
        defocus_v_A=columns.number("rlnDefocusV", nan),
        defocus_angle_deg=columns.number("rlnDefocusAngle", nan),
        phase_shift_deg=columns.number("rlnPhaseShift", 0.0),
        ctf_bfactor_A2=columns.number("rlnCtfBfactor", 0.0),
        ctf_scale=columns.number("rlnCtfScalefactor", 1.0),
        rotation=rotation_of_table(columns),
        shift_A=shift_of_table(columns, pixel),
        half=half_of_table(columns),
        table=table,
        optics_table=optics_table,
    )


_HINTS = {
    "image": "Give the particle STAR file of an extraction or refinement, not that of micrographs.",
    "ctf": "Estimate the CTF first; every particle needs its defocus.",
    "pose": "Give the output of a refinement.",
}


def rotation_of_table(columns: Columns) -> np.ndarray | None:
    """(n, 3, 3) rotations of rlnAngleRot, Tilt, Psi (and of rlnTomoSubtomogram* where there), or None without them."""
    if not columns.has("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"):
        return None
    angles = [columns.number(f"rlnAngle{a}") for a in ("Rot", "Tilt", "Psi")]
    rotation = conventions.euler_to_matrix(*angles)
    outer = subtomogram_rotation(columns)
    return rotation if outer is None else conventions.join_two_level(outer, rotation)


def subtomogram_rotation(columns: Columns) -> np.ndarray | None:
    """(n, 3, 3) rotations of rlnTomoSubtomogramRot, Tilt, Psi, or None without them."""
    names = [f"rlnTomoSubtomogram{a}" for a in ("Rot", "Tilt", "Psi")]
    if not columns.has(*names):
        return None
    return conventions.euler_to_matrix(*(columns.number(name) for name in names))


def shift_of_table(columns: Columns, pixel_size_A: np.ndarray) -> np.ndarray | None:
    """(n, 2) origins in Å: rlnOriginXAngst, YAngst, else rlnOriginX, Y in pixels; zero with angles alone, None without."""
    if columns.has("rlnOriginXAngst", "rlnOriginYAngst"):
        return np.stack([columns.number("rlnOriginXAngst"), columns.number("rlnOriginYAngst")], 1)
    if columns.has("rlnOriginX", "rlnOriginY"):
        pixels = np.stack([columns.number("rlnOriginX"), columns.number("rlnOriginY")], 1)
        return pixels * pixel_size_A[:, None]
    return np.zeros((len(columns), 2)) if columns.has("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi") else None


def half_of_table(columns: Columns) -> np.ndarray | None:
    """(n,) int8 of rlnRandomSubset: 1, 2, or 0 for anything else; None without the column."""
    if not columns.has("rlnRandomSubset"):
        return None
    values = columns.number("rlnRandomSubset")
    return np.where(np.isin(values, (1, 2)), values, 0).astype(np.int8)


def parse_image_names(names: list[str], path: object) -> tuple[list[str], np.ndarray]:
    """Stack name and 0-based index of ``000012@stack.mrcs``; a name without @ is its first image.

    Raises:
        InputError: what stands before @ is no number from 1.
    """
    parts = [name.rsplit("@", 1) if "@" in name else ("1", name) for name in names]
    try:
        index = np.array([int(p[0]) for p in parts], np.int64) - 1
    except ValueError:
        index = np.array([int(p[0]) if p[0].isdigit() else 0 for p in parts], np.int64) - 1
    if (index < 0).any():
        row = int(np.flatnonzero(index < 0)[0])
        raise InputError("bad image name", file=path, row=row + 1, expected="NUMBER@STACK, NUMBER from 1", found=names[row])
    return [p[1] for p in parts], index


def resolve_paths(names: list[str], file: object, project: str = "") -> np.ndarray:
    """Where image files lie: (n,) str. Each different name is looked up once.

    Relative names start from ``project`` (else the current folder); if there is no such file, from the folder of ``file`` and
    then the folders above it. A name that is found nowhere stays as it would be in the project folder.
    """
    base = Path(project) if project else Path()
    own = Path(os.path.abspath(str(file))).parent
    found = {name: _resolve(name, base, own) for name in set(names)}
    return np.array([found[name] for name in names], dtype=str)


def _resolve(name: str, base: Path, own: Path) -> str:
    first = base / name
    if os.path.isabs(name) or first.exists():
        return str(first)
    return next((str(folder / name) for folder in (own, *own.parents) if (folder / name).exists()), str(first))


def _images(columns: Columns, path: object, project: str) -> tuple[np.ndarray, np.ndarray]:
    if not columns.has("rlnImageName"):
        return np.full(len(columns), "", dtype=str), np.full(len(columns), -1, np.int64)
    names, index = parse_image_names(columns.text("rlnImageName"), path)
    return resolve_paths(names, path, project), index


def _uids(columns: Columns, path: object, unique: bool) -> np.ndarray:
    """cryoisoUid where there, else the hash of the image's name, else (no images) of the row number."""
    names = [f"row {i}" for i in range(len(columns))]
    if columns.has("rlnImageName"):
        stacks, index = parse_image_names(columns.text("rlnImageName"), path)
        names = [f"{i + 1}@{s}" for s, i in zip(stacks, index.tolist())]
        if unique:
            _no_duplicates(names, "the same image stands in two rows", path, columns.text("rlnImageName"))
        elif len(set(names)) < len(names):
            names = _numbered_repeats(names)
    if columns.has("cryoisoUid"):
        text = columns.text("cryoisoUid")
        for row, value in enumerate(text):
            if not value.isdigit() or int(value) >= 2**64:
                raise InputError("bad cryoisoUid", file=path, row=row + 1, expected="an integer below 2^64", found=value)
        uid = np.array([int(v) for v in text], np.uint64)
    else:
        uid = np.array([stable_hash(name) for name in names], np.uint64)
    _no_duplicates(uid.tolist(), "two particles have the same identity (cryoisoUid)", path, uid.tolist())
    return uid


def _numbered_repeats(names: list[str]) -> list[str]:
    """The second and later copies of a name get a number, so that symmetry-expanded rows keep apart."""
    seen: dict[str, int] = {}
    out = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        out.append(name if seen[name] == 1 else f"{name} copy {seen[name]}")
    return out


def _no_duplicates(keys: list, problem: str, path: object, shown: list) -> None:
    if len(set(keys)) == len(keys):
        return
    first: dict = {}
    for row, key in enumerate(keys):
        if key in first:
            raise InputError(
                f"{problem}: {first[key] + 1} and {row + 1}",
                file=path,
                row=row + 1,
                found=shown[row],
                hint="Remove the duplicates (and symmetry-expanded copies) first.",
            )
        first[key] = row


def _with_boxes(groups: list[OpticsGroup], optics: np.ndarray, stack: np.ndarray) -> list[OpticsGroup]:
    """Fills in image sizes that the STAR file does not say, from the header of each group's first stack if it is there."""
    from dataclasses import replace

    from cryoiso.io.mrc import read_header

    out = []
    for number, group in enumerate(groups):
        rows = np.flatnonzero(optics == number) if group.box_px <= 0 else []
        if len(rows) and stack[rows[0]] and os.path.isfile(stack[rows[0]]):
            group = replace(group, box_px=read_header(stack[rows[0]]).shape[2])
        out.append(group)
    return out


def _zernike(text: str, name: str, file: object, row: int) -> tuple[float, ...]:
    inner = text.strip().strip("[]").strip()
    try:
        return tuple(float(v) for v in inner.split(",")) if inner else ()
    except ValueError:
        raise InputError(f"bad value in column _{name}", file=file, row=row, expected="[a,b,...]", found=text) from None


def _optics_of_table(columns: Columns, table: Columns, strict: bool) -> tuple[list[OpticsGroup], np.ndarray]:
    """Optics groups of an optics table and each particle's index into them; rows stay where they are."""
    numbers = table.number("rlnOpticsGroup").astype(np.int64)
    if len(numbers) == 0:
        raise InputError("the table of optics groups is empty", file=columns.file)
    if len(set(numbers.tolist())) != len(numbers):
        raise InputError("an optics group is defined twice", file=columns.file, found=sorted(numbers.tolist()))
    names = table.text("rlnOpticsGroupName") if table.has("rlnOpticsGroupName") else [f"opticsGroup{i}" for i in numbers]
    groups = _groups(table, strict, numbers, names)
    if not columns.has("rlnOpticsGroup") and len(numbers) == 1:
        return groups, np.zeros(len(columns), np.int64)
    wanted = columns.number("rlnOpticsGroup").astype(np.int64)
    order = np.argsort(numbers)
    place = np.minimum(np.searchsorted(numbers[order], wanted), len(numbers) - 1)
    optics = order[place]
    bad = np.flatnonzero(numbers[optics] != wanted)
    if len(bad):
        raise InputError(
            "unknown optics group",
            file=columns.file,
            row=int(bad[0]) + 1,
            expected=f"one of {sorted(numbers.tolist())}",
            found=int(wanted[bad[0]]),
        )
    return groups, optics


_PER_GROUP = (
    "rlnVoltage",
    "rlnSphericalAberration",
    "rlnAmplitudeContrast",
    "rlnImagePixelSize",
    "rlnMagnification",
    "rlnDetectorPixelSize",
    "rlnBeamTiltX",
    "rlnBeamTiltY",
    "rlnMagMat00",
    "rlnMagMat01",
    "rlnMagMat10",
    "rlnMagMat11",
    "rlnOpticsGroup",
)


def _optics_of_rows(columns: Columns, strict: bool) -> tuple[list[OpticsGroup], np.ndarray]:
    """Optics groups of a RELION 3.0 file: one for each different set of microscope values, in order of appearance."""
    names = [name for name in _PER_GROUP if columns.has(name)]
    if not names:
        optics = np.zeros(len(columns), np.int64)
        firsts = np.zeros(1, np.int64)
    else:
        values = np.stack([columns.number(name) for name in names], 1)
        _, first, inverse = np.unique(values, axis=0, return_index=True, return_inverse=True)
        rank = np.argsort(np.argsort(first))
        optics, firsts = rank[inverse.reshape(-1)], np.sort(first)
    table = Columns(columns.frame.iloc[firsts].reset_index(drop=True), columns.file)
    numbers = np.arange(1, len(firsts) + 1)
    return _groups(table, strict, numbers, [f"opticsGroup{i}" for i in numbers]), optics


def _groups(table: Columns, strict: bool, numbers: np.ndarray, names: list[str]) -> list[OpticsGroup]:
    default = None if strict else float("nan")
    if not table.has("rlnAmplitudeContrast") and strict:
        logger.warning("%s: no _rlnAmplitudeContrast; %g is used", table.file, DEFAULT_AMPLITUDE_CONTRAST)
    pixel = _pixel_sizes(table, default)
    if strict and not (pixel > 0).all():
        raise InputError("the pixel size must be positive", file=table.file, found=float(pixel.min()))
    columns = {
        "voltage_kV": table.number("rlnVoltage", default),
        "spherical_aberration_mm": table.number("rlnSphericalAberration", default),
        "amplitude_contrast": table.number("rlnAmplitudeContrast", DEFAULT_AMPLITUDE_CONTRAST),
        "box_px": table.number("rlnImageSize", 0).astype(int),
    }
    tilt = np.stack([table.number("rlnBeamTiltX", 0.0), table.number("rlnBeamTiltY", 0.0)], 1)
    unit = {"00": 1.0, "01": 0.0, "10": 0.0, "11": 1.0}
    magnification = np.stack([table.number(f"rlnMagMat{k}", v) for k, v in unit.items()], 1)
    zernike = {
        name: [_zernike(t, name, table.file, i + 1) for i, t in enumerate(table.text(name))] if table.has(name) else None
        for name in ("rlnOddZernike", "rlnEvenZernike")
    }
    groups = []
    for i, number in enumerate(numbers.tolist()):
        odd, even = (z[i] if z is not None else () for z in zernike.values())
        values: dict[str, Any] = {k: v[i].item() for k, v in columns.items()}
        groups.append(
            OpticsGroup(
                number=int(number),
                name=names[i],
                pixel_size_A=float(pixel[i]),
                beam_tilt_mrad=tuple(tilt[i].tolist()),
                magnification=tuple(magnification[i].tolist()),
                odd_zernike=odd,
                even_zernike=even,
                **values,
            )
        )
    return groups


def _pixel_sizes(table: Columns, default: float | None) -> np.ndarray:
    if table.has("rlnImagePixelSize"):
        return table.number("rlnImagePixelSize")
    if table.has("rlnMagnification", "rlnDetectorPixelSize"):
        detector, magnification = table.number("rlnDetectorPixelSize"), table.number("rlnMagnification")
        if not (magnification > 0).all():
            raise InputError("bad value in column _rlnMagnification", file=table.file, expected="a positive number")
        return conventions.detector_pixel_size_A(detector, magnification)
    if default is not None:
        return np.full(len(table), default)
    raise InputError(
        "no pixel size",
        file=table.file,
        expected="_rlnImagePixelSize in the table of optics groups, or _rlnMagnification and _rlnDetectorPixelSize",
    )
