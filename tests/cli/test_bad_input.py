"""Whatever is wrong with the input: one clear sentence, the right exit code, nothing half-written, nobody left over."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import mrcfile
import numpy as np
import pytest
from forks_helper import python
from mpi_helper import run_mpi, start_mpi
from pipeline_helper import SERIAL, cryoiso, cryoiso_here, simulate, write_cube, write_job

from cryoiso.core.errors import EXIT_INPUT, EXIT_MISSING, EXIT_OTHER, EXIT_USAGE
from cryoiso.io.star.read import read_particles, write_particles

MRC_HEADER = 1024


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return simulate(tmp_path_factory.mktemp("original")).parent


@pytest.fixture
def data(original, tmp_path) -> Path:
    """A good set of 40 particles of 24 px with its job file, to be spoilt."""
    folder = tmp_path / "data"
    shutil.copytree(original, folder)
    return folder


def check(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """One message that has all these words, no traceback, this exit code."""
    assert done.returncode == code, done.stderr
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr, done.stderr
    message = done.stderr[done.stderr.index("error: ") :]
    assert [word for word in words if word not in message] == [], message
    assert done.stdout == ""


def run_fails(data: Path, code: int, *words: str, job: Path | None = None) -> None:
    """Such a run stops before it has made its folder."""
    check(cryoiso_here("run", job or data / "job.toml"), code, *words)
    assert not (data / "job-run").exists(), "something was written before the input was checked"


def edit_star(path: Path, change) -> None:
    """Applies ``change(cells)`` to each row of particles of a STAR file; None removes the row."""
    lines = []
    for line in path.read_text().splitlines():
        cells = line.split()
        if any("@" in cell for cell in cells):
            cells = change(cells)
            if cells is None:
                continue
            line = " ".join(cells)
        lines.append(line)
    path.write_text("\n".join(lines) + "\n")


# --- particles


def test_no_particle_file(data):
    (data / "particles.star").unlink()
    run_fails(data, EXIT_INPUT, "particles.star")


def test_missing_stack(data):
    (data / "particles.mrcs").unlink()
    run_fails(data, EXIT_INPUT, "particles.mrcs")


def test_truncated_stack(data):
    stack = data / "particles.mrcs"
    os.truncate(stack, stack.stat().st_size - 24 * 24 * 4 * 3 - 10)
    run_fails(data, EXIT_INPUT, "particles.mrcs", "expected", "found")


def test_row_beyond_the_stack(data):
    edit_star(data / "particles.star", lambda cells: [cell.replace("000040@", "000041@") for cell in cells])
    run_fails(data, EXIT_INPUT, "particles.mrcs", "row 40")


def test_same_image_twice(data):
    edit_star(data / "particles.star", lambda cells: [cell.replace("000040@", "000039@") for cell in cells])
    run_fails(data, EXIT_INPUT, "same image", "39", "40")


def test_rubbish_in_a_column(data):
    edit_star(data / "particles.star", lambda cells: [c if "@" in c or "." not in c else "rubbish" for c in cells])
    run_fails(data, EXIT_INPUT, "particles.star", "row 1", "rubbish")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bad_pixel(value, data):
    """Found when the images are read: the run folder is there and tells why, but no shard is."""
    with open(data / "particles.mrcs", "r+b") as stream:
        stream.seek(MRC_HEADER + (24 * 24 * 16 + 100) * 4)
        stream.write(np.float32(value).tobytes())
    done = cryoiso("run", data / "job.toml")
    check(done, EXIT_INPUT, "row 17")
    left = [p.name for p in (data / "job-run").rglob("*") if p.suffix in (".h5", ".part")]
    assert left == [] and not (data / "job-run/lock.json").exists()


def test_empty_half_set(data):
    particles = read_particles(data / "particles.star")
    write_particles(data / "particles.star", replace(particles, half=np.ones(40, np.int8)))
    run_fails(data, EXIT_INPUT, "half-set 2 is empty", "rlnRandomSubset")


def test_particles_without_a_half_set(data):
    particles = read_particles(data / "particles.star")
    half = np.repeat(np.array([1, 2, 0], np.int8), [19, 20, 1])
    write_particles(data / "particles.star", replace(particles, half=half))
    run_fails(data, EXIT_INPUT, "row 40", "half-set")


def test_one_particle(data):
    rows = iter(range(40))
    edit_star(data / "particles.star", lambda cells: cells if next(rows) == 0 else None)
    run_fails(data, EXIT_INPUT, "too few particles")


# --- reference, mask, truth


@pytest.mark.parametrize(
    "box, pixel, words",
    [
        (20, 7.0, ["another box", "24 px of 7 Å", "20 px of 7 Å", "reference.resample"]),
        (24, 5.0, ["another pixel size", "24 px of 7 Å", "24 px of 5 Å", "reference.pixel_size_A"]),
        (32, 5.0, ["another box and pixel size", "reference.resample"]),
        (64, 14.0, ["very different size"]),
    ],
)
def test_reference_on_another_grid(box, pixel, words, data):
    write_cube(data / "other.mrc", box, pixel)
    run_fails(data, EXIT_INPUT, "other.mrc", *words, job=write_job(data, reference_file="other.mrc"))


def test_such_a_reference_is_taken_when_told_so(data):
    write_cube(data / "other.mrc", 20, 7.0)
    job = write_job(data, reference_file="other.mrc", reference_resample=True, sample_symmetry="C1")
    code = f"""
from pathlib import Path
from cryoiso.parallel.context import Context
from cryoiso.pipeline.records.run_folder import RunFolder
from cryoiso.pipeline.preflight import check_job
from cryoiso.pipeline.jobfile import read_job
from cryoiso.pipeline.job_inputs import Inputs
inputs = Inputs(read_job(Path({str(job)!r}))[1], RunFolder(Path("none")), Context())
check_job(inputs)
print(inputs.reference().map.box_px, inputs.reference().source)
"""
    done = subprocess.run([python(), "-c", code], capture_output=True, text=True, env=SERIAL)
    assert done.stdout.startswith("24 map other.mrc, interpolated from 20 px"), done.stderr


def test_reference_without_a_pixel_size(data):
    write_cube(data / "bare.mrc", 24, 7.0)
    with open(data / "bare.mrc", "r+b") as stream:  # cell lengths: words 11 to 13 of an MRC header
        stream.seek(40)
        stream.write(np.zeros(3, np.float32).tobytes())
    job = write_job(data, reference_file="bare.mrc")
    run_fails(data, EXIT_INPUT, "bare.mrc", "no pixel size", "pixel_size_A", job=job)


def test_missing_reference(data):
    run_fails(data, EXIT_INPUT, "no such reference", job=write_job(data, reference_file="none.mrc"))


@pytest.mark.parametrize("name", ["model.pdb", "model.cif", "model.cif.gz", "map.mrc"])
def test_unreadable_reference(name, data):
    (data / name).write_bytes(b"this is not what its name says\n" * 50)
    run_fails(data, EXIT_INPUT, name, job=write_job(data, reference_file=name))


def test_black_reference(data):
    write_cube(data / "black.mrc", 24, 7.0, value=-1.0)
    run_fails(data, EXIT_INPUT, "no positive density", job=write_job(data, reference_file="black.mrc"))


def test_constant_reference(data):
    with mrcfile.new(data / "flat.mrc") as mrc:
        mrc.set_data(np.ones((24, 24, 24), np.float32))
        mrc.voxel_size = 7.0
    run_fails(data, EXIT_INPUT, "flat.mrc", "the reference is constant", job=write_job(data, reference_file="flat.mrc"))


def test_single_image_as_reference(data):
    with mrcfile.new(data / "image.mrc") as mrc:
        mrc.set_data(np.ones((1, 24, 24), np.float32))
        mrc.voxel_size = 7.0
    run_fails(data, EXIT_INPUT, "image.mrc", "single image", job=write_job(data, reference_file="image.mrc"))


@pytest.mark.parametrize("voxels", [0, 1])
def test_mask_that_is_empty_or_nearly(voxels, data):
    inside = np.zeros((24, 24, 24), np.float32)
    inside.ravel()[:voxels] = 1.0
    with mrcfile.new(data / "mask.mrc") as mrc:
        mrc.set_data(inside)
        mrc.voxel_size = 7.0
    words = "next to nothing" if voxels else "the mask is empty"
    run_fails(data, EXIT_INPUT, "mask.mrc", words, job=write_job(data, sample_mask="mask.mrc"))


def test_mask_of_another_box(data):
    write_cube(data / "mask.mrc", 20, 7.0)
    run_fails(data, EXIT_INPUT, "mask.mrc", "another box", job=write_job(data, sample_mask="mask.mrc"))


def test_mask_that_is_no_mask(data):
    write_cube(data / "mask.mrc", 24, 7.0, value=7.0)
    run_fails(data, EXIT_INPUT, "between 0 and 1", job=write_job(data, sample_mask="mask.mrc"))


def test_truth_of_other_particles(data):
    truth = read_particles(data / "truth.star")
    write_particles(data / "truth.star", truth.take(slice(0, 30)))
    run_fails(data, EXIT_INPUT, "truth.star", "10 of the particles", "row 31")


def test_truth_map_on_another_grid(data):
    write_cube(data / "truth20.mrc", 20, 7.0)
    run_fails(data, EXIT_INPUT, "truth20.mrc", "another grid", job=write_job(data, truth_map="truth20.mrc"))


# --- the job file


def test_unknown_key(data):
    run_fails(data, EXIT_USAGE, "symetry", "did you mean 'symmetry'", job=write_job(data, sample_symetry="C3"))


def test_unknown_section(data):
    run_fails(data, EXIT_USAGE, "nonsense", job=write_job(data, nonsense_key=1))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"refine_max_iterations": 0}, ["refine.max_iterations", "found 0"]),
        ({"refine_padding": "two"}, ["refine.padding", "'two'"]),
        ({"particles_file": None}, ["particles.file", "missing"]),
        ({"run_workflow": "everything"}, ["run.workflow"]),
        ({"sample_diameter_A": 1e4}, ["sample.diameter_A", "168 Å"]),
    ],
)
def test_bad_values(change, words, data):
    run_fails(data, EXIT_USAGE, *words, job=write_job(data, **change))


def test_not_toml(data):
    (data / "job.toml").write_text("[particles\nfile = particles.star\n")
    run_fails(data, EXIT_USAGE, "job.toml", "not a TOML file")


def test_no_job_file(data):
    (data / "job.toml").unlink()
    run_fails(data, EXIT_USAGE, "no such job file", "cryoiso init")


def test_unknown_symmetry(data):
    run_fails(data, EXIT_INPUT, "Q5", job=write_job(data, sample_symmetry="Q5"))


def test_a_gpu_that_is_not_there(data):
    import torch

    if torch.cuda.is_available():
        pytest.skip("LOUD: this machine has a CUDA device; its absence cannot be tested")
    run_fails(data, EXIT_MISSING, "no CUDA device", "run.device", job=write_job(data, run_device="cuda"))


# --- the machine


def test_folder_that_cannot_be_written(data, tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = cryoiso("run", data / "job.toml", "--out", tmp_path / "file" / "run")
    assert done.returncode in (EXIT_INPUT, EXIT_OTHER) and done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr


def test_disk_full_while_writing_a_shard(data):
    """A limit on the size of files stands for a disk or quota that fills up half-way through a shard."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))

    command = [sys.executable, "-m", "cryoiso.cli.main", "ingest", data / "particles.star", data / "shards"]
    done = subprocess.run(command, capture_output=True, text=True, env=SERIAL, preexec_fn=limit)
    check(done, EXIT_OTHER, "shard-00000.h5", "no space left")
    assert list((data / "shards").iterdir()) == []
    assert cryoiso("ingest", data / "particles.star", data / "shards").returncode == 0


@pytest.mark.mpi
def test_bad_input_is_said_once_by_many_ranks(data):
    (data / "particles.mrcs").unlink()
    done = run_mpi(3, ["-m", "cryoiso.cli.main", "run", data / "job.toml"], check=False)
    check(done, EXIT_INPUT, "particles.mrcs")
    assert not (data / "job-run").exists()


@pytest.mark.mpi
def test_bad_image_of_one_rank_stops_all_ranks(tmp_path):
    """Found by the rank whose shard has it; every rank leaves, one speaks."""
    data = simulate(tmp_path / "large", n=1000, box=24).parent
    with open(data / "particles.mrcs", "r+b") as stream:
        stream.seek(MRC_HEADER + 24 * 24 * 4 * 990)
        stream.write(np.float32(np.nan).tobytes())
    job = write_job(data, particles_shard_mib=1)
    done = run_mpi(2, ["-m", "cryoiso.cli.main", "run", job], check=False)
    check(done, EXIT_INPUT, "row 991")
    assert not list((data / "job-run").rglob("*.part"))


@pytest.mark.mpi
def test_killed_rank_takes_the_others_down(data):
    """As the out-of-memory killer does it."""
    job = write_job(data, refine_max_iterations=50)
    process = start_mpi(3, ["-m", "cryoiso.cli.main", "run", job])
    journal = data / "job-run/journal.jsonl"
    while not (journal.exists() and '"stage": "refine"' in journal.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    ranks = [pid for pid in _descendants(process.pid) if "cryoiso.cli.main" in _command_of(pid)]
    ranks = [pid for pid in ranks if "mpirun" not in _command_of(pid) and "hydra" not in _command_of(pid)]
    # a rank may just be starting a program of its own (a copy of itself until then): its parent is a rank
    ranks = [pid for pid in ranks if not any(pid in _descendants(other) for other in ranks if other != pid)]
    assert len(ranks) == 3
    os.kill(ranks[1], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert [pid for pid in ranks if _alive(pid)] == []


def _descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *_descendants(child)]
    return found


def _command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
