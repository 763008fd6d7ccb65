"""What is no pair of half-maps is refused, what is an odd one is said, and a right one passes without a word."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from errors_helper import raises_code
from pipeline_helper import cryoiso_here

from cryoiso.core.config import CorrectSection, RealignSection
from cryoiso.core.errors import InputError
from cryoiso.core.protocols import HalfMaps
from cryoiso.io.mrc import read_map, write_map
from cryoiso.methods.assess.measure import diagnose
from cryoiso.methods.misalignment.correction import MapCorrection
from cryoiso.metrics.half_maps import DARK, check_half_maps, tail_asymmetry
from cryoiso.parallel.context import Context
from cryoiso.physics.filters import apply_radial, lowpass
from cryoiso.physics.masks import sphere_mask
from cryoiso.physics.phantom import phantom_map
from cryoiso.pipeline.inputs.grids import read_mask
from cryoiso.pipeline.inputs.map_pairs import read_half_maps
from cryoiso.pipeline.stages.correct import CorrectionFiles, correct_files

BOX, PIXEL_A = 32, 6.0
SHARED = Path(__file__).parents[3] / "shared" / "data"


def halves(noise: float = 0.4, box: int = BOX) -> list[np.ndarray]:
    truth = np.asarray(phantom_map(box, PIXEL_A * BOX / box, 13.0).data, np.float32)
    rng = np.random.default_rng(1)
    return [truth + noise * truth.std() * rng.normal(size=truth.shape).astype(np.float32) for _ in (1, 2)]


def sharpened(half: np.ndarray, b: float = 6.0) -> np.ndarray:
    """The map with its amplitudes raised towards high resolution, by a factor of exp(b/4) at Nyquist's frequency."""
    return apply_radial(half, np.exp(b * (np.arange(BOX // 2 + 1) / BOX) ** 2))


@pytest.mark.parametrize("noise", [0.05, 0.4, 1.5])
def test_half_maps_pass_without_a_word(noise):
    found = check_half_maps(*halves(noise))
    assert [words for words in found if "too well" not in words] == [] and (noise == 0.05 or found == [])


def test_so_does_noise():
    rng = np.random.default_rng(2)
    assert check_half_maps(*rng.normal(size=(2, BOX, BOX, BOX))) == []


ONE, TWO = halves()
REFUSED = {
    "the same": (ONE, ONE, r"are the same map \("),
    "the same in float16": (ONE, ONE.astype(np.float16), "are the same map"),
    "scaled and shifted": (ONE, 1000 * ONE + 5, "the same map, scaled or shifted by a constant"),
    "the same inverted": (ONE, -ONE, "the same map, inverted"),
    "the same sharpened": (ONE, sharpened(ONE), "the same map, filtered or sharpened"),
    "the same low-passed": (ONE, np.asarray(lowpass(ONE, PIXEL_A, 25.0)), "the same map, filtered or sharpened"),
    "one inverted": (ONE, -TWO, "one half-map is inverted"),
    "one constant": (ONE, 0 * ONE + 3, r"constant .*found 3 in every voxel"),
    "both zero": (0 * ONE, 0 * ONE, "constant"),
    "not a number": (ONE, np.where(TWO.max() == TWO, np.nan, TWO), "NaN or infinite .found 1 of"),
    "bytes swapped": (ONE, np.nan_to_num(TWO.byteswap(), nan=0, posinf=0, neginf=0), "order"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_pair_is_refused(name):
    one, two, words = REFUSED[name]
    with pytest.raises(InputError, match=words):
        check_half_maps(one, two, ("a.mrc", "b.mrc"))


MASK = sphere_mask(BOX, 8, 3).numpy()
LEVEL = 0.1 * float(ONE.std())
SAID = {
    "both inverted": ([-ONE, -TWO], ["protein seems to be dark"]),
    "hardly any noise": (halves(0.02), ["agree up to Nyquist's frequency (FSC 0.9"]),
    "low-passed": ([np.asarray(lowpass(h, PIXEL_A, 25.0)) for h in (ONE, TWO)], ["no power beyond shell 9 of 16"] * 2),
    "masked": ([ONE * MASK, TWO * MASK], ["is masked already (52 %"] * 2),
    "masked to a constant": ([h * MASK + LEVEL * (1 - MASK) for h in (ONE, TWO)], ["is masked already (52 %"] * 2),
    "one sharpened": ([ONE, sharpened(TWO)], ["the spectra of the half-maps differ"]),
    "another grey scale": ([ONE, 1000 * TWO], ["different grey scales (a factor of 1e+03)"]),
    "moved": ([ONE, np.roll(TWO, (2, -3), (0, 2))], ["moved by (3, 0, -2) px"]),
}


@pytest.mark.parametrize("name", SAID)
def test_what_is_odd_is_said(name):
    pair, expected = SAID[name]
    found = check_half_maps(*pair)
    assert len(found) == len(expected)
    assert all(words in one for words, one in zip(expected, found, strict=True)), found


def test_real_maps_are_white_also_in_noise_and_dark_when_inverted():
    folder = SHARED / "maps"
    if not folder.is_dir():
        pytest.skip(f"no real maps in {folder}")
    rng = np.random.default_rng(0)
    for name in (
        "betagal_relion_tutorial_3.54A_100.mrc", "emd_1832_5.7A_64.map", "emd_6824_2.64A_70.mrc",
        "aspire_clean70S_65.mrc", "gorgon_rotavirus_vp6_1.23A_96.mrc", "format/cryodrgn_hand-vol_64.mrc",
    ):  # fmt: skip
        data = read_map(folder / name, 3.0).data
        for amount in (0, 1, 3):
            noisy = data + amount * data.std() * rng.normal(size=data.shape).astype(np.float32)
            for sign in (1, -1):
                asymmetry, skewness = tail_asymmetry(sign * noisy)
                assert sign * asymmetry > -DARK and sign * skewness > 0.5, (name, amount, sign, asymmetry, skewness)


@pytest.fixture
def files(tmp_path) -> list[Path]:
    paths = [tmp_path / f"half{half}.mrc" for half in (1, 2)]
    for path, data in zip(paths, (ONE, TWO), strict=True):
        write_map(path, data, PIXEL_A)
    return paths


def test_grids_of_one_reconstruction_are_equal(files, tmp_path, caplog):
    assert read_half_maps(*files)[2] == []
    write_map(tmp_path / "pixel.mrc", TWO, 1.005 * PIXEL_A)
    with pytest.raises(InputError, match=r"different pixel sizes .expected 6 Å as in .*found 6\.03 Å"):
        read_half_maps(files[0], tmp_path / "pixel.mrc")
    assert read_half_maps(files[0], tmp_path / "pixel.mrc", PIXEL_A)[2] == []
    write_map(tmp_path / "origin.mrc", TWO, PIXEL_A, (12.0, 0.0, 0.0))
    assert "origins 12 Å apart" in read_half_maps(files[0], tmp_path / "origin.mrc")[2][0]
    assert "origins 12 Å apart" in caplog.text


@pytest.mark.parametrize("command", ["diagnose", "correct"])
@pytest.mark.parametrize("more", [[], ["--mode", "independent"]])
def test_commands_refuse_one_map_given_twice_and_leave_nothing(command, more, files, tmp_path):
    if command == "diagnose" and more:
        return
    out = tmp_path / "out"
    done = cryoiso_here(command, files[0], files[0], *more, "--out", out)
    assert done.returncode == 65 and "[half-maps-identical]" in done.stderr and str(files[0]) in done.stderr
    assert not out.exists() or list(out.iterdir()) == []


def test_diagnose_notes_what_is_odd(tmp_path):
    for half, data in ((1, -ONE), (2, -TWO)):
        write_map(tmp_path / f"dark{half}.mrc", data, PIXEL_A)
    done = cryoiso_here("diagnose", tmp_path / "dark1.mrc", tmp_path / "dark2.mrc", "--out", tmp_path / "d.json")
    assert done.returncode == 0 and "Protein seems to be dark in both half-maps" in done.stdout


def test_correct_says_what_is_odd(files, tmp_path, caplog):
    write_map(files[1], 1000 * TWO, PIXEL_A)
    section = CorrectSection(cube_px=16, sub_maps=2, batch=2, epochs=0)
    correct_files(CorrectionFiles(dict(zip((1, 2), files, strict=True)), tmp_path / "out", section), Context())
    assert "different grey scales" in caplog.text


def test_the_correction_in_a_refinement_refuses_one_map_twice(tmp_path):
    """RELION's callback, the native engine and `realign` all come here."""

    def state(two: np.ndarray) -> HalfMaps:
        maps = {1: ONE, 2: two}
        return HalfMaps(1, maps, maps, PIXEL_A, np.ones(BOX // 2 + 1), 20.0, 3.7, tmp_path, MASK)

    correction = MapCorrection(RealignSection(correct=False), CorrectSection())
    assert set(correction(state(TWO), Context())[0]) == {1, 2}
    with raises_code("half-maps-identical", InputError):
        correction(state(ONE), Context())


GOOD = sphere_mask(BOX, 11, 3).numpy()


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (1 - GOOD, "the mask is inverted .expected the particle inside, found 1.00 in the corners of the box, 0.42"),
        (0 * GOOD, "the mask is empty .expected 1 inside the particle, found 0 everywhere"),
        (0.3 * GOOD, "maximum of the mask is only 0.3"),
        (GOOD - 0.2, "not between 0 and 1"),
        (255 * GOOD, "not between 0 and 1 .found 0 to 255"),
        (np.where(GOOD > 0.99, np.nan, GOOD), "NaN"),
    ],
)
def test_masks_that_are_none_are_refused(mask, words, tmp_path):
    write_map(tmp_path / "mask.mrc", mask, PIXEL_A)
    with pytest.raises(InputError, match=words):
        read_mask(tmp_path / "mask.mrc", BOX, PIXEL_A)


@pytest.mark.parametrize(("pixel_A", "said"), [(PIXEL_A, False), (1.0, False), (7.0, True)])
def test_a_mask_of_another_pixel_size_is_said(pixel_A, said, tmp_path, caplog):
    """1 Å is what programs write that do not know the pixel size."""
    write_map(tmp_path / "mask.mrc", GOOD, pixel_A)
    assert np.array_equal(read_mask(tmp_path / "mask.mrc", BOX, PIXEL_A).data, GOOD)
    assert ("has a pixel size of 7 Å in its header" in caplog.text) == said


def test_masks_that_hold_everything_or_a_part_are_taken(tmp_path):
    for name, mask in (("ones", np.ones_like(GOOD)), ("moved", np.roll(sphere_mask(BOX, 5, 2).numpy(), 8, 0))):
        write_map(tmp_path / f"{name}.mrc", mask, PIXEL_A)
        assert np.array_equal(read_mask(tmp_path / f"{name}.mrc", BOX, PIXEL_A).data, mask)


@pytest.mark.parametrize(("shift_px", "percent"), [(0, None), (8, True)])
def test_a_mask_beside_the_particle_is_said(shift_px, percent):
    """A part may be meant, so it is a note."""
    notes = diagnose(ONE, TWO, np.roll(MASK, shift_px, 2), PIXEL_A, None)["notes"]
    assert any("of the density that stands out" in words for words in notes) == bool(percent)
