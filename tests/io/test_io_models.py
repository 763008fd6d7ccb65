"""Atomic models as densities: scale, place, blur, symmetry frame, assemblies, and files that are no models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from errors_helper import raises_code
from scipy.ndimage import affine_transform

from cryoiso.core.errors import InputError
from cryoiso.io.models import SIGMA_OF_RESOLUTION, is_model, model_to_map, positions, read_model
from cryoiso.physics.symmetry import point_group

ATOM = "ATOM  {n:5d}  {name:<3s} ALA {chain}{res:4d}    {x:8.3f}{y:8.3f}{z:8.3f}  1.00 30.00           {el:>2s}"


def pdb(path: Path, atoms: list[tuple[float, float, float]], element: str = "C", chain: str = "A") -> Path:
    lines = [
        ATOM.format(
            n=i + 1, name="CA" if element == "C" else element, chain=chain, res=i + 1, x=x, y=y, z=z, el=element
        )
        for i, (x, y, z) in enumerate(atoms)
    ]
    path.write_text("\n".join([*lines, "END", ""]))
    return path


@pytest.mark.parametrize("box", [32, 33])
def test_one_atom_is_a_gaussian_at_its_place_with_the_scattering_of_carbon(tmp_path, box):
    path = pdb(tmp_path / "a.pdb", [(5.0, -3.0, 8.0)])
    m = model_to_map(path, box, 2.0, 12.0, centre=False)
    total = m.data.sum(dtype=float) * 8
    assert total == pytest.approx(2.509, rel=0.01), "Int. Tables C 4.3.2.2: f(0) of carbon for electrons is 2.5089 Å"
    axis = (np.arange(box) - box // 2) * 2.0
    z, y, x = (
        np.tensordot(m.data.sum(tuple(a for a in range(3) if a != k), dtype=float), axis, 1) * 8 / total
        for k in range(3)
    )
    np.testing.assert_allclose([x, y, z], [5, -3, 8], atol=0.02)
    profile = m.data.sum((0, 1), dtype=float)
    variance = (profile * (axis - x) ** 2).sum() / profile.sum()
    blur = (SIGMA_OF_RESOLUTION * 12) ** 2 + 30 / (8 * np.pi**2)
    assert blur < variance < blur + 0.5, "blur and temperature factor, and the width of the atom itself"


def test_a_coarse_grid_shows_the_same_density_as_a_fine_one(shared):
    """What is above Nyquist is cut, not folded back: Fourier coefficients agree inside the coarse band."""
    path = shared / "data/models/ha/6wxb.pdb.gz"
    coarse, fine = model_to_map(path, 40, 5.0, 12.0), model_to_map(path, 120, 5.0 / 3, 12.0)
    a, b = (np.fft.fftshift(np.fft.fftn(np.fft.ifftshift(m.data.astype(float)))) for m in (coarse, fine))
    b = b[40:80, 40:80, 40:80] / 27
    k = np.arange(40) - 20
    inside = (k[:, None, None] ** 2 + k[None, :, None] ** 2 + k[None, None, :] ** 2) < 19**2
    assert np.abs(a - b)[inside].max() < 2e-3 * np.abs(a).max()
    shell = inside & ~((k[:, None, None] ** 2 + k[None, :, None] ** 2 + k[None, None, :] ** 2) < 15**2)
    assert np.linalg.norm((a - b)[shell]) < 0.02 * np.linalg.norm(b[shell])


def test_hydrogens_waters_and_alternatives_go(tmp_path):
    lines = [
        ATOM.format(n=1, name="CA", chain="A", res=1, x=0, y=0, z=0, el="C"),
        ATOM.format(n=2, name="HA", chain="A", res=1, x=1, y=0, z=0, el="H"),
        ATOM.format(n=3, name="CB", chain="A", res=1, x=0, y=1, z=0, el="C").replace("CB  ALA", "CB AALA"),
        ATOM.format(n=4, name="CB", chain="A", res=1, x=0, y=2, z=0, el="C").replace("CB  ALA", "CB BALA"),
        ATOM.format(n=5, name="O", chain="A", res=2, x=9, y=9, z=9, el="O")
        .replace("ALA", "HOH")
        .replace("ATOM  ", "HETATM"),
    ]
    path = tmp_path / "a.pdb"
    path.write_text("\n".join([*lines, "END", ""]))
    xyz, mass = positions(read_model(path))
    np.testing.assert_allclose(xyz, [[0, 0, 0], [0, 1, 0]])
    np.testing.assert_allclose(mass, 12.011, rtol=1e-3)


def test_the_centre_of_mass_comes_to_the_centre(shared):
    m = model_to_map(shared / "data/models/ha/6wxb.pdb.gz", 64, 3.5, 15.0)
    axis = np.arange(64) - 32
    for k in range(3):
        profile = m.data.sum(tuple(a for a in range(3) if a != k), dtype=float)
        assert abs((profile * axis).sum() / profile.sum()) < 0.1
    assert m.data.dtype == np.float32 and m.pixel_size_A == 3.5


@pytest.mark.parametrize(
    ("name", "symmetry", "pixel"),
    [
        ("ha/6wxb.pdb.gz", "C3", 4.0),
        ("ha/1ti8.pdb.gz", "C3", 4.0),
        ("8bk7.cif.gz", "D2", 4.5),
        ("7a4m.cif.gz", "O", 4.0),
    ],
)
def test_models_turn_into_the_frame_of_their_symmetry(shared, name, symmetry, pixel):
    """1ti8 and 7a4m have one protomer in the file: the biological assembly is built first."""
    m = model_to_map(shared / "data/models" / name, 48, pixel, 15.0, align_symmetry_axis=symmetry)
    centre = np.full(3, 24)
    for operator in point_group(symmetry)[1:]:
        flipped = operator[::-1, ::-1]  # (x, y, z) to (z, y, x)
        copy = affine_transform(m.data.astype(float), flipped, centre - flipped @ centre, order=3)
        assert np.corrcoef(copy.ravel(), m.data.ravel())[0, 1] > 0.998


def test_assemblies(shared):
    path = shared / "data/models/ha/1ti8.pdb.gz"
    one, three = (positions(read_model(path, a))[0] for a in ("none", "auto"))
    assert len(three) == 3 * len(one)
    with raises_code("assembly-unavailable", InputError):
        read_model(path, "77")


def test_a_model_without_that_symmetry_is_refused(shared):
    with raises_code("symmetry-mismatch", InputError, match="do not have the symmetry C5"):
        model_to_map(shared / "data/models/ha/6wxb.pdb.gz", 64, 3.5, 15.0, align_symmetry_axis="C5")


def test_a_model_larger_than_the_box_says_how_large_it_must_be(shared):
    with raises_code("model-exceeds-box", InputError, match=r"does not fit.*expected at least \d+ px.*found 32 px"):
        model_to_map(shared / "data/models/ha/6wxb.pdb.gz", 32, 2.0, 10.0)


@pytest.mark.parametrize("content", [b"", b"hello\n", b"\x00\x01\x02" * 100, b"data_x\nloop_\n_a\n", b"\x1f\x8bjunk"])
@pytest.mark.parametrize("suffix", [".pdb", ".cif", ".pdb.gz"])
def test_unreadable_models_are_named(tmp_path, content, suffix):
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(content)
    with raises_code("model-malformed", InputError, match=r"bad\.") as caught:
        model_to_map(path, 32, 2.0, 10.0)
    assert caught.value.exit_code == 65


def test_a_missing_model_and_names_of_models(tmp_path):
    with raises_code("file-not-found", InputError):
        read_model(tmp_path / "gone.pdb")
    assert is_model("a.CIF.gz") and is_model("b.pdb") and not is_model("c.mrc")
