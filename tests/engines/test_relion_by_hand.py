"""RELION that a user starts: files of a continued run, classes, and the stand-in's files against RELION's own."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from errors_helper import raises_code
from relion_helper import HOOK, open_mpi, write_task
from relion_rules import Rules
from relion_standin import write_program

from cryoiso.core.errors import CryoisoError
from cryoiso.engines.process import clean_environment
from cryoiso.engines.relion.callback_standalone import reconstruct_alone
from cryoiso.engines.relion.external import read_arrays, read_task, reconstruct
from cryoiso.engines.relion.install import find_relion
from cryoiso.io.mrc import read_map
from cryoiso.io.star.text import StarBlock, read_blocks

VERSIONS = ("3.1.3", "4.0.1", "4.0.2", "5.0.1")
OPTIONS = shlex.split(
    "--auto_refine --split_random_halves --i particles.star --ref truth_map.mrc --ini_high 40 --ctf "
    "--particle_diameter 140 --flatten_solvent --zero_mask --sym C3 --healpix_order 1 --oversampling 1 "
    "--offset_range 2 --offset_step 1 --low_resol_join_halves 40 --norm --scale --pad 2 --random_seed 1"
)
CONTINUED = ["--j", "1", "--pool", "10", "--dont_combine_weights_via_disc", "--preread_images"]


@pytest.fixture
def folder(data, tmp_path, monkeypatch) -> Path:
    """A working folder with particles and reference."""
    made = tmp_path / "work"
    shutil.copytree(data, made)
    monkeypatch.chdir(made)
    return made


def callback(folder: Path) -> str:
    """A program that returns the reference unchanged, and notes what it was called with."""
    script = folder / "callback.sh"
    script.write_text('cp truth_map.mrc "${1%.star}.mrc"\necho "$1" >> called\n')
    return f"sh {script}"


def called(folder: Path) -> list[str]:
    """Outputs that RELION wanted reconstructed, in order."""
    lines = (folder / "called").read_text().split() if (folder / "called").exists() else []
    return [line.removeprefix("./").removesuffix("_external_reconstruct.star") for line in lines]


def start(command: list[str], hook: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = clean_environment({"RELION_EXTERNAL_RECONSTRUCT_EXECUTABLE": hook})
    return subprocess.run(
        [*command, *words, *CONTINUED], env=environment, capture_output=True, text=True, timeout=120
    )  # fmt: skip


BEGIN = ["--o", "./run", *OPTIONS, "--external_reconstruct", "--auto_iter_max", "1"]
FINISH = [
    "--continue", "run_it001_optimiser.star", "--o", "./run", "--external_reconstruct", "--force_converge",
    "--auto_iter_max", "2",
]  # fmt: skip
"""A second iteration, which joins the halves."""


def refine(command: list[str], hook: str, *steps: list[str]) -> None:
    for words in steps:
        done = start(command, hook, *words)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.parametrize("version", VERSIONS)
def test_who_is_called_for_and_what_a_continued_run_keeps(folder, version):
    rules, program = Rules(version), [write_program(folder, version)]
    refine(program, callback(folder), BEGIN)
    assert sorted(called(folder)) == ["run_it001_half1_class001", "run_it001_half2_class001"]
    Path("called").unlink()
    other = ["--continue", "run_it001_optimiser.star", "--auto_iter_max", "2", "--o", "run_ct1"]
    refine(program, callback(folder), other)
    assert Path("run_ct1_it002_optimiser.star").exists() and not Path("run_it002_optimiser.star").exists()
    assert len(called(folder)) == (0 if rules.forgets else 2)
    Path("called").unlink(missing_ok=True)
    refine(program, callback(folder), FINISH)
    assert called(folder) == ["run_it002_class001"], "the joined reconstruction has a number, and no half"
    assert Path("run_optimiser.star").exists() == rules.ends_with_optimiser
    refused = start(program, callback(folder), *FINISH)
    assert refused.returncode == 1 and "rlnModelStarFile2" in refused.stderr


@pytest.mark.parametrize("ranks, words", [("2", "at least 3"), ("4", "an odd number")])
def test_half_sets_need_an_odd_number_of_processes(folder, monkeypatch, ranks, words):
    monkeypatch.setenv("RANKS", ranks)
    done = start([write_program(folder)], "false", "--o", "run", *OPTIONS, "--auto_iter_max", "1")
    assert done.returncode == 1 and words in done.stderr


# --- what a callback finds in the files of the iteration before


class Watching:
    """A correction that keeps what it was shown."""

    state = None

    def wants(self, state):
        self.state = state
        return False

    def why_not(self, state):
        return "it only watches"


def tasks(folder: Path, root: str, iteration: int = 3) -> list[Path]:
    """The files of both halves' calls in an iteration."""
    made = []
    for half in (1, 2):
        star = write_task(folder, 24, 1, 24, half=half, seed=half)
        text = star.read_text()
        for file in folder.glob(f"run_it003_half{half}*external_reconstruct*"):
            file.rename(file.with_name(file.name.replace("run_it003", f"{root}_it{iteration:03d}")))
        made.append(star.with_name(star.name.replace("run_it003", f"{root}_it{iteration:03d}")))
        made[-1].write_text(text.replace("run_it003", f"{root}_it{iteration:03d}"))
    return made


def both_halves(stars: list[Path], correction: Watching) -> None:
    """As RELION's two processes call; raises what half 1 ran into."""
    errors: dict[int, Exception] = {}

    def one(half: int) -> None:
        try:
            reconstruct_alone(Path(stars[half - 1].name), Path(), correction, limit_s=20.0)
        except CryoisoError as error:
            errors[half] = error

    threads = [threading.Thread(target=one, args=(half,)) for half in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if 1 in errors:
        raise errors[1]


@pytest.mark.parametrize("version", ["3.1.3", "5.0.1"])
@pytest.mark.parametrize("root", ["run", "run_ct2", "run_ct1_ct2", "another"])
def test_a_continued_run_finds_sampling_and_first_references(folder, version, root):
    """--continue takes another name, most often run_ct2, under which the iterations before are not."""
    assert start([write_program(folder, version)], "", "--o", "run", *OPTIONS, "--auto_iter_max", "2").returncode == 0
    watching = Watching()
    both_halves(tasks(folder, root), watching)
    assert watching.state is not None and watching.state.step_deg == 7.5 and watching.state.pixel_size_A == 7.0
    np.testing.assert_array_equal(watching.state.initial[2], read_map("run_it000_half2_class001.mrc").data)


def test_a_correction_without_the_sampling_is_refused(folder):
    """Two runs have that iteration, and neither has the name: what would be corrected is anybody's guess."""
    program = [write_program(folder)]
    for root in ("one", "two"):
        assert start(program, "", "--o", root, *OPTIONS, "--auto_iter_max", "2").returncode == 0
    stars = tasks(folder, "run")
    text = stars[0].read_text().replace("_rlnCurrentImageSize 24", "_rlnCurrentImageSize 24\n_rlnPixelSize 7.0")
    stars[0].write_text(text)
    with raises_code("relion-file-invalid", CryoisoError, match="sampling of the iteration before is not known"):
        reconstruct_alone(Path(stars[0].name), Path(), Watching())
    assert reconstruct_alone(Path(stars[0].name), Path(), None) == {"applied": False}


@pytest.mark.parametrize("version", ["3.1.3", "5.0.1"])
def test_classes_are_divided_as_their_version_does_and_never_corrected(folder, version):
    """Without half-sets RELION calls once for each class; version 3 iterates the weights, version 5 does not."""
    program, hook = [write_program(folder, version)], callback(folder)
    words = [word for word in OPTIONS if word not in ("--auto_refine", "--split_random_halves")]
    done = start(program, hook, "--o", "run", *words, "--iter", "2", "--K", "2", "--external_reconstruct")
    assert done.returncode == 0, done.stderr
    names = [f"run_it{iteration:03d}_class{number:03d}" for iteration in (1, 2) for number in (1, 2)]
    assert sorted(called(folder)) == names
    star = write_task(folder, 24, 1, 24)
    for file in folder.glob("run_it003_half1*"):
        file.rename(file.with_name(file.name.replace("half1_class001", "class002")))
    star = star.with_name(star.name.replace("half1_class001", "class002"))
    star.write_text(star.read_text().replace("half1_class001", "class002"))
    task = read_task(star, folder)
    with raises_code("relion-file-invalid", CryoisoError, match=r"half-sets only"):
        reconstruct_alone(Path(star.name), Path(), Watching())
    wanted = reconstruct(task, read_arrays(task), regularised=True, iterative=version < "4").numpy()
    reconstruct_alone(Path(star.name), Path(), None)
    np.testing.assert_allclose(read_map(task.result).data, wanted, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.slow
def test_halves_one_after_the_other_do_without_a_correction(folder):
    """cryoiso hook relion without a job file reconstructs each half by itself."""
    done = start([write_program(folder)], shlex.join(HOOK), "--o", "run", *OPTIONS, "--external_reconstruct",
                 "--sequential_halves_recons", "--auto_iter_max", "1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    first = read_map("truth_map.mrc").data.ravel()
    for half in (1, 2):
        made = read_map(f"run_it001_half{half}_class001.mrc").data.ravel()
        assert made @ first / (first @ first) == pytest.approx(1.0, rel=0.1)


# --- the stand-in against the RELION on the PATH


def outputs(folder: Path) -> dict[str, list[StarBlock]]:
    """STAR files of a refinement, without directory, and their tables."""
    stars = [file for file in folder.glob("run_*.star") if not file.name.endswith("_out.star")]
    return {file.name: [block for block in read_blocks(file) if block.columns] for file in sorted(stars)}


def star_versions(folder: Path) -> set[str]:
    return {found for file in folder.glob("run_*.star") for found in re.findall(r"# version (\d+)", file.read_text())}


@pytest.mark.relion
@pytest.mark.mpi
def test_the_stand_in_leaves_the_files_of_real_relion(folder, tmp_path, monkeypatch):
    """Calls, names, tables and columns are those of whatever RELION is installed: what the stand-in has, it has."""
    relion = find_relion()
    rules = Rules(relion.version)
    refine([*open_mpi(), relion.program], callback(folder), BEGIN, FINISH)
    refused = start([*open_mpi(), relion.program], "false", *FINISH)
    assert refused.returncode and "rlnModelStarFile2 is empty" in refused.stderr
    other = tmp_path / "standin"
    shutil.copytree(folder, other, ignore=shutil.ignore_patterns("run_*", "called"))
    monkeypatch.chdir(other)
    refine([write_program(other, relion.version)], callback(other), BEGIN, FINISH)
    calls = [called(place) for place in (folder, other)]
    assert calls[0][2:] == calls[1][2:] and set(calls[0][:2]) == set(calls[1][:2])
    theirs, ours = outputs(folder), outputs(other)
    assert list(theirs) == list(ours)
    for name, blocks in ours.items():
        known = {block.name: block.columns for block in theirs[name]}
        for block in blocks:
            assert block.name in known and set(block.columns) <= set(known[block.name]), (name, block.name)
            if block.name == "external_reconstruct_general":
                assert list(block.columns) == list(known[block.name])
    assert star_versions(folder) == star_versions(other) == {str(rules.star_version)}
    maps = [{file.name for file in place.glob("run_*.mrc") if "external" not in file.name} for place in (folder, other)]
    assert maps[1] <= maps[0]
    assert (folder / "run_optimiser.star").exists() == rules.ends_with_optimiser
