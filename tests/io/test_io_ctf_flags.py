"""The CTF flags of optics groups: read in every dialect, kept in all that is written, and never mixed up in shards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from errors_helper import raises_code

from cryoiso.core.errors import InputError
from cryoiso.core.types import concatenate
from cryoiso.engines.relion.images import relion_particles
from cryoiso.io.shards import groups_from_json, groups_to_json
from cryoiso.io.star.read import read_particles, write_particles
from cryoiso.io.star.text import read_blocks
from cryoiso.physics.simulation import make_particles

PREMULTIPLIED, FLIPPED = "rlnCtfDataAreCtfPremultiplied", "rlnCtfDataArePhaseFlipped"
OPTICS = ("rlnOpticsGroup", "rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast", "rlnImagePixelSize")
ROWS = ("rlnImageName", "rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle", "rlnOpticsGroup")


def star(path: Path, optics: dict[str, list[str]] | None = None, rows: dict[str, list[str]] | None = None) -> Path:
    """Four particles in two optics groups, with these columns beside the usual ones; RELION 3.0 without optics."""
    table = {n: [str(v)] * 2 for n, v in zip(OPTICS, (0, 300, 2.7, 0.1, 1.5), strict=True)}
    table["rlnOpticsGroup"] = ["1", "2"]
    parts = {n: ["10000.0"] * 4 for n in ROWS}
    parts |= {"rlnImageName": [f"{i}@a.mrcs" for i in range(1, 5)], "rlnOpticsGroup": ["1", "2", "1", "2"]}
    blocks = {"optics": table | (optics or {}), "particles": parts | (rows or {})}
    if optics is None:
        del blocks["particles"]["rlnOpticsGroup"]
        one = {n: [v[0]] * 4 for n, v in table.items() if n not in ("rlnOpticsGroup", "rlnImagePixelSize")}
        sizes = {"rlnMagnification": ["10000"] * 4, "rlnDetectorPixelSize": ["1.5"] * 4}
        blocks = {"": blocks["particles"] | one | sizes}
    text = ""
    for name, columns in blocks.items():
        text += f"\ndata_{name}\n\nloop_\n" + "".join(f"_{c}\n" for c in columns)
        text += "".join(" ".join(v) + "\n" for v in zip(*columns.values(), strict=True)) + "\n"
    path.write_text(text)
    return path


def applied(path: Path) -> list[str]:
    """What each particle's image is said to be."""
    p = read_particles(path, require=("ctf",))
    return [p.groups[k].ctf_applied for k in p.optics]


def test_flags_of_the_optics_table(tmp_path):
    file = tmp_path / "p.star"
    assert applied(star(file, {})) == [""] * 4
    assert applied(star(file, {PREMULTIPLIED: ["0", "1"]})) == ["", "premultiplied", "", "premultiplied"]
    assert applied(star(file, {FLIPPED: ["1", "0"]})) == ["flipped", "", "flipped", ""]
    assert (
        applied(star(file, {PREMULTIPLIED: ["1.000000", "0"], FLIPPED: ["1", "1"]})) == ["premultiplied", "flipped"] * 2
    )


def test_flags_of_single_particles(tmp_path):
    file = tmp_path / "p.star"
    assert applied(star(file, None, {FLIPPED: ["0", "1", "1", "0"]})) == ["", "flipped", "flipped", ""]
    assert applied(star(file, {}, {PREMULTIPLIED: ["0", "1", "0", "1"]})) == ["", "premultiplied"] * 2
    same = {PREMULTIPLIED: ["0", "1"]}
    assert applied(star(file, same, {PREMULTIPLIED: ["0", "1", "0", "1"]})) == ["", "premultiplied"] * 2
    with raises_code(
        "optics-group-mixed", InputError, match=r"PhaseFlipped differs within optics group 1.*row 3|row 3.*differs"
    ):
        applied(star(file, {}, {FLIPPED: ["0", "1", "1", "1"]}))
    with raises_code("optics-group-mixed", InputError, match="differs within optics group 2"):
        applied(star(file, same, {PREMULTIPLIED: ["0", "0", "0", "0"]}))


@pytest.mark.parametrize("value", ["2", "-1", "yes", "nan", "0.5"])
@pytest.mark.parametrize("name", [PREMULTIPLIED, FLIPPED])
def test_a_flag_is_0_or_1(tmp_path, name, value):
    for file in (
        star(tmp_path / "optics.star", {name: ["0", value]}),
        star(tmp_path / "rows.star", {}, {name: ["0", value, "0", "1"]}),
        star(tmp_path / "old.star", None, {name: ["0", value, "0", "1"]}),
    ):
        with raises_code("value-not-a-number", InputError, match=f"bad value in column _{name}") as caught:
            read_particles(file, require=("ctf",))
        assert "2" in str(caught.value) and value in str(caught.value)


@pytest.mark.parametrize("optics, rows", [
    ({PREMULTIPLIED: ["0", "1"]}, None), ({FLIPPED: ["1", "0"], PREMULTIPLIED: ["1", "0"]}, None),
    (None, {FLIPPED: ["0", "1", "1", "0"]}), ({}, {PREMULTIPLIED: ["1", "0", "1", "0"]}),
])  # fmt: skip
def test_written_files_say_the_same(tmp_path, optics, rows):
    file = star(tmp_path / "p.star", optics, rows)
    p = read_particles(file, require=("ctf",))
    write_particles(tmp_path / "all.star", p)
    write_particles(tmp_path / "fresh.star", replace(p, table=None, optics_table=None))
    write_particles(tmp_path / "relion.star", relion_particles(p, with_poses=False))
    for name in ("all", "fresh", "relion"):
        assert applied(tmp_path / f"{name}.star") == applied(file)
        block = next(b for b in read_blocks(tmp_path / f"{name}.star") if b.name == "optics")
        found = [g.ctf_premultiplied for g in p.groups]
        assert not any(found) or block.columns[PREMULTIPLIED] == [str(int(f)) for f in found]


def test_files_without_flags_get_none(tmp_path):
    p = read_particles(star(tmp_path / "p.star", {}), require=("ctf",))
    write_particles(tmp_path / "out.star", p)
    assert "CtfData" not in (tmp_path / "out.star").read_text()


def test_shards_keep_flags_and_those_of_before_have_none():
    group = make_particles(2, 32, 4.0).groups[0]
    assert all("flipped" not in k and "premultiplied" not in k for k in groups_to_json((group,))[0])
    for applied_to in ("", "flipped", "premultiplied"):
        changed = group.with_ctf_applied(applied_to)
        assert groups_from_json(groups_to_json((changed,))) == (changed,)


def test_particle_sets_put_together_keep_their_own():
    one, two = (make_particles(2, 32, 4.0, seed=s) for s in (1, 2))
    both = concatenate(one.with_ctf_applied("premultiplied"), two)
    assert [both.groups[k].ctf_applied for k in both.optics] == ["premultiplied", "premultiplied", "", ""]
    assert np.all([g.ctf_applied == "" for g in one.groups])
