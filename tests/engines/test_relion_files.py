"""RELION's file names and contents, its output, its command lines, and the images that it gets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from errors_helper import raises_code
from pipeline_helper import cryoiso

from cryoiso.core.config import RefineSection, RelionSection
from cryoiso.core.errors import CryoisoError, InputError, MissingError, UsageError
from cryoiso.engines.relion import command, install
from cryoiso.engines.relion.files import (
    PARTS,
    Star,
    complete_iterations,
    parse_name,
    read_optimiser,
    remove_iterations_after,
    version_of,
)
from cryoiso.engines.relion.images import image_names, relion_particles, rows_of_names, write_input
from cryoiso.engines.relion.install import MPICH, OPEN_MPI, Relion
from cryoiso.engines.relion.progress_parser import RelionProgress
from cryoiso.engines.relion.result import IterationLedger, remove_early_iterations
from cryoiso.io import read_particle_file
from cryoiso.io.imageprep import IngestSettings
from cryoiso.io.mrc import write_map, write_stack
from cryoiso.io.sources import ArraySource, StackSource
from cryoiso.io.stack import StackReader
from cryoiso.parallel.context import Context

NAMES = {
    "Refine3D/job007/run_it003_half1_class001_external_reconstruct.star": ("Refine3D/job007/run", 3, 1, 1),
    "run_ct12_it013_half2_class001_external_reconstruct.star": ("run_ct12", 13, 2, 1),
    "run_ct12_ct15_it016_half2_class001_external_reconstruct.star": ("run_ct12_ct15", 16, 2, 1),
    "./run_it100_half1_class001_external_reconstruct.star": ("run", 100, 1, 1),
    "/a/my_run_it1234_half2_class001_external_reconstruct.star": ("/a/my_run", 1234, 2, 1),
    "run_it008_class001_external_reconstruct.star": ("run", 8, None, 1),
    "x/run_class001_external_reconstruct.star": ("x/run", None, None, 1),
    "my_it_run_it005_class001.mrc": ("my_it_run", 5, None, 1),
    "a.b/run.v2_it003_half1_class001.mrc": ("a.b/run.v2", 3, 1, 1),
    "run_it001_it002_half1_class001.mrc": ("run_it001", 2, 1, 1),
}


@pytest.mark.parametrize("path, expected", NAMES.items())
def test_names_are_taken_apart_from_their_end(path, expected):
    name = parse_name(path)
    assert (name.root, name.iteration, name.half, name.class_) == expected
    if name.iteration is not None:
        assert name.of(name.iteration, "sampling.star").name.endswith(f"_it{name.iteration:03d}_sampling.star")


LOG = """RELION version: 3.1.3
 Auto-refine: Iteration= 4
 Auto-refine: Resolution= 24 (no gain for 2 iter)
 Oversampling= 0 NrHiddenVariableSamplingPoints= 18720
 OrientationalSampling= 7.5 NrOrientations= 1440
 Oversampling= 1 NrHiddenVariableSamplingPoints= 599040
 OrientationalSampling= 3.75 NrOrientations= 11520
 Expectation iteration 4
000/??? sec ~~(,_,">                          [oo]\r   1.20/   4.80 min ......~~(,_,">"""


def test_progress_is_read_from_pieces_of_any_size():
    for size in (1, 7, 64, 10_000):
        progress, began = RelionProgress(), []
        for start in range(0, len(LOG), size):
            began += progress.feed(LOG[start : start + size])
        assert began == [4] and progress.iteration == 4 and progress.resolution_A == 24.0
        assert progress.step_deg == 7.5  # before oversampling: HEALPix order 3
        assert progress.left_s == pytest.approx(216)


def test_the_last_iteration_and_errors_are_noticed():
    progress = RelionProgress()
    progress.feed(" Auto-refine: Refinement has converged, entering last iteration where two halves will be combined\n")
    assert progress.last and not progress.error
    progress.feed(
        "in: ./src/x.cpp, line 1\nERROR: \nERROR: output directory does not exist!\n=== Backtrace\nERROR: b\n"
    )
    assert progress.error == "output directory does not exist!"


def test_options_that_relion_obeys_though_it_does_not_list_them_are_no_mistake():
    progress = RelionProgress()
    for option in ("--misspelt", "--maximum_angular_sampling", "--misspelt", "--external_reconstruct"):
        progress.feed(f"WARNING: Option {option}\tis not a valid RELION argument\n")
    assert progress.unknown == ["--misspelt"]


# --- command lines

RELION3 = Relion("/opt/relion/bin/relion_refine_mpi", "3.1.3", OPEN_MPI, "/usr/lib/libmpi.so.40", "/usr/bin/mpirun")
SEARCH = command.Search("p.star", "r.mrc", 1.5, 200, 10_000, "C3", 180.0, 30.0, 7)


def options(words):
    """Option -> value of a command line."""
    places = [i for i, word in enumerate(words) if word.startswith("--")]
    return {words[i]: words[i + 1 : j] for i, j in zip(places, [*places[1:], len(words)], strict=True)}


def first(search=SEARCH, section=None, relion=RELION3, **settings):
    return command.first_command(search, RefineSection(**settings), section or RelionSection(), relion)


def test_settings_become_relions_options():
    found = options(first(healpix_order=3, max_iterations=12, padding=1, join_halves_A=35, shift_range_A=9))
    assert found["--healpix_order"] == ["3"] and found["--auto_local_healpix_order"] == ["4"]
    assert found["--auto_iter_max"] == ["12"] and found["--pad"] == ["1"] and found["--random_seed"] == ["7"]
    assert found["--offset_range"] == ["6"] and found["--low_resol_join_halves"] == ["35"]
    assert {"--firstiter_cc", "--flatten_solvent", "--split_random_halves", "--skip_gridding"} <= set(found)
    assert "--external_reconstruct" not in found and "--solvent_mask" not in found
    found = options(first(replace(SEARCH, callback=True, mask="m.mrc", on_scale=True), solvent_mask=False))
    assert "--external_reconstruct" in found and found["--solvent_mask"] == ["m.mrc"]
    assert "--firstiter_cc" not in found and "--flatten_solvent" not in found


@pytest.mark.parametrize("version", ["4.0.2", "5.0-beta-3", "5.0.1-commit-d476e6", "5.1.1"])
def test_a_version_whose_source_was_not_seen_is_started_as_the_last_that_was(version):
    last, other = (replace(RELION3, version=v) for v in ("5.0.1", version))
    search = replace(SEARCH, callback=True)
    assert first(search, relion=other) == first(search, relion=last)
    assert not {"--skip_gridding", "--ctf_corrected_ref"} & set(first(search, relion=other))
    words = [command.next_command("x_optimiser.star", search, RelionSection(), r, 9) for r in (last, other)]
    assert words[0] == words[1] and "--external_reconstruct" in words[0]


@pytest.mark.parametrize("local_deg, order", [(30.0, 2), (9.0, 4), (3.0, 6)])
def test_a_local_search_has_a_grid_finer_than_its_range(local_deg, order):
    found = options(first(replace(SEARCH, local_deg=local_deg), healpix_order=1))
    assert found["--healpix_order"] == [str(order)] and float(found["--sigma_ang"][0]) == pytest.approx(local_deg / 3)
    assert int(found["--auto_local_healpix_order"][0]) <= order and 60 / 2**order <= local_deg / 2


def test_extra_options_replace_ours_and_some_are_not_allowed():
    words = first(section=RelionSection(extra="--pad 3 --gpu '0:1' --zero_mask"))
    assert words.count("--pad") == 1 and options(words)["--pad"] == ["3"] and options(words)["--gpu"] == ["0:1"]
    assert words.count("--zero_mask") == 1
    for bad in ("--o elsewhere", "--i x", "--continue y", "'"):
        with pytest.raises(UsageError, match=r"relion\.extra"):
            first(section=RelionSection(extra=bad))


def test_large_sets_are_not_read_at_once():
    assert "--preread_images" in first()
    assert "--preread_images" not in first(replace(SEARCH, count=1_000_000))
    assert "--preread_images" not in first(replace(SEARCH, count=1_000, three_dimensional=True))


def test_later_versions_divide_directly_by_themselves():
    words = first(relion=replace(RELION3, version="5.0.1-commit-abc"))
    assert "--skip_gridding" not in words and "--ctf_corrected_ref" not in words
    assert replace(RELION3, version="").major == 3


def test_continuing_and_finishing():
    words = command.next_command("run_it004_optimiser.star", SEARCH, RelionSection(), RELION3, 9)
    assert options(words)["--continue"] == ["run_it004_optimiser.star"] and "--force_converge" not in words
    assert options(words)["--o"] == ["./run"] and options(words)["--auto_iter_max"] == ["9"]
    assert "--force_converge" in command.next_command("x", SEARCH, RelionSection(), RELION3, 9, finish=True)
    served = replace(SEARCH, callback=True)
    assert "--external_reconstruct" in command.next_command("x", served, RelionSection(), RELION3, 9)
    assert "--external_reconstruct" not in words


def test_launchers(monkeypatch):
    monkeypatch.setattr(command.os, "geteuid", lambda: 0)
    words = command.launch(RelionSection(ranks=5), RELION3, ("VARIABLE",))
    assert words[0] == "/usr/bin/mpirun" and words[-3:] == ["-n", "5", RELION3.program]
    assert "--allow-run-as-root" in words and words[words.index("-x") + 1] == "VARIABLE"
    monkeypatch.setattr(command.os, "geteuid", lambda: 1000)
    assert "--allow-run-as-root" not in command.launch(RelionSection(), RELION3)
    words = command.launch(RelionSection(launcher="srun -n {ranks} --mpi=pmix", ranks=5), replace(RELION3, mpirun=""))
    assert words == ["srun", "-n", "5", "--mpi=pmix", RELION3.program]
    mpich = replace(RELION3, family=MPICH, mpirun="/opt/mpich/bin/mpirun")
    assert command.launch(RelionSection(), mpich)[-3:] == ["-n", "3", RELION3.program]
    with raises_code("placeholder-missing", UsageError, match="ranks"):
        command.launch(RelionSection(launcher="srun"), RELION3)
    with raises_code("option-out-of-range", UsageError, match="even number of followers"):
        command.launch(RelionSection(ranks=4), RELION3)
    with raises_code("mpi-launcher-missing", MissingError, match=r"relion\.launcher"):
        command.launch(RelionSection(), replace(RELION3, mpirun=""))


def test_the_mpi_of_a_program_is_that_of_its_libraries(tmp_path):
    openmpi = "\tlibmpi_cxx.so.40 => /lib/libmpi_cxx.so.40 (0x1)\n\tlibmpi.so.40 => /lib/libmpi.so.40 (0x2)\n"
    assert install._mpi_of(openmpi) == (OPEN_MPI, "/lib/libmpi.so.40")
    assert install._mpi_of("\tlibmpi.so.12 => /opt/mpich/lib/libmpi.so.12 (0x2)\n") == (
        MPICH, "/opt/mpich/lib/libmpi.so.12",
    )  # fmt: skip
    abi = tmp_path / "lib" / "libmpi_abi.so.1"  # the same name whoever made it
    assert install._mpi_of(f"\tlibmpi_abi.so.1 => {abi} (0x2)\n") == (MPICH, str(abi))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "mpirun").write_text("#!/bin/sh\necho 'mpirun (Open MPI) 6.0.0'\n")
    (tmp_path / "bin" / "mpirun").chmod(0o755)
    assert install._mpi_of(f"\tlibmpi_abi.so.1 => {abi} (0x2)\n") == (OPEN_MPI, str(abi))
    assert install._mpi_of("\tlibc.so.6 => /lib/libc.so.6 (0x2)\n") == ("", "")
    for name, says in (("mpirun", "HYDRA build details:"), ("mpirun.openmpi", "mpirun (Open MPI) 4.1.4")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{says}'\n")
        (tmp_path / name).chmod(0o755)
    assert install._family_of(str(tmp_path / "mpirun")) == MPICH
    assert install._family_of(str(tmp_path / "mpirun.openmpi")) == OPEN_MPI


def test_no_relion_is_one_clear_error():
    with raises_code("program-missing", MissingError, match="relion_refine_nowhere is not on the PATH"):
        install.find_relion("relion_refine_nowhere")


# --- files


def write_iteration(root: Path, iteration: int, rows: int = 2) -> None:
    """What RELION leaves of an iteration, as short as it goes."""
    stem = f"{root}_it{iteration:03d}"
    Path(f"{stem}_optimiser.star").write_text(
        "# RELION optimiser; version 3.1.3\n\ndata_optimiser_general\n\n"
        f"_rlnCurrentIteration {iteration}\n_rlnSolventMaskName None\n_rlnParticleDiameter 180\n"
        "_rlnChangesOptimalOrientations 3.5\n_rlnChangesOptimalOffsets 1\n_rlnOverallAccuracyRotations 2\n"
    )
    Path(f"{stem}_sampling.star").write_text("data_sampling_general\n\n_rlnHealpixOrder 3\n_rlnSymmetryGroup C3\n")
    images = "".join(f"{i + 1:06d}@x.mrcs\n" for i in range(rows))
    Path(f"{stem}_data.star").write_text(f"data_particles\n\nloop_\n_rlnImageName #1\n{images}")
    for half in (1, 2):
        Path(f"{stem}_half{half}_model.star").write_text(
            "data_model_general\n\n_rlnCurrentResolution 12.5\n_rlnPixelSize 2\n_rlnAveragePmax 0.5\n"
            "_rlnLogLikelihood 9\n\ndata_model_class_1\n\nloop_\n_rlnSpectralIndex #1\n_rlnGoldStandardFsc #2\n"
            "0 1\n1 0.5\n"
        )
        write_map(f"{stem}_half{half}_class001.mrc", np.zeros((4, 4, 4)), 2.0)


def test_only_whole_iterations_count(tmp_path):
    root = tmp_path / "run"
    for iteration in (0, 1, 2, 100):
        write_iteration(root, iteration)
    write_iteration(tmp_path / "run_ct2", 7)  # another output name
    assert complete_iterations(root, 2) == [0, 1, 2, 100]
    assert complete_iterations(root, 3) == []
    assert read_optimiser(Path(f"{root}_it100_optimiser.star"))["iteration"] == 100
    assert version_of(Path(f"{root}_it001_optimiser.star")) == "3.1.3"
    for part in PARTS:
        write_iteration(root, 100)
        file = Path(f"{root}_it100_{part}")
        file.write_bytes(file.read_bytes()[: len(file.read_bytes()) // 2])
        assert complete_iterations(root, 2)[-1] == 2, part


def test_what_came_after_an_iteration_is_forgotten(tmp_path):
    root = tmp_path / "run"
    for iteration in (1, 2, 10):
        write_iteration(root, iteration)
    for name in (
        "run_data.star",
        "run_half1_class001_unfil.mrc",
        "other.star",
        "run_it010_half1_class001_external_reconstruct.mrc",
    ):
        (tmp_path / name).write_text("x")
    remove_iterations_after(root, 2)
    assert complete_iterations(root, 2) == [1, 2] and (tmp_path / "other.star").exists()
    assert not list(tmp_path.glob("*it010*")) and not (tmp_path / "run_data.star").exists()
    remove_early_iterations(root, 2)
    assert complete_iterations(root, 2) == [2]


def test_the_ledger_outlives_files_and_interruptions(tmp_path):
    root = tmp_path / "run"
    write_iteration(root, 1)
    ledger = IterationLedger(root)
    ledger.note_callback(1, {"applied": True})
    ledger.note_callback(2, {"applied": False})
    assert ledger.note_iterations(1)["resolution_A"] == 12.5
    remove_early_iterations(root, 2)
    again = IterationLedger(root)
    (record,) = again.records()  # iteration 2 has not ended
    assert record["correction"] == {"applied": True} and record["step_deg"] == 7.5 and record["changes_deg"] == 3.5
    again.forget_after(0)
    assert IterationLedger(root).records() == []


def test_a_missing_value_names_file_block_and_column(tmp_path):
    write_iteration(tmp_path / "run", 1)
    star = Star.read(tmp_path / "run_it001_sampling.star")
    with raises_code("relion-file-invalid", InputError, match=r"sampling\.star.*_rlnPsiStep in data_sampling_general"):
        star.number("sampling_general", "rlnPsiStep")
    with raises_code("relion-file-invalid", InputError, match=r"a value that is not a number"):
        star.numbers("sampling_general", "rlnSymmetryGroup")


# --- images


@pytest.fixture(scope="module")
def stacks(tmp_path_factory):
    """Twelve images, normalised as RELION's extraction leaves them."""
    folder = tmp_path_factory.mktemp("s")
    done = cryoiso("simulate", "phantom", folder, "--n", 12, "--box", 80, "--halves", "--snr-db", -15)
    assert done.returncode == 0, done.stderr
    return read_particle_file(folder / "particles.star")


def test_originals_are_read_where_nothing_was_changed(stacks, tmp_path):
    source = StackSource(stacks)
    names = image_names(source, tmp_path, "auto", Context())
    assert names == [f"{i + 1:06d}@{s}" for i, s in zip(stacks.index, stacks.stack, strict=True)]
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize("change", ["sign", "scale", "noise"])
def test_changed_images_are_written_for_relion(stacks, tmp_path, change):
    images = StackSource(stacks).read(np.arange(12))
    changed = {
        "sign": -images,
        "scale": 3 * images,
        "noise": images + np.random.default_rng(0).normal(size=images.shape),
    }
    source = ArraySource(changed[change].astype(np.float32), stacks)
    with raises_code("relion-images-unreadable", InputError, match=r"relion\.images"):
        image_names(source, tmp_path, "original", Context())
    names = image_names(source, tmp_path, "auto", Context())
    with StackReader() as reader:
        for row, name in enumerate(names):
            number, stack = name.split("@")
            assert np.array_equal(reader.read(stack, np.array([int(number) - 1]))[0], source.read(np.array([row]))[0])
    before = [p.stat().st_mtime_ns for p in (tmp_path / "images").glob("*.mrcs")]
    assert image_names(source, tmp_path, "auto", Context(), resume=True) == names
    assert [p.stat().st_mtime_ns for p in (tmp_path / "images").glob("*.mrcs")] == before


def test_relion_is_told_the_box_of_the_images_that_it_reads(stacks, tmp_path):
    """Images of another box are exported cropped; their optics group must not keep the old box."""
    with write_stack(tmp_path / "large.mrcs", 96, 3.0) as stack:
        stack.append(np.random.default_rng(0).normal(size=(6, 96, 96)).astype(np.float32))
    groups = (stacks.groups[0], replace(stacks.groups[0], number=2, box_px=96))
    mixed = replace(
        stacks, groups=groups, optics=np.repeat(np.array([0, 1], np.int32), 6),
        stack=np.append(stacks.stack[:6], [str(tmp_path / "large.mrcs")] * 6),
        index=np.append(stacks.index[:6], range(6)),
    )  # fmt: skip
    source = StackSource(mixed, IngestSettings(invert="no"))
    names = image_names(source, tmp_path, "auto", Context())
    write_input(tmp_path / "in.star", mixed, names, with_poses=False, box_px=source.box_px)
    seen = read_particle_file(tmp_path / "in.star")
    assert [group.box_px for group in seen.groups] == [80, 80]
    with StackReader() as reader:
        assert {reader.header(str(stack)).shape[1:] for stack in seen.stack} == {(80, 80)}


def test_relion_sees_no_old_angles_and_no_empty_groups(stacks, tmp_path):
    groups = (stacks.groups[0], replace(stacks.groups[0], number=7), replace(stacks.groups[0], number=9))
    posed = replace(stacks, groups=groups, optics=np.where(np.arange(12) < 6, 2, 0).astype(np.int32),
                    rotation=np.tile(np.eye(3), (12, 1, 1)), shift_A=np.tile([3.0, -2.0], (12, 1)))  # fmt: skip
    seen = relion_particles(posed, with_poses=False)
    assert seen.rotation is None and [g.number for g in seen.groups] == [1, 2]
    assert seen.optics.tolist() == [1] * 6 + [0] * 6
    assert relion_particles(posed, with_poses=True).rotation is not None
    assert posed.optics.tolist() == [2] * 6 + [0] * 6  # the input is as it was
    # known offsets stay, as the centre of search and prior
    write_input(tmp_path / "in.star", posed, [f"{i + 1}@a.mrcs" for i in range(12)], with_poses=False)
    written = Star.read(tmp_path / "in.star")
    for axis, value in (("X", 3.0), ("Y", -2.0)):
        for column in (f"rlnOrigin{axis}Angst", f"rlnOrigin{axis}PriorAngst"):
            assert written.numbers("particles", column).tolist() == [value] * 12
    assert not written.has("particles", "rlnAngleRot")
    centred = relion_particles(replace(posed, shift_A=np.zeros((12, 2))), with_poses=False)
    assert centred.shift_A is None and "rlnOriginXPriorAngst" not in centred.results


def test_rows_come_back_whatever_their_order():
    names = ["000001@a.mrcs", "000002@a.mrcs", "000001@b.mrcs"]
    assert rows_of_names(["1@b.mrcs", "2@a.mrcs", "01@a.mrcs"], names, "f").tolist() == [2, 1, 0]
    for lost in (names[:2], [*names, "000003@a.mrcs"], [names[0], names[0], names[1]]):
        with raises_code(
            "relion-particles-lost",
            CryoisoError,
            match="each particle exactly once",
        ):
            rows_of_names(lost, names, "f")
