"""The command ``ctf-refine`` on files: what comes out, what is refused, and that ranks do not matter."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ctf_refine_helper import RESOLUTION_A, WrongSet, rms
from mpi_helper import run_mpi
from pipeline_helper import cryoiso_here

from cryoiso.core.errors import EXIT_INPUT, EXIT_USAGE
from cryoiso.core.types import DensityMap
from cryoiso.io.mrc import write_map
from cryoiso.io.star.read import read_particles
from cryoiso.io.star.text import StarBlock, read_blocks, write_blocks
from cryoiso.physics.nuisances.settings import Micrographs, Nuisances, Optics
from cryoiso.physics.phantom import phantom_map

N = 200
NAMES = ("particles.star", "ctf_refine.json", "ctf_refine.png")


@pytest.fixture(scope="module")
def wrong() -> WrongSet:
    made = phantom_map(80, 1.9, 4.0)
    nuisances = Nuisances(
        micrographs=Micrographs(2, defocus=True, stage_tilt_deg=20.0, defocus_error_sd_A=50.0),
        optics=Optics(1, (1.0, 0.5)),
    )
    return WrongSet(DensityMap(made.data * np.float32(2.5), 1.9), N, nuisances)


@pytest.fixture(scope="module")
def files(wrong, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ctf")
    star = wrong.write(folder)
    blocks = read_blocks(star)
    blocks[-1].columns["rlnSomething"] = [f"text{i}" for i in range(N)]
    write_blocks(star, blocks)
    return folder


def options(folder: Path, out: Path) -> list[object]:
    return [
        "ctf-refine", folder / "given.star", "--ref", folder / "map.mrc", "--resolution", RESOLUTION_A,
        "--micrographs", "defocus", "--beam-tilt", "tilt", "--invert", "no", "--control", 50, "--out", out,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def result(files) -> Path:
    done = cryoiso_here(*options(files, files / "out"))
    assert done.returncode == 0, done.stderr
    assert "beam tilt of optics group 1" in done.stdout and "tilt that 2 micrographs share" in done.stdout
    return files / "out"


def test_all_columns_are_kept_and_the_ctf_is_better(files, result, wrong):
    assert sorted(p.name for p in result.iterdir()) == sorted(NAMES)
    before, after = (read_blocks(p)[-1].columns for p in (files / "given.star", result / "particles.star"))
    changed = {"rlnDefocusU", "rlnDefocusV"}
    for name in set(before) - changed:
        assert after[name] == before[name], name
    assert set(after) - set(before) == {"cryoisoDefocusChange", "cryoisoDefocusError"}
    refined = read_particles(result / "particles.star")
    assert rms(wrong.error_A(refined)) < 0.4 * rms(wrong.error_A(wrong.given))
    fit = json.loads((result / "ctf_refine.json").read_text())["optics_groups"]["1"][-1]
    assert fit["tilt_mrad"] == pytest.approx(list(refined.groups[0].beam_tilt_mrad))
    np.testing.assert_allclose(fit["tilt_mrad"], (1.0, 0.5), atol=4 * max(fit["tilt_error_mrad"]))


def test_facts_and_figure(result):
    facts = json.loads((result / "ctf_refine.json").read_text())
    assert facts["particles"]["count"] == N and facts["particles"]["log_likelihood_gain"] > 0
    assert facts["particles"]["prior"] == "estimated"
    assert [row["particles"] for row in facts["micrographs"]] == [N // 2, N // 2]
    assert facts["tilt_plane"]["median_tilt_deg"] == pytest.approx(20, abs=3)
    assert abs(facts["control"]["mean_change_A"]) <= 4 * facts["control"]["mean_error_A"] + 1e-9
    assert (result / "ctf_refine.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.mpi
def test_ranks_write_the_same_files(files, result, tmp_path):
    command = ["-m", "cryoiso.cli.main", *map(str, options(files, tmp_path / "out"))]
    run_mpi(2, command, 300)
    for name in NAMES:
        assert (tmp_path / "out" / name).read_bytes() == (result / name).read_bytes(), name


def refused(folder: Path, *arguments: object, code: int) -> str:
    """The message of a command that must fail without leaving anything."""
    out = folder / "refused"
    done = cryoiso_here("ctf-refine", *arguments, "--invert", "no", "--out", out)
    assert done.returncode == code, done.stderr
    assert not out.exists(), "nothing half-written"
    return done.stderr


def test_usage(files):
    star = files / "given.star"
    ref = ("--ref", files / "map.mrc")
    assert "--half1 and --half2" in refused(files, star, code=EXIT_USAGE)
    assert "--half1 and --half2" in refused(files, star, "--half1", files / "map.mrc", code=EXIT_USAGE)
    assert "--resolution" in refused(files, star, *ref, code=EXIT_USAGE)
    ref = (*ref, "--resolution", 4)
    assert "--range" in refused(files, star, *ref, "--range", 0, code=EXIT_USAGE)
    assert "nothing to refine" in refused(files, star, *ref, "--no-per-particle", code=EXIT_USAGE)
    shutil.copy(star, files / "particles.star")
    done = cryoiso_here("ctf-refine", files / "particles.star", *ref, "--out", files)
    assert done.returncode == EXIT_USAGE and "overwrite" in done.stderr


def without(files: Path, *columns: str) -> Path:
    blocks = read_blocks(files / "given.star")
    kept = {k: v for k, v in blocks[-1].columns.items() if k not in columns}
    write_blocks(files / "cut.star", [*blocks[:-1], StarBlock(blocks[-1].name, True, kept)])
    return files / "cut.star"


def test_particles_that_lack_something(files):
    ref = ("--ref", files / "map.mrc", "--resolution", 4)
    assert "_rlnAngleRot" in refused(files, without(files, "rlnAngleRot"), *ref, code=EXIT_INPUT)
    assert "rlnDefocusU" in refused(files, without(files, "rlnDefocusU"), *ref, code=EXIT_INPUT)
    unnamed = without(files, "rlnMicrographName")
    assert "rlnMicrographName" in refused(files, unnamed, *ref, "--micrographs", "defocus", code=EXIT_INPUT)


def test_half_maps_that_do_not_fit(files, wrong):
    rng = np.random.default_rng(1)
    noisy = [wrong.volume.data + rng.normal(0, 1e-3, wrong.volume.data.shape).astype(np.float32) for _ in range(2)]
    pair = [files / "one.mrc", files / "two.mrc"]
    for path, data in zip(pair, noisy, strict=True):
        write_map(path, data, 1.9)
    both = ("--half1", pair[0], "--half2", pair[1])
    assert "rlnRandomSubset" in refused(files, without(files, "rlnRandomSubset"), *both, code=EXIT_INPUT)
    write_map(pair[1], noisy[1][:78, :78, :78].copy(), 1.9)
    assert "another grid" in refused(files, files / "given.star", *both, code=EXIT_INPUT)
    write_map(pair[0], noisy[0][:78, :78, :78].copy(), 1.9)
    assert "another grid than the particles" in refused(files, files / "given.star", *both, code=EXIT_INPUT)


def test_images_that_the_ctf_was_applied_to(files, wrong, tmp_path):
    star = wrong.write(tmp_path, replace(wrong.given.with_ctf_applied("premultiplied")))
    ref = ("--ref", tmp_path / "map.mrc", "--resolution", 4)
    assert "premultiplied" in refused(tmp_path, star, *ref, code=EXIT_INPUT)


def test_odd_zernike_terms_of_the_source_are_replaced(wrong, tmp_path):
    """A column that is there already must not hide new coefficients."""
    group = replace(wrong.given.groups[0], odd_zernike=(0.0, 0.0, 1.0, 0.0, 0.0, 2.0))
    star = wrong.write(tmp_path, replace(wrong.given, groups=(group,)))
    read = read_particles(star)
    from cryoiso.io.star.write import write_particles

    write_particles(tmp_path / "same.star", read)
    assert read_blocks(tmp_path / "same.star")[0].columns["rlnOddZernike"] == ["[0,0,1,0,0,2]"]
    new = (0.5, 0.0, -1.0, 0.0, 0.0, 2.5)
    write_particles(tmp_path / "new.star", replace(read, groups=(replace(read.groups[0], odd_zernike=new),)))
    assert read_particles(tmp_path / "new.star").groups[0].odd_zernike == new
