"""Maps from RELION's external-reconstruct arrays against RELION's own program."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from relion_helper import write_task

from cryoiso.core.errors import InputError
from cryoiso.engines.relion.external import read_arrays, read_task, reconstruct, uses_iterations
from cryoiso.io.mrc import read_map, read_raw_map, write_map

SIZES = [(24, 2, 24), (24, 2, 16), (21, 2, 18), (27, 2, 26), (20, 2, 20), (20, 3, 14), (24, 1, 24), (21, 1, 16)]


@pytest.mark.relion
@pytest.mark.parametrize("box, padding, current", SIZES)
@pytest.mark.parametrize("regularised", [True, False])
@pytest.mark.parametrize("iterative", [True, False])
def test_maps_are_those_of_relion_external_reconstruct(tmp_path, box, padding, current, regularised, iterative):
    """Both divisions, with the prior and without, even and odd boxes: to the precision of the files (float32)."""
    star = write_task(tmp_path, box, padding, current)
    words = [[], ["--skip_gridding"]][not iterative] + [[], ["--no_map"]][not regularised]
    subprocess.run(
        ["relion_external_reconstruct", star.name, "--o", "theirs.mrc", *words], cwd=tmp_path, check=True,
        capture_output=True,
    )  # fmt: skip
    theirs = np.array(read_raw_map(tmp_path / "theirs.mrc")[0], np.float64)
    task = read_task(star, tmp_path)
    ours = reconstruct(task, read_arrays(task), regularised=regularised, iterative=iterative).double().numpy()
    assert np.abs(theirs).max() > 0.1
    assert np.abs(ours - theirs).max() < 1e-6 * np.abs(theirs).max()


@pytest.mark.relion
def test_a_prior_of_zero_and_half_shells_are_rounded_as_relion_does(tmp_path):
    """With padding 2 every odd radius lies between two shells; shells without a prior get a thousandth."""
    star = write_task(tmp_path, 24, 2, 24, seed=3)
    star.write_text(re.sub(r"\n6 \S+ ", "\n6 0.0 ", star.read_text()))
    subprocess.run(
        ["relion_external_reconstruct", star.name, "--o", "theirs.mrc", "--skip_gridding"], cwd=tmp_path, check=True,
        capture_output=True,
    )  # fmt: skip
    theirs = np.array(read_raw_map(tmp_path / "theirs.mrc")[0], np.float64)
    task = read_task(star, tmp_path)
    assert task.tau2[6] == 0
    ours = reconstruct(task, read_arrays(task), regularised=True, iterative=False).double().numpy()
    assert np.abs(ours - theirs).max() < 1e-6 * np.abs(theirs).max()


def test_the_unregularised_map_is_the_object(tmp_path):
    """No oracle but the truth: what was put into the arrays comes out, on its grey scale and in its place."""
    star = write_task(tmp_path, 24, 2, 24, seed=5)
    task = read_task(star, tmp_path)
    ours = reconstruct(task, read_arrays(task), regularised=False, iterative=False).numpy()
    z, y, x = np.indices((24,) * 3) - 12
    radius = np.sqrt(z**2 + y**2 + x**2)
    blob = np.exp(-(z**2 / 3 + y**2 / 8 + x**2 / 5) / 2) / 24 * 24  # data are 2D transforms: a factor D in and out
    inside = radius < 9
    flat = (ours * np.sinc(radius / 48) ** 2)[inside]
    slope = np.polyfit(blob[inside], flat, 1)[0]
    assert np.corrcoef(blob[inside], flat)[0, 1] > 0.95 and slope == pytest.approx(1.0, rel=0.05)


def test_subtomograms_are_scaled_by_their_own_transforms(tmp_path):
    task = read_task(write_task(tmp_path, 20, 2, 20), tmp_path)
    arrays = read_arrays(task)
    images = reconstruct(task, arrays, regularised=False, iterative=False)
    volumes = reconstruct(task, arrays, regularised=False, iterative=False, dimensions=3)
    np.testing.assert_allclose(volumes, 20 * images, rtol=1e-5, atol=1e-7)


def test_the_task_says_what_relion_wrote(tmp_path):
    task = read_task(write_task(tmp_path, 20, 2, 14), tmp_path)
    assert (task.box_px, task.padding, task.current_px, task.pixel_size_A) == (20, 2.0, 14, None)
    assert (task.name.iteration, task.name.half) == (3, 1)
    assert task.tau2[1] == pytest.approx(1.5 * 0.05 / 4) and len(task.fsc) == 11
    text = task.star.read_text().replace("_rlnCurrentImageSize 14", "_rlnCurrentImageSize 14\n_rlnPixelSize 1.25")
    task.star.write_text(text)
    assert read_task(task.star, tmp_path).pixel_size_A == 1.25  # RELION 5


def damage(folder, star, what):
    weight = folder / star.name.replace(".star", "_weight.mrc")
    if what == "missing":
        weight.unlink()
    elif what == "truncated":
        weight.write_bytes(weight.read_bytes()[:-100])
    elif what == "size":
        write_map(weight, np.zeros((40, 40, 20), np.float32), 1.0)
    elif what == "nan":
        values = read_raw_map(weight)[0].copy()
        values[1, 2, 3] = np.nan
        write_map(weight, values, 1.0)
    elif what == "shells":
        star.write_text(star.read_text().replace("\n10 ", "\n#10 "))
    else:
        star.write_text(star.read_text().replace("_rlnPaddingFactor", "_rlnPadding"))


@pytest.mark.parametrize("what", ["missing", "truncated", "size", "nan", "shells", "column"])
def test_damaged_arrays_are_named(tmp_path, what):
    star = write_task(tmp_path, 20, 2, 20)
    damage(tmp_path, star, what)
    with pytest.raises(InputError, match="run_it003_half1_class001_external_reconstruct"):
        read_arrays(read_task(star, tmp_path))


def test_versions_that_divide_by_iterated_weights():
    assert uses_iterations("3.1.3") and uses_iterations("")
    assert not uses_iterations("4.0.1") and not uses_iterations("5.0.1-commit-1a2b3c")


def test_other_shells_than_ours_do_not_matter(tmp_path):
    """The array's own size counts, also where RELION wrote data beyond what it declares."""
    star = write_task(tmp_path, 20, 2, 20)
    task = read_task(star, tmp_path)
    small = replace(task, current_px=12)
    arrays = read_arrays(small)
    assert arrays.weight.shape == (27, 27, 14) and float(arrays.weight[arrays.radius >= 12].abs().sum()) == 0


@pytest.mark.relion
def test_alone_with_one_half_and_no_correction(tmp_path):
    """The hook as RELION's program: the same file as relion_external_reconstruct makes, and the arrays are gone."""
    from cryoiso.engines.relion.callback_standalone import reconstruct_alone

    star = write_task(tmp_path, 24, 2, 20)
    text = star.read_text().replace("_rlnCurrentImageSize 20", "_rlnCurrentImageSize 20\n_rlnPixelSize 1.25")
    star.write_text(text)
    subprocess.run(
        ["relion_external_reconstruct", star.name, "--o", "theirs.mrc"], cwd=tmp_path, check=True, capture_output=True
    )
    assert reconstruct_alone(star, tmp_path, None) == {"applied": False}
    theirs = np.array(read_raw_map(tmp_path / "theirs.mrc")[0], np.float64)
    ours = read_map(tmp_path / f"{star.stem}.mrc")
    assert ours.pixel_size_A == pytest.approx(1.25)
    assert np.abs(ours.data - theirs).max() < 1e-6 * np.abs(theirs).max()
    assert not list(tmp_path.glob("*_weight.mrc"))
