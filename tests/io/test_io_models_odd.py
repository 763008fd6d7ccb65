"""Odd atomic models: each gives the density of what it holds, or an error that names the atom and the value."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from errors_helper import raises_code

from cryoiso.core.errors import InputError
from cryoiso.io.models import is_model, model_to_map, positions, read_model
from cryoiso.io.symmetryframe import symmetry_frame

RNG = np.random.default_rng(0)
CHAIN = np.cumsum(RNG.normal(size=(40, 3)) * 2.2, 0)
CHAIN += np.array([20.0, 3.0, 2.0]) - CHAIN.mean(0)


def about_z(xyz: np.ndarray, deg: float) -> np.ndarray:
    c, s = np.cos(np.radians(deg)), np.sin(np.radians(deg))
    return xyz @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]).T


def line(number, xyz, of="A", name="CA", residue="ALA", serial=1, element="C", b="50.00", occ="1.00", record="ATOM"):
    place = "".join(f"{v:8.3f}" if isinstance(v, float) else f"{v:>8}" for v in xyz)
    start = f"{record:<6}{serial % 100000:5d}  {name:<3s} {residue:>3} {of}{number:4d}    "
    return f"{start}{place}{occ:>6}{b:>6}          {element:>2}"


def lines(xyz: np.ndarray, of: str = "A", **more) -> list[str]:
    return [line(i + 1, [float(v) for v in p], of, **more) for i, p in enumerate(xyz)]


def write(path, *parts: list[str]):
    path.write_text("\n".join([*chain.from_iterable(parts), "END" if path.suffix != ".cif" else "", ""]))
    return path


def density(path, **more) -> np.ndarray:
    return model_to_map(path, 40, 3.5, 12.0, **more).data


COPIES = [about_z(CHAIN, 120 * k) for k in range(3)]
TRIMER = [text for xyz, name in zip(COPIES, "ABC") for text in lines(xyz, name)]


@pytest.fixture
def trimer(tmp_path):
    return write(tmp_path / "trimer.pdb", TRIMER)


def test_membrane_markers_are_no_density(tmp_path, trimer, caplog):
    """OPM's planes: DUM residues whose atoms are called N and O."""
    plane = [
        line(i, [float(x), float(y), z], " ", e, "DUM", element=e, record="HETATM")
        for e, z in (("N", -15.0), ("O", 15.0))
        for i, (x, y) in enumerate(np.argwhere(np.ones((12, 12))) * 4.0 - 24)
    ]
    marked = write(tmp_path / "opm.pdb", TRIMER, plane)
    np.testing.assert_array_equal(density(marked), density(trimer))
    assert "288 marker atoms (DUM)" in caplog.text


@pytest.mark.parametrize("suffix", [".pdb", ".pdb1"])
def test_an_assembly_stored_as_several_models_is_taken_whole(tmp_path, trimer, suffix, caplog):
    caplog.set_level("INFO", "cryoiso")
    models = [[f"MODEL     {k + 1:4d}", *lines(xyz), "ENDMDL"] for k, xyz in enumerate(COPIES)]
    path = write(tmp_path / f"models{suffix}", *models)
    assert is_model(path) and is_model(f"{path}.gz") and not is_model("a.mrc")
    np.testing.assert_allclose(density(path), density(trimer), atol=1e-6)
    assert "3 MODELs lie side by side" in caplog.text
    frame, _ = symmetry_frame(read_model(path), "C3")
    np.testing.assert_allclose(frame, np.eye(3), atol=1e-3)


def test_of_an_ensemble_one_model_is_taken(tmp_path, caplog):
    caplog.set_level("INFO", "cryoiso")
    models = [
        [f"MODEL     {k + 1:4d}", *lines(CHAIN + (k > 0) * RNG.normal(size=CHAIN.shape) * 0.3), "ENDMDL"]
        for k in range(9)
    ]
    ensemble, single = write(tmp_path / "nmr.pdb", *models), write(tmp_path / "one.pdb", lines(CHAIN))
    np.testing.assert_array_equal(density(ensemble), density(single))
    assert "9 MODELs lie on one another" in caplog.text


def test_models_that_are_neither_are_refused(tmp_path):
    drifted = [[f"MODEL     {k + 1:4d}", *lines(xyz), "ENDMDL"] for k, xyz in
               enumerate((CHAIN, CHAIN + RNG.normal(size=CHAIN.shape) * 2 + [200, 0, 0]))]  # fmt: skip
    with raises_code("model-ambiguous", InputError, match=r"not clear what its 2 MODELs are.*no rigid copies"):
        read_model(write(tmp_path / "md.pdb", *drifted))


@pytest.mark.parametrize(
    ("places", "away"),
    [
        ([xyz + np.array([0, 0, 15 * k]) for k, xyz in enumerate(COPIES)], "30.0"),
        ([COPIES[0], COPIES[1], COPIES[2] + np.array([0, 0, 8])], "8.0"),
    ],
)
def test_a_screw_or_a_chain_out_of_place_is_no_symmetry(tmp_path, places, away):
    path = write(tmp_path / "a.pdb", *(lines(xyz, of) for xyz, of in zip(places, "ABC", strict=True)))
    with raises_code("symmetry-mismatch", InputError, match=rf"plus a shift.*within 5 Å, found {away} Å"):
        density(path, align_symmetry_axis="C3")
    density(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"xyz": ["********", 1.0, 2.0]}, r"row 2: atom CB of GLY 7 in chain B has no usable x-coordinate.*\*{8}"),
        ({"xyz": [1.0, "", 2.0]}, r"row 2: atom CB of GLY 7 in chain B has no usable y-coordinate"),
        ({"xyz": [1.0, 2.0, "nan"]}, r"row 2: atom CB of GLY 7 in chain B has no usable z-coordinate.*nan"),
        ({"xyz": [1.0, 2.0, "1.0.0"]}, r"no usable z-coordinate.*1\.0\.0"),
        ({"xyz": [12345.678, 2.0, 3.0]}, r"row 2.*no usable (x|y)-coordinate"),
        ({"b": "nan"}, r"row 2: atom CB of GLY 7 in chain B has no usable temperature factor.*nan"),
        ({"b": "******"}, r"no usable temperature factor.*\*{6}"),
        ({"occ": "-1.00"}, r"row 2: atom CB of GLY 7 in chain B has no usable occupancy.*-1\.00"),
        ({"element": "Xq"}, r"atom CB of GLY 7 in chain B is of no known element"),
    ],
)
def test_numbers_that_are_none_are_named(tmp_path, change, words):
    bad = line(7, change.pop("xyz", [1.0, 2.0, 3.0]), "B", "CB", "GLY", **change)
    with raises_code("model-atom-invalid", InputError, match=words):
        read_model(write(tmp_path / "bad.pdb", [line(1, [1.0, 2.0, 3.0]), bad]))


@pytest.mark.parametrize("b", ["", "0.00", "-5.00", "999.00"])
@pytest.mark.parametrize("occ", ["", "0.00", "0.50"])
def test_other_temperature_factors_and_occupancies_do_no_harm(tmp_path, b, occ):
    path = write(tmp_path / "a.pdb", lines(CHAIN, b=b, occ=occ))
    plain = density(write(tmp_path / "b.pdb", lines(CHAIN)))
    found = density(path)
    assert np.isfinite(found).all() and np.corrcoef(found.ravel(), plain.ravel())[0, 1] > 0.95


CIF = ["data_x", "loop_"] + [
    f"_atom_site.{name}"
    for name in (
        "group_PDB",
        "id",
        "type_symbol",
        "label_atom_id",
        "label_alt_id",
        "label_comp_id",
        "label_asym_id",
        "label_entity_id",
        "label_seq_id",
        "Cartn_x",
        "Cartn_y",
        "Cartn_z",
        "occupancy",
        "B_iso_or_equiv",
        "auth_seq_id",
    )
]


@pytest.mark.parametrize(
    ("x", "b", "words"),
    [
        ("?", "20", r"atom CA of ALA 2 in chain A has no usable x-coordinate.*'\?'"),
        (".", "20", r"atom CA of ALA 2 in chain A has no usable x-coordinate.*'\.'"),
        ("nan", "20", "no usable x-coordinate.*nan"),
        ("1e300", "20", r"no usable x-coordinate.*1e\+300"),
        ("5", "nan", "atom CA of ALA 2 in chain A has no usable temperature factor.*nan"),
    ],
)
def test_the_same_in_mmcif(tmp_path, x, b, words):
    rows = ["ATOM 1 C CA . ALA A 1 1 1.0 2.0 3.0 1 20 1", f"ATOM 2 C CA . ALA A 1 2 {x} 2.0 3.0 1 {b} 2"]
    with raises_code("model-atom-invalid", InputError, match=words):
        read_model(write(tmp_path / "bad.cif", CIF, rows))


def test_copies_under_one_chain_identifier_are_all_there(tmp_path, trimer):
    same = [part for xyz in COPIES for part in (*lines(xyz), "TER")]
    blank = [text[:21] + " " + text[22:] for text in same]
    for name, text in (("same", same), ("blank", blank)):
        path = write(tmp_path / f"{name}.pdb", text)
        np.testing.assert_allclose(density(path), density(trimer), atol=1e-6)
        density(path, align_symmetry_axis="C3")


def test_atoms_of_one_name_all_count_and_doubled_ones_once(tmp_path, caplog):
    ligand = [line(1, [float(v) for v in p], name="C1", residue="LIG", record="HETATM") for p in CHAIN]
    assert len(positions(read_model(write(tmp_path / "ligand.pdb", ligand)))[0]) == len(CHAIN)
    doubled = write(tmp_path / "doubled.pdb", lines(CHAIN), lines(CHAIN, "B"))
    assert len(positions(read_model(doubled))[0]) == len(CHAIN)
    assert "40 atoms stand twice" in caplog.text


def test_water_of_simulations_goes_and_what_is_left_must_be_something(tmp_path):
    water = [line(i, [9.0 * i, 0.0, 0.0], "W", "OH2", "TIP", element="O") for i in range(1, 9)]
    assert len(positions(read_model(write(tmp_path / "md.pdb", lines(CHAIN), water)))[0]) == len(CHAIN)
    for name, text in (("water", water), ("empty", []), ("garbage", ["no model"])):
        with raises_code("model-malformed", InputError):
            read_model(write(tmp_path / f"{name}.pdb", text))
    (tmp_path / "sf.cif").write_text("data_x\nloop_\n_refln.index_h\n_refln.index_k\n1 0\n")
    with raises_code("model-malformed", InputError):
        read_model(tmp_path / "sf.cif")


def test_of_real_ribosomes_no_atom_is_lost(shared):
    """Chains of 4V5A hold ligands whose numbers are those of residues."""
    import gemmi

    path = shared / "data/models/1xnr_30S.cif.gz"
    raw = gemmi.read_structure(str(path))[0]
    raw.remove_hydrogens()
    raw.remove_waters()
    alternatives = sum(a.altloc != "\0" for c in raw for r in c for a in r)
    assert alternatives == 0 and len(positions(read_model(path))[0]) == raw.count_atom_sites()
