"""Writes ``Particles`` as RELION 3.1 STAR files: optics groups and particles, with every column of the source kept.

A value whose number has not changed keeps the source's text, so reading and writing back loses nothing. Text is made
some thousand rows at a time, while it is written.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cryoiso.core.types import OpticsGroup, Particles
from cryoiso.io import conventions
from cryoiso.io.alignment import ANGLES, POSES, is_body_table, outdated
from cryoiso.io.imagenames import first_stack
from cryoiso.io.project_folder import tell_where_names_start
from cryoiso.io.star.columns import CTF_FLAGS, Columns, rotation_of_table, shift_of_table, subtomogram_rotation
from cryoiso.io.star.text import StarBlock, block_of_frame, write_blocks
from cryoiso.io.star.text_column import MadeColumn, series_column, slabs

Text = dict[str, Sequence[str]]
"""Names of columns and their text."""

MOVED_TO_OPTICS = (
    "rlnVoltage",
    "rlnSphericalAberration",
    "rlnAmplitudeContrast",
    "rlnBeamTiltX",
    "rlnBeamTiltY",
    *CTF_FLAGS,
)


def write_particles(path: object, particles: Particles, names: list[str] | None = None) -> None:
    """Writes particles atomically in RELION 3.1 style (read by RELION 3.1, 4 and 5).

    Columns of the source stay in their order and with their text; pose, half-set, CTF and result columns are
    overwritten where their numbers differ, or appended. Where any pose differs from the source's, columns that
    describe the source's alignment (``io.alignment``) are left out, if they are not among the results. Origins are in
    Å. A RELION 3.0 source gets a table of optics groups; its microscope columns move there and rlnOriginX, Y become
    rlnOriginXAngst, YAngst.

    Args:
        path: the file to write.
        particles: what to write.
        names: (n,) image names ``000001@stack.mrcs`` to write instead of the source's.

    Raises:
        DiskFullError: no space.
        InputError: the folder does not exist.
        ValueError: columns differ in length.
    """
    columns = _source_columns(particles)
    _write_images(columns, particles, names)
    _write_ctf(columns, particles)
    _write_optics_column(columns, particles)
    moved = _write_poses(columns, particles)
    for name in outdated(columns) if moved else ():
        del columns[name]
    if particles.half is not None:
        _merge(columns, "rlnRandomSubset", particles.half.astype(np.int64), "%d")
    for name, factor in (("cryoisoScale", particles.signal_scale), ("cryoisoNoiseLevel", particles.noise_level)):
        if factor is not None and particles.rotation is not None:  # they were estimated at these poses
            _merge(columns, name, np.asarray(factor, np.float64), "%.6f")
    for name, values in particles.results.items():
        columns[name] = _result_text(np.asarray(values))
    columns["cryoisoUid"] = MadeColumn(len(particles), lambda rows: list(map(str, particles.uid[rows].tolist())))
    attrs = getattr(particles.table, "attrs", {})
    others = [StarBlock(*block) for block in attrs.get("star_others", []) if not (moved and is_body_table(block[0]))]
    _require_one_length(columns, len(particles))
    blocks = [*others, _optics_block(particles), StarBlock("particles", True, columns)]
    write_blocks(path, blocks)
    if names is None and len(particles):
        tell_where_names_start(path, first_stack(particles), str(particles.stack[0]))


def _source_columns(particles: Particles) -> Text:
    if particles.table is None:
        return {}
    columns: Text = {str(c): series_column(particles.table[c]) for c in particles.table.columns}
    if particles.optics_table is None:
        for name in MOVED_TO_OPTICS:
            columns.pop(name, None)
    return columns


def _write_images(columns: Text, particles: Particles, names: list[str] | None) -> None:
    if names is not None:
        columns["rlnImageName"] = [str(n) for n in names]
    elif "rlnImageName" not in columns and len(particles) and particles.index[0] >= 0:
        index, stack = particles.index, particles.stack
        columns["rlnImageName"] = MadeColumn(
            len(particles),
            lambda rows: [f"{i + 1:06d}@{s}" for i, s in zip(index[rows].tolist(), stack[rows].tolist())],
        )


def _write_ctf(columns: Text, particles: Particles) -> None:
    for name, values, default in (
        ("rlnDefocusU", particles.defocus_u_A, np.nan),
        ("rlnDefocusV", particles.defocus_v_A, np.nan),
        ("rlnDefocusAngle", particles.defocus_angle_deg, np.nan),
        ("rlnPhaseShift", particles.phase_shift_deg, 0.0),
        ("rlnCtfBfactor", particles.ctf_bfactor_A2, 0.0),
        ("rlnCtfScalefactor", particles.ctf_scale, 1.0),
    ):
        values = np.asarray(values, np.float64)
        if name in columns or not (np.isnan(values).all() if np.isnan(default) else (values == default).all()):
            _merge(columns, name, values, "%.6f")


def _write_optics_column(columns: Text, particles: Particles) -> None:
    numbers = np.array([g.number for g in particles.groups], np.int64)[particles.optics]
    _merge(columns, "rlnOpticsGroup", numbers, "%d")


def _require_one_length(columns: Text, n: int) -> None:
    wrong = {name: len(values) for name, values in columns.items() if len(values) != n}
    if wrong:
        raise ValueError(f"columns of other lengths than {n}: {wrong}")


def _write_poses(columns: Text, particles: Particles) -> bool:
    """Returns whether any pose differs from the source's, or the source has poses that the particles lost."""
    source = None if particles.table is None else Columns(particles.table, None)
    lost = particles.rotation is None and source is not None and source.has(*ANGLES)
    moved = lost
    for name in POSES if lost else ():
        columns.pop(name, None)
    if particles.rotation is not None:
        moved |= _write_angles(columns, source, np.asarray(particles.rotation, np.float64))
    if particles.shift_A is not None:
        moved |= _write_shifts(columns, source, particles)
    return moved


def _write_angles(columns: Text, source: Columns | None, rotation: np.ndarray) -> bool:
    outer = subtomogram_rotation(source) if source else None
    old = rotation_of_table(source) if source else None
    same = np.zeros(len(rotation), bool) if old is None else np.abs(old - rotation).max((1, 2)) < 1e-12
    inner = rotation if outer is None else conventions.split_two_level(outer, rotation)
    for name, values in zip(ANGLES, conventions.matrix_to_euler(inner).T):
        _replace(columns, name, values, same)
    return not same.all()


def _write_shifts(columns: Text, source: Columns | None, particles: Particles) -> bool:
    shift = np.asarray(particles.shift_A, np.float64)
    in_pixels = source is not None and not source.has("rlnOriginXAngst", "rlnOriginYAngst")
    old = None if source is None else shift_of_table(source, particles.group_values("pixel_size_A"))
    same = np.zeros(len(shift), bool) if old is None else (old == shift).all(1)
    keeps_text = same & (not in_pixels)
    for axis, values in zip("XY", shift.T):
        _rename(columns, f"rlnOrigin{axis}", f"rlnOrigin{axis}Angst")
        _replace(columns, f"rlnOrigin{axis}Angst", values, keeps_text)
    return not same.all()


def _rename(columns: Text, old: str, new: str) -> None:
    """Renames a column in its place; if the new name is there already, the old column goes."""
    if old not in columns:
        return
    items = [
        (new if k == old and new not in columns else k, v) for k, v in columns.items() if k != old or new not in columns
    ]
    columns.clear()
    columns.update(items)


def _replace(columns: Text, name: str, values: np.ndarray, same: np.ndarray) -> None:
    if name in columns and same.all():
        return
    columns[name] = _kept_where(same, columns.get(name), values, "%.6f")


def _merge(columns: Text, name: str, values: np.ndarray, form: str) -> None:
    """Overwrites the entries of a column whose number is another one; the rest keeps its text."""
    text = columns.get(name)
    old = None if text is None else _numbers(text)
    if old is None:
        columns[name] = _formatted(values, form)
        return
    same = (old == values) | (np.isnan(old) & np.isnan(np.asarray(values, np.float64)))
    if not same.all():
        columns[name] = _kept_where(same, text, values, form)


def _numbers(text: Sequence[str]) -> np.ndarray | None:
    """(n,) float64 of a column of text; None if any value is no number."""
    numbers = np.empty(len(text), np.float64)
    try:
        for rows in slabs(len(text)):
            numbers[rows] = np.array(text[rows], dtype=str).astype(np.float64)
    except ValueError:
        return None
    return numbers


def _kept_where(same: np.ndarray, old: Sequence[str] | None, values: np.ndarray, form: str) -> Sequence[str]:
    """The old text where ``same``, else the formatted values."""
    formatted = _formatted(values, form)
    if old is None or not same.any():
        return formatted

    def text(rows: slice) -> list[str]:
        return [a if keep else b for a, b, keep in zip(old[rows], formatted[rows], same[rows].tolist())]

    return MadeColumn(len(values), text)


def _formatted(values: np.ndarray, form: str) -> MadeColumn:
    values = np.asarray(values)
    return MadeColumn(len(values), lambda rows: format_column(values[rows], form))


def format_column(values: np.ndarray, form: str) -> list[str]:
    """Text of a column of numbers with one printf format; -0.000000 is written as 0.000000."""
    values = np.asarray(values)
    if form == "%.6f":
        values = np.round(values.astype(np.float64), 6) + 0.0
    return list(map(form.__mod__, values.tolist()))


def _result_text(values: np.ndarray) -> MadeColumn:
    kind = values.dtype.kind
    if kind == "f":
        return _formatted(values, "%.9g")
    as_text = (lambda v: str(int(v))) if kind in "iub" else str
    return MadeColumn(len(values), lambda rows: [as_text(v) for v in values[rows].tolist()])


def _optics_block(particles: Particles) -> StarBlock:
    groups = particles.groups
    if particles.optics_table is not None and len(particles.optics_table) == len(groups):
        columns = block_of_frame("optics", particles.optics_table).columns
    else:
        columns = {}
    fresh = not columns
    scalars: list[tuple[str, list[float], str, float | None]] = [
        ("rlnOpticsGroup", [g.number for g in groups], "%d", None),
        ("rlnVoltage", [g.voltage_kV for g in groups], "%r", np.nan),
        ("rlnSphericalAberration", [g.spherical_aberration_mm for g in groups], "%r", np.nan),
        ("rlnAmplitudeContrast", [g.amplitude_contrast for g in groups], "%r", np.nan if fresh else 0.1),
        ("rlnImagePixelSize", [g.pixel_size_A for g in groups], "%r", np.nan),
        ("rlnImageSize", [g.box_px for g in groups], "%d", 0),
        ("rlnBeamTiltX", [g.beam_tilt_mrad[0] for g in groups], "%r", 0.0),
        ("rlnBeamTiltY", [g.beam_tilt_mrad[1] for g in groups], "%r", 0.0),
        (CTF_FLAGS[0], [g.ctf_premultiplied for g in groups], "%d", 0),
        (CTF_FLAGS[1], [g.phase_flipped for g in groups], "%d", 0),
    ]
    for k, (name, unit) in enumerate((("00", 1.0), ("01", 0.0), ("10", 0.0), ("11", 1.0))):
        scalars.append((f"rlnMagMat{name}", [g.magnification[k] for g in groups], "%r", unit))
    for name, values, form, default in scalars:
        numbers = np.array(values, np.float64)
        if name in columns or default is None or not ((numbers == default) | np.isnan(numbers)).all():
            _merge(columns, name, numbers if form != "%d" else numbers.astype(np.int64), form)
    if "rlnOpticsGroupName" not in columns:
        columns["rlnOpticsGroupName"] = [g.name for g in groups]
    if fresh:
        columns["rlnImageDimensionality"] = ["2"] * len(groups)
    _write_zernike(columns, groups)
    return StarBlock("optics", True, columns)


def _write_zernike(columns: Text, groups: tuple[OpticsGroup, ...]) -> None:
    for name, values in (
        ("rlnOddZernike", [g.odd_zernike for g in groups]),
        ("rlnEvenZernike", [g.even_zernike for g in groups]),
    ):
        if name not in columns and not any(values):
            continue
        text = ["[" + ",".join(f"{c:.12g}" for c in v) + "]" for v in values]
        old = columns.get(name, [""] * len(text))
        columns[name] = [a if _same_coefficients(a, v) else b for a, b, v in zip(old, text, values, strict=True)]


def _same_coefficients(text: str, values: tuple[float, ...]) -> bool:
    """Whether a list in brackets has these numbers."""
    inner = text.strip().strip("[]").strip()
    try:
        return bool(text) and tuple(float(v) for v in inner.split(",") if v.strip()) == tuple(values)
    except ValueError:
        return False
