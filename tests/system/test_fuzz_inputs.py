"""Particle files, maps, models, job files with anything in them: read right, or refused in the project's own words."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from cs_helper import table
from fuzz_helper import (
    byte_edits,
    edited,
    edits,
    examples,
    json_edits,
    pieces,
    refused_or,
    with_bytes,
    with_values,
    with_words,
)
from hypothesis import given
from hypothesis import strategies as st

from cryoiso.core.config import Job, job_to_toml, parse_job
from cryoiso.core.errors import CryoisoError
from cryoiso.core.types import Particles
from cryoiso.io import read_particle_file
from cryoiso.io.models import positions, read_model
from cryoiso.io.mrc import read_map, read_raw_map
from cryoiso.io.star.text import read_blocks, write_blocks
from cryoiso.pipeline.batch.fill_template import fill_site
from cryoiso.pipeline.jobfile import read_job

FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-"))

STAR = """# version 30001

data_optics

loop_
_rlnOpticsGroup #1
_rlnOpticsGroupName #2
_rlnVoltage #3
_rlnSphericalAberration #4
_rlnAmplitudeContrast #5
_rlnImagePixelSize #6
_rlnImageSize #7
_rlnCtfDataAreCtfPremultiplied #8
1 opticsGroup1 300.000000 2.700000 0.100000 1.250000 32 0
2 opticsGroup2 200.000000 2.000000 0.070000 1.250000 32 1

data_particles

loop_
_rlnImageName #1
_rlnOpticsGroup #2
_rlnDefocusU #3
_rlnDefocusV #4
_rlnDefocusAngle #5
_rlnAngleRot #6
_rlnAngleTilt #7
_rlnAnglePsi #8
_rlnOriginXAngst #9
_rlnOriginYAngst #10
_rlnRandomSubset #11
000001@stack.mrcs 1 11000.0 10900.0 12.5 10.0 20.0 30.0 0.5 -0.5 1
000002@stack.mrcs 1 12000.0 11900.0 12.5 -10.0 -20.0 130.0 0.5 -0.5 2
'000003@a b/stack.mrcs' 2 13000.0 12900.0 12.5 110.0 120.0 -30.0 0.0 -1.5 1
000004@stack.mrcs 2 14000.0 13900.0 12.5 210.0 90.0 -130.0 0.0 -1.5 2
"""


def is_sound(particles: Particles | None) -> None:
    """What a reader accepts must be whole and finite."""
    if particles is None:
        return
    n = len(particles)
    assert n > 0 and len(np.unique(particles.uid)) == n and particles.uid.dtype == np.uint64
    assert particles.optics.shape == (n,) and 0 <= particles.optics.min() <= particles.optics.max() < len(
        particles.groups
    )
    if particles.rotation is not None:
        np.testing.assert_allclose(
            particles.rotation @ particles.rotation.transpose(0, 2, 1), [np.eye(3)] * n, atol=1e-6
        )
        assert np.isfinite(particles.shift_A).all()
    if particles.half is not None:
        assert np.isin(particles.half, (0, 1, 2)).all()


@examples(120)
@given(st.lists(edits, max_size=4), st.lists(st.tuples(st.floats(0, 1), pieces), max_size=4))
def test_star_files(changes, words):
    path = FOLDER / "particles.star"
    path.write_bytes(edited(with_words(STAR, words).decode("utf-8", "surrogatepass"), changes))
    is_sound(refused_or(read_particle_file, path, "", ()))
    is_sound(refused_or(read_particle_file, path))


@examples(120)
@given(st.lists(edits, max_size=5))
def test_star_text_survives_a_round_trip(changes):
    path, again = FOLDER / "a.star", FOLDER / "b.star"
    path.write_bytes(edited(STAR, changes))
    blocks = refused_or(read_blocks, path)
    if blocks is not None:
        write_blocks(again, blocks)
        assert [(b.name, b.loop, b.columns) for b in read_blocks(again)] == [
            (b.name, b.loop, b.columns) for b in blocks
        ]


def cs_bytes() -> bytes:
    path = FOLDER / "whole.cs"
    poses = {"alignments3D/pose": np.zeros((4, 3), "f4"), "alignments3D/shift": np.zeros((4, 2), "f4")}
    with open(path, "wb") as stream:
        np.save(stream, table(**poses, **{"alignments3D/split": np.array([0, 1, 0, 1], "u4")}))
    return path.read_bytes()


CS = cs_bytes()


@examples(150)
@given(byte_edits, st.floats(0, 1))
def test_cs_files(changes, cut):
    path = FOLDER / "particles.cs"
    path.write_bytes(with_bytes(CS, changes, CS.index(b"\n"), cut))
    is_sound(refused_or(read_particle_file, path, "", ()))


CS_FIELDS = sorted(set(table().dtype.names) | {"alignments3D/pose", "alignments3D/shift", "alignments3D/split"})
CS_TYPES = [
    "<f4",
    "<f8",
    "<u4",
    "<i8",
    "<u8",
    "S4",
    "S40",
    "<U4",
    "?",
    "<c8",
    "<M8[s]",
    ("<f4", (2,)),
    ("<f4", (3,)),
    ("<u4", (2,)),
]


@examples(150)
@given(
    st.sampled_from(CS_FIELDS),
    st.sampled_from(CS_TYPES),
    st.sampled_from([0, 1, -1, 2, 1e30, float("nan"), float("inf"), -float("inf"), 2**63, 0.5, b"x", b""]),
)
def test_fields_of_cs_files(name, kind, value):
    whole = table()
    spec = [
        (n, *((kind,) if isinstance(kind, str) else kind)) if n == name else (n, *_kind(whole.dtype, n))
        for n in dict.fromkeys([*whole.dtype.names, name])
    ]
    array = np.zeros(4, spec)
    for other in whole.dtype.names:
        if other != name:
            array[other] = whole[other]
    try:
        array[name][1:] = value
    except (ValueError, OverflowError, TypeError):
        return
    path = FOLDER / "fields.cs"
    with open(path, "wb") as stream:
        np.save(stream, array)
    is_sound(refused_or(read_particle_file, path, "", ()))


def _kind(dtype: np.dtype, name: str) -> tuple:
    inner = dtype[name]
    return (inner.base, inner.shape) if inner.shape else (inner,)


def mrc_bytes() -> bytes:
    from cryoiso.io.mrc import write_map

    write_map(FOLDER / "whole.mrc", np.random.default_rng(1).normal(size=(8,) * 3).astype(np.float32), 2.0)
    return (FOLDER / "whole.mrc").read_bytes()


MRC = mrc_bytes()
WORDS = st.sampled_from(
    [0, 1, 2, 3, 4, 6, 8, 12, 101, -1, 2**31 - 1, -(2**31), 1146047817, 0x42B40000, 0x7F800000, 0x7FC00000]
)


@examples(200)
@given(st.lists(st.tuples(st.integers(0, 63), WORDS), max_size=4), byte_edits, st.floats(0, 1))
def test_maps(words, changes, cut):
    data = bytearray(MRC)
    for place, value in words:
        data[4 * place : 4 * place + 4] = value.to_bytes(4, "little", signed=value < 2**31)
    path = FOLDER / "map.mrc"
    path.write_bytes(with_bytes(bytes(data), changes, 256, cut))
    refused_or(read_raw_map, path)
    found = refused_or(read_map, path)
    if found is not None:
        assert found.data.shape == (found.box_px,) * 3 and np.isfinite(found.data).all()
        assert 0 < found.pixel_size_A < 1000


PDB = (
    "\n".join(
        f"ATOM  {i:5d}  CA  ALA {chain}{i:4d}    {10.0 + i:8.3f}{-5.0 + 2 * i:8.3f}{1.5 * i:8.3f}  1.00 20.00"
        + 11 * " "
        + "C"
        for k, chain in enumerate("AB")
        for i in range(1 + 5 * k, 6 + 5 * k)
    )
    + "\nEND\n"
)
CIF_ATOM = "ATOM {0} C CA . ALA A {0} {0}.0 {1}.5 -{0}.25 1.0 20.0 A {0} 1"
CIF = (
    "data_x\nloop_\n"
    + "\n".join(
        f"_atom_site.{name}"
        for name in (
            "group_PDB",
            "id",
            "type_symbol",
            "label_atom_id",
            "label_alt_id",
            "label_comp_id",
            "label_asym_id",
            "label_seq_id",
            "Cartn_x",
            "Cartn_y",
            "Cartn_z",
            "occupancy",
            "B_iso_or_equiv",
            "auth_asym_id",
            "auth_seq_id",
            "pdbx_PDB_model_num",
        )
    )
    + "\n"
    + "\n".join(CIF_ATOM.format(i, 2 * i) for i in range(1, 6))
    + "\n"
)


@pytest.mark.parametrize(("name", "text"), [("model.pdb", PDB), ("model.cif", CIF)])
@examples(100)
@given(changes=st.lists(edits, max_size=3), words=st.lists(st.tuples(st.floats(0, 1), pieces), max_size=3))
def test_models(name, text, changes, words):
    path = FOLDER / name
    path.write_bytes(edited(with_words(text, words).decode("utf-8", "surrogatepass"), changes))
    found = refused_or(lambda: positions(read_model(path)))
    if found is not None:
        xyz, weight = found
        assert len(xyz) and np.isfinite(xyz).all() and np.isfinite(weight).all()


JOB = {"particles": {"file": "p.star"}, "reference": {"file": "r.mrc"}}
TOML = job_to_toml(parse_job(JOB, "job"))


@examples(120)
@given(st.lists(edits, max_size=3), st.lists(st.tuples(st.floats(0, 1), pieces), max_size=3))
def test_job_files(changes, words):
    path = FOLDER / "job.toml"
    path.write_bytes(edited(with_words(TOML, words).decode("utf-8", "surrogatepass"), changes))
    found = refused_or(read_job, path)
    if found is not None:
        text = job_to_toml(found[1])
        path.write_text(text, encoding="utf-8")
        assert read_job(path)[1] == found[1], "what is written back is the same job"


@examples(150)
@given(json_edits)
def test_values_of_job_files(changes):
    whole = parse_job(JOB, "job").model_dump()
    found = refused_or(parse_job, with_values(whole, changes), "job")
    assert found is None or isinstance(found, Job)


TEMPLATE = (
    "#!/bin/bash\n#SBATCH --ntasks={{ ranks }}\n{% if account %}#SBATCH -A {{ account }}\n{% endif %}{{ run_cmd }}\n"
)
FACTS = {"ranks": 2, "account": "lab", "run_cmd": "srun cryoiso run job.toml", "nodes": 1}
TAGS = st.sampled_from(
    [
        "{{",
        "}}",
        "{%",
        "%}",
        "{#",
        "#}",
        "{{ ranks }}",
        "{{ ().__class__.__mro__ }}",
        "{% include '../x' %}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ 'x' * 10**10 }}",
        "{{ 9**9**9 }}",
        "XXXcommandXXX",
        "{{ ranks / 0 }}",
        "{{ account.format }}",
        "{% raw %}",
        "{{ run_cmd[999] }}",
        "{{ [1]|first }}",
    ]
)


@examples(150)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 9), TAGS | pieces), max_size=4))
def test_templates(changes):
    path = FOLDER / "template.sh"
    path.write_bytes(edited(TEMPLATE, changes))
    found = refused_or(fill_site, path, FACTS, {"commandXXX": "x"})
    assert found is None or isinstance(found, str)


def test_the_originals_are_read(tmp_path):
    """Else all of the above would pass by refusing everything."""
    for name, data in (
        ("p.star", STAR.encode()),
        ("p.cs", CS),
        ("m.mrc", MRC),
        ("m.pdb", PDB.encode()),
        ("m.cif", CIF.encode()),
    ):
        (tmp_path / name).write_bytes(data)
    (tmp_path / "t.sh").write_text(TEMPLATE)
    try:
        assert (
            len(read_particle_file(tmp_path / "p.star", "", ()))
            == 4
            == len(read_particle_file(tmp_path / "p.cs", "", ()))
        )
        assert read_map(tmp_path / "m.mrc").box_px == 8
        assert [len(positions(read_model(tmp_path / f"m.{kind}"))[0]) for kind in ("pdb", "cif")] == [10, 5]
        assert "srun cryoiso" in fill_site(tmp_path / "t.sh", FACTS, {})
    except CryoisoError as error:
        pytest.fail(str(error))
