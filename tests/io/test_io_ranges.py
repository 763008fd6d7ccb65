"""Numbers of particle files that cannot be are named with row, column, value and range; those that can be are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from errors_helper import raises_code

from cryoiso.core.errors import InputError
from cryoiso.io import read_particle_file
from cryoiso.io.conventions import euler_to_matrix
from cryoiso.io.mrc import write_stack
from cryoiso.io.ranges import CS_FIELDS, RANGES
from cryoiso.io.star.read import read_particles

OPTICS = {
    "rlnOpticsGroup": "1", "rlnOpticsGroupName": "a", "rlnVoltage": "300", "rlnSphericalAberration": "2.7",
    "rlnAmplitudeContrast": "0.1", "rlnImagePixelSize": "2", "rlnImageSize": "32", "rlnImageDimensionality": "2",
    "rlnBeamTiltX": "0.1", "rlnBeamTiltY": "0.2", "rlnMagMat00": "1", "rlnMagMat01": "0", "rlnMagMat10": "0",
    "rlnMagMat11": "1", "rlnOddZernike": "[0,0.5]", "rlnEvenZernike": "[0,0.5]",
}  # fmt: skip
ROW = {
    "rlnImageName": "{}@s.mrcs", "rlnOpticsGroup": "1", "rlnDefocusU": "15000", "rlnDefocusV": "14000",
    "rlnDefocusAngle": "30", "rlnPhaseShift": "0", "rlnCtfBfactor": "0", "rlnCtfScalefactor": "1", "rlnAngleRot": "10",
    "rlnAngleTilt": "20", "rlnAnglePsi": "30", "rlnOriginXAngst": "1", "rlnOriginYAngst": "2", "rlnRandomSubset": "1",
}  # fmt: skip
OLD = {"rlnMagnification": "10000", "rlnDetectorPixelSize": "2", "rlnVoltage": "300", "rlnSphericalAberration": "2.7",
       "rlnAmplitudeContrast": "0.1", "rlnOriginX": "1", "rlnOriginY": "2", "rlnTomoSubtomogramRot": "1",
       "rlnTomoSubtomogramTilt": "2", "rlnTomoSubtomogramPsi": "3"}  # fmt: skip


def table(name: str, rows: list[dict[str, str]]) -> str:
    lines = [" ".join(row.values()) for row in rows]
    return f"data_{name}\n\nloop_\n" + "".join(f"_{c}\n" for c in rows[0]) + "\n".join(lines) + "\n\n"


def star(folder: Path, n: int = 3, optics: dict | None = None, rows: dict[int, dict] | None = None, **every) -> Path:
    """n particles; ``optics`` and ``rows`` (by number from 1) overwrite values."""
    particles = [{**ROW, **every, "rlnImageName": f"{i}@s.mrcs", **(rows or {}).get(i, {})} for i in range(1, n + 1)]
    groups = [{**OPTICS}, {**OPTICS, "rlnOpticsGroup": "2", **(optics or {})}]
    path = folder / "p.star"
    path.write_text(table("optics", groups) + table("particles", particles))
    return path


def old_star(folder: Path, rows: dict[int, dict] | None = None) -> Path:
    particles = [{**ROW, **OLD, "rlnImageName": f"{i}@s.mrcs", **(rows or {}).get(i, {})} for i in (1, 2, 3)]
    path = folder / "p.star"
    path.write_text(
        table("particles", [{k: v for k, v in p.items() if k[-5:] != "Angst" and "Optics" not in k} for p in particles])
    )
    return path


def beyond(column: str) -> list[str]:
    limits = RANGES[column]
    step = max(abs(limits.high), abs(limits.low)) * 1e-6 if not limits.integer else 1
    values = [limits.low - step, limits.high + step, 1e30, -1e30] + ([limits.low + 0.5] if limits.integer else [])
    return [f"{v!r}" for v in values]


def write(folder: Path, column: str, value: str) -> tuple[Path, str]:
    """A file with this value in row 2, and how the column is called in messages."""
    shown = f"[0,{value}]" if "Zernike" in column else value
    if column in OPTICS and column != "rlnOpticsGroup":
        return star(folder, optics={column: shown}), f"column _{column} of data_optics"
    if column in OLD:
        return old_star(folder, {2: {column: value}}), f"column _{column}"
    return star(folder, rows={2: {column: value}}), f"column _{column}"


@pytest.mark.parametrize("column", list(RANGES))
def test_every_column_has_its_limits(tmp_path, column):
    for value in beyond(column):
        path, name = write(tmp_path, column, value)
        with pytest.raises(InputError) as error:
            read_particles(path)
        message = str(error.value)
        assert f"{path}, row 2: impossible value in {name} (expected {RANGES[column]}, found" in message
        assert value in message
    for value in ("nan", "inf", "-inf", "x", "1_0", "٣", "1e400", *(["1,5"] if "Zernike" not in column else [])):
        path, name = write(tmp_path, column, value)
        with raises_code("value-not-a-number", InputError, match=rf"row 2: bad value in {name} .*found .*{value}"):
            read_particles(path)


def test_the_limits_themselves_are_admissible(tmp_path):
    for end in ("low", "high"):
        limit = {c: str(getattr(r, end)) for c, r in RANGES.items()}
        optics = {c: limit[c] for c in OPTICS if c in limit and "Zernike" not in c and c != "rlnOpticsGroup"}
        optics["rlnImageSize"] = "64"
        p = read_particles(
            star(tmp_path, optics=optics, rows={2: {c: limit[c] for c in ROW if c in limit and c != "rlnOpticsGroup"}})
        )
        assert p.groups[1].voltage_kV == float(limit["rlnVoltage"])
        assert p.groups[1].spherical_aberration_mm == float(limit["rlnSphericalAberration"])
        assert p.groups[1].amplitude_contrast == float(limit["rlnAmplitudeContrast"])
        assert p.defocus_u_A[1] == float(limit["rlnDefocusU"]) and p.ctf_bfactor_A2[1] == float(limit["rlnCtfBfactor"])
        assert p.half[1] == int(limit["rlnRandomSubset"]) and p.shift_A[1, 0] == float(limit["rlnOriginXAngst"])


@pytest.mark.parametrize(
    ("rot", "tilt", "psi", "rot2", "tilt2", "psi2"), [(10, -20, 30, 190, 20, 210), (10, 200, 30, 190, 160, 210)]
)
def test_tilts_beyond_0_to_180_are_the_same_views(tmp_path, rot, tilt, psi, rot2, tilt2, psi2):
    angles = {"rlnAngleRot": str(rot), "rlnAngleTilt": str(tilt), "rlnAnglePsi": str(psi)}
    p = read_particles(star(tmp_path, rows={2: angles}))
    np.testing.assert_allclose(
        p.rotation[1], euler_to_matrix(*(np.array([float(a)]) for a in (rot2, tilt2, psi2)))[0], atol=1e-12
    )


def test_the_pixel_size_of_relion_30_is_checked_too(tmp_path):
    with raises_code(
        "value-out-of-range", InputError, match=r"row 2: impossible value in the pixel size, from.*0\.2 to 100 Å, found"
    ):
        read_particles(old_star(tmp_path, {2: {"rlnMagnification": "1000000"}}))
    assert read_particles(old_star(tmp_path)).groups[0].pixel_size_A == pytest.approx(2.0)


def test_images_too_small_for_a_particle(tmp_path, caplog):
    """0.6 Å instead of 6 Å: within the limits of a pixel size, but 32 such pixels hold no particle."""
    with raises_code(
        "pixel-size-invalid", InputError, match=r"optics group 1 are too small.*32 px of 0\.6 Å = 19\.2 Å.*nm"
    ):
        path = star(tmp_path)
        path.write_text(path.read_text().replace("0.1 2 32", "0.1 0.6 32"))
        read_particles(path)
    with write_stack(tmp_path / "s.mrcs", 32, 6.0) as stack:
        stack.append(np.zeros((3, 32, 32)))
    assert not caplog.text
    assert read_particles(star(tmp_path)).groups[0].pixel_size_A == 2.0
    assert "pixel size of optics group 1 is 2 Å, but 6 Å in the header" in caplog.text


# --- defocus of the whole set


def defocus(folder: Path, u: list[float], **every: str) -> Path:
    rows = {i: {"rlnDefocusU": repr(v), "rlnDefocusV": repr(v)} for i, v in enumerate(u, start=1)}
    return star(folder, len(u), rows=rows, **every)


@pytest.mark.parametrize(
    ("u", "words"),
    [
        ([1.5, 1.2, 2.0], r"row 1: no usable defocus in 3 rows.*found 1\.5 and 1\.5.*1 µm is 10000"),
        ([0.0, 0.0, 0.0], "row 1: no usable defocus in 3 rows.*the CTF was not estimated"),
        ([15000.0, 0.0, 15000.0], r"row 2: no usable defocus \(expected at least 100 Å"),
        ([15000.0, 16000.0, 1.5], "row 3: no usable defocus"),
        ([-15000.0, -16000.0, -17000.0], "row 1: negative defocus in 3 of 3 rows.*change the sign"),
        ([15000.0, -16000.0, -17000.0], "row 2: negative defocus in 2 of 3 rows"),
    ],
)
def test_defocus_of_another_unit_or_sign(tmp_path, u, words):
    with raises_code("defocus-invalid", InputError, match=words):
        read_particles(defocus(tmp_path, u))
    read_particles(defocus(tmp_path, u), require=("image",))


def test_defocus_of_one_axis_in_another_unit(tmp_path):
    with raises_code("defocus-invalid", InputError, match=r"row 2: no usable defocus .*found 15000 and 1\.4"):
        read_particles(star(tmp_path, rows={2: {"rlnDefocusV": "1.4"}}))


def test_odd_but_possible_defocus(tmp_path, caplog):
    for u, every, word in (
        ([15000.0, -300.0, 15000.0], {}, "1 rows have a negative defocus (the first is row 2)"),
        ([900.0, 1200.0, 1500.0], {}, "is it in nm?"),
        ([0.0, 30.0, 250.0], {"rlnPhaseShift": "90"}, ""),  # in focus, with a phase plate
        ([-20.0, -30.0, 250.0], {"rlnPhaseShift": "90"}, "2 rows have a negative defocus"),
        ([5000.0, 15000.0, 100000.0], {}, ""),
    ):
        caplog.clear()
        assert read_particles(defocus(tmp_path, u, **every)).defocus_u_A.tolist() == u
        assert word in caplog.text and bool(word) == bool(caplog.text)
    with raises_code(
        "defocus-invalid", InputError, match=r"no usable defocus in 3 rows.*expected 0, or at least 10 Å.*1 µm is 10000"
    ):
        read_particles(defocus(tmp_path, [0.9, 1.0, 1.1], rlnPhaseShift="90"))
    path = defocus(tmp_path, [0.0, 0.0, 0.0])  # simulated without a CTF
    path.write_text(path.read_text().replace(" 2.7 0.1 ", " 2.7 1.0 "))
    assert read_particles(path).groups[0].amplitude_contrast == 1.0


def test_scale_of_zero(tmp_path):
    with raises_code("value-out-of-range", InputError, match="0 in every row of column _rlnCtfScalefactor"):
        read_particles(star(tmp_path, rlnCtfScalefactor="0"))
    p = read_particles(star(tmp_path, rows={2: {"rlnCtfScalefactor": "0"}}))
    assert p.ctf_scale.tolist() == [1, 0, 1]


# --- .cs files


@pytest.mark.parametrize("field", [f for f in CS_FIELDS if f != "alignments3D/psize_A"])
def test_fields_of_cs_files_have_the_same_limits(shared, tmp_path, field):
    source = np.load(shared / "data/particles/empiar_10076_7/empiar_10076_7.cs")
    if field not in source.dtype.names:
        kind = [*source.dtype.descr, (field, "<f4", (2,)) if field.endswith("shift") else (field, "<f4")]
        more = np.zeros(len(source), kind)
        for name in source.dtype.names:
            more[name] = source[name]
        more[field] = 1
        source = more
    column, factor = CS_FIELDS[field]
    good = source.copy()
    for value in (RANGES[column].high * 1.001 / factor, 1e30, RANGES[column].low - abs(RANGES[column].low) - 1):
        source = good.copy()
        source[field][2] = value
        with open(tmp_path / "p.cs", "wb") as stream:
            np.save(stream, source)
        with raises_code(
            "value-out-of-range", InputError, match=rf"p\.cs, row 3: impossible value in field {field} \(.* to .*found"
        ):
            read_particle_file(tmp_path / "p.cs")


def test_defocus_of_cs_files_is_checked_as_a_whole(shared, tmp_path):
    source = np.load(shared / "data/particles/empiar_10076_7/empiar_10076_7.cs")
    for factor, words in ((1e-4, "no usable defocus in 7 rows"), (-1, "negative defocus in 7 of 7 rows")):
        changed = source.copy()
        for field in ("ctf/df1_A", "ctf/df2_A"):
            changed[field] *= factor
        with open(tmp_path / "p.cs", "wb") as stream:
            np.save(stream, changed)
        with raises_code("defocus-invalid", InputError, match=words):
            read_particle_file(tmp_path / "p.cs")


def test_real_files_are_within_all_limits(shared, caplog):
    files = [
        f
        for f in sorted((shared / "data").rglob("*.star"))
        if all(f"\n_{c}" in f.read_text(errors="replace")[:9000] for c in ("rlnImageName", "rlnDefocusU", "rlnVoltage"))
    ]
    assert len(files) > 12
    for file in files:
        if "toy" not in file.name:  # its pixel size stands elsewhere
            read_particles(file, require=("ctf",))
    assert "nm?" not in caplog.text and "defocus" not in caplog.text


def test_the_documentation_has_every_limit():
    text = (Path(__file__).parents[2] / "docs/formats.md").read_text(encoding="utf-8")
    section = text.split("### Numbers that are admitted")[1].split("###")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `rln")]
    for column, limits in RANGES.items():
        row = next(line for line in rows if f"`{column}`" in line)
        assert row.endswith(f"| {limits} |"), column
        assert all(f"`{field}`" in row for field, (name, _) in CS_FIELDS.items() if name == column)
