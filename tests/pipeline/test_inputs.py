"""Inputs that images are in, and the container image: hashed beside the work, once, and looked at again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import h5py
import pytest
from mpi_helper import run_mpi
from pipeline_helper import cryoiso_here, quick_report, write_job

from cryoiso.core.config import ParticlesSection
from cryoiso.core.errors import EXIT_INPUT, InputError, Interrupted
from cryoiso.io.shards import read_index
from cryoiso.parallel import signals
from cryoiso.parallel.context import Context
from cryoiso.pipeline.commands.ingest import ingest_files
from cryoiso.pipeline.records import hashing
from cryoiso.pipeline.reproduce.replay import replay_stage
from cryoiso.pipeline.reproduce.verify import verify_run
from cryoiso.pipeline.run import resume_run, run_job
from cryoiso.pipeline.stages import ingest, input_hashes

STACKS = ("a.mrcs", "b.mrcs")


@pytest.fixture
def shards(data, tmp_path, quick) -> Path:
    """Shards by ``cryoiso ingest`` and a job of them, in the folder ``data``; the stacks are elsewhere by now."""
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    ingest_files(ParticlesSection(file=str(folder / "particles.star")), folder / "shards", Context())
    (folder / "particles.mrcs").rename(tmp_path / "archived.mrcs")
    write_job(folder, particles_file="shards")
    return folder / "shards"


@pytest.fixture
def two_stacks(data, tmp_path, quick) -> Path:
    """The job file of a set whose images lie in two stacks."""
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    text = (folder / "particles.star").read_text()
    for number in range(1, 41):
        name = STACKS[number > 20]
        text = text.replace(f"{number:06d}@particles.mrcs", f"{number:06d}@{name}")
    assert "@particles" not in text
    (folder / "particles.star").write_text(text)
    for name in STACKS:
        shutil.copyfile(folder / "particles.mrcs", folder / name)
    return write_job(folder, truth_particles=None)


def manifest_of(run: Path) -> dict:
    return json.loads((run / "manifest.json").read_text())


def flip_a_byte(path: Path) -> None:
    """In an image of a shard or a stack, whose time does not tell."""
    before, place = path.stat(), 2000
    if path.suffix == ".h5":
        with h5py.File(path, "r") as file:
            place += file["images"].id.get_chunk_info(0).byte_offset
    with open(path, "r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


# --- shards as input


def test_shards_that_a_job_names_are_inputs_with_hashes(shards, tmp_path):
    """The stacks that they were made of are not needed any more."""
    run = run_job(shards.parent / "job.toml", tmp_path / "run", Context(), quick_report).path
    (name,) = (s["file"] for s in read_index(shards)["shards"])
    kinds = {path: facts["kind"] for path, facts in manifest_of(run)["inputs"].items()}
    assert kinds[str(shards / name)] == "shard" and "stack" not in kinds.values()
    assert manifest_of(run)["inputs"][str(shards / name)]["sha256"] == hashing.sha256_of(shards / name)
    verdict = verify_run(run, Context())
    assert verdict.good and not verdict.notes and verdict.checked["inputs"] == 4


def test_an_edited_shard_stops_resume_and_replay_and_is_named_by_verify(shards, tmp_path):
    run = run_job(shards.parent / "job.toml", tmp_path / "run", Context(), quick_report).path
    flip_a_byte(shards / "shard-00000.h5")
    for words in (["resume", run, "--until", "ingest"], ["replay", "refine", run, "--out", tmp_path / "again"]):
        done = cryoiso_here(*words)
        assert done.returncode == EXIT_INPUT and done.stderr.count("error:") == 1
        assert f"{shards / 'shard-00000.h5'} has changed since this run started" in done.stderr
    (difference,) = verify_run(run, Context()).differences
    assert (difference.file, difference.by) == (str(shards / "shard-00000.h5"), "input")
    flip_a_byte(shards / "shard-00000.h5")
    resume_run(run, Context(), quick_report)
    assert replay_stage("refine", run, tmp_path / "replayed", Context()).identical


@pytest.mark.parametrize("how", ["gone", "cut"])
def test_a_shard_that_is_gone_or_cut_is_named(how, shards, tmp_path):
    run = run_job(shards.parent / "job.toml", tmp_path / "run", Context(), quick_report, until="reference").path
    shard = shards / "shard-00000.h5"
    shard.unlink() if how == "gone" else os.truncate(shard, 5000)
    with pytest.raises(InputError, match=rf"{shard}: a shard .*{'is gone' if how == 'gone' else '5000 bytes'}"):
        resume_run(run, Context(), quick_report)


def test_a_shard_edited_before_the_run_is_not_what_its_index_says(shards, tmp_path, caplog):
    job, star = shards.parent / "job.toml", shards.parent / "particles.star"
    flip_a_byte(shards / "shard-00000.h5")
    with pytest.raises(InputError, match=r"shard-00000.h5: a shard is not what its index.json says"):
        run_job(job, tmp_path / "run", Context())
    (tmp_path / "archived.mrcs").rename(shards.parent / "particles.mrcs")
    ingest_files(ParticlesSection(file=str(star)), shards, Context())
    assert "it is written again" in caplog.text
    run_job(job, tmp_path / "run", Context(), quick_report, go_on=True)
    assert verify_run(tmp_path / "run", Context()).good


def test_ingest_leaves_shards_that_are_as_its_index_says(shards, tmp_path):
    (tmp_path / "archived.mrcs").rename(shards.parent / "particles.mrcs")
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in shards.glob("*.h5")}
    index = read_index(shards)
    assert [s["sha256"] for s in index["shards"]] == [hashing.sha256_of(p) for p in sorted(before)]
    ingest_files(ParticlesSection(file=str(shards.parent / "particles.star")), shards, Context())
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in shards.glob("*.h5")} == before
    assert read_index(shards) == index


@pytest.mark.mpi
def test_ranks_name_an_edited_shard_once(shards, tmp_path):
    words, run = ["-m", "cryoiso.cli.main"], tmp_path / "run"
    run_mpi(2, [*words, "run", shards.parent / "job.toml", "--out", run, "--until", "reference"], 300)
    assert "sha256" in manifest_of(run)["inputs"][str(shards / "shard-00000.h5")]
    flip_a_byte(shards / "shard-00000.h5")
    done = run_mpi(3, [*words, "resume", run, "--until", "reference"], 300, check=False)
    assert done.returncode == EXIT_INPUT and done.stderr.count("error:") == 1 and "shard-00000.h5" in done.stderr


# --- hashes are made once, and signals are heeded


def stop_in(name: str, monkeypatch) -> None:
    """From now on the hashing of this file brings a signal, and does not end by itself."""

    def sha256_of(path, seen=None):
        while path.name == name:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.01)
            seen(1)
        return hashing.sha256_of(path, seen)

    monkeypatch.setattr(input_hashes, "sha256_of", sha256_of)


def read_from_now_on(monkeypatch) -> list[str]:
    """Names of the images' files that are hashed from now on, and a failure if the run waits for one."""
    read = []

    def sha256_of(path, seen=None):
        if path.suffix == ".mrcs":
            assert threading.current_thread() is not threading.main_thread()
            read.append(path.name)
        return hashing.sha256_of(path, seen)

    for module in ("stages.input_hashes", "records.manifest"):
        monkeypatch.setattr(f"cryoiso.pipeline.{module}.sha256_of", sha256_of)
    return read


def stopped_while_hashing(job: Path, run: Path) -> None:
    """A run that has hashed a.mrcs, and was stopped while it hashed b.mrcs."""
    with pytest.MonkeyPatch.context() as patch:
        stop_in("b.mrcs", patch)
        with pytest.raises(Interrupted, match="stopped by a signal"):
            run_job(job, run, Context(), quick_report)
    signals.clear()


def test_what_is_hashed_is_not_hashed_again(two_stacks, tmp_path, monkeypatch):
    stopped_while_hashing(two_stacks, tmp_path / "run")
    found = {Path(p).name: facts for p, facts in manifest_of(tmp_path / "run")["inputs"].items()}
    assert "sha256" in found["a.mrcs"] and "sha256" not in found["b.mrcs"]
    read = read_from_now_on(monkeypatch)
    resume_run(tmp_path / "run", Context(), quick_report)
    assert read == ["b.mrcs"] and verify_run(tmp_path / "run", Context()).good


def test_a_stack_that_was_touched_is_read_and_an_edited_one_refused(two_stacks, tmp_path, monkeypatch):
    stopped_while_hashing(two_stacks, tmp_path / "run")
    stack = two_stacks.with_name("a.mrcs")
    flip_a_byte(stack)
    os.utime(stack)
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "run/01_ingest").iterdir()}
    with pytest.raises(InputError, match=r"a.mrcs: a stack has changed since this run started \(expected sha256"):
        resume_run(tmp_path / "run", Context(), quick_report)
    assert made == {p: p.stat().st_mtime_ns for p in (tmp_path / "run/01_ingest").iterdir()}, "nothing is made of it"
    flip_a_byte(stack)
    os.utime(stack)
    read = read_from_now_on(monkeypatch)
    resume_run(tmp_path / "run", Context(), quick_report)
    assert sorted(read) == ["a.mrcs", "b.mrcs"] and verify_run(tmp_path / "run", Context()).good


def test_resume_heeds_a_signal_while_it_hashes(two_stacks, tmp_path, monkeypatch):
    """Stopped between the last hash and the end of ingest; then both stacks were given other times."""

    def stop(plan):
        raise Interrupted("stopped by a signal")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ingest, "_ingest_facts", stop)
        with pytest.raises(Interrupted):
            run_job(two_stacks, tmp_path / "run", Context(), quick_report)
    for name in STACKS:
        os.utime(two_stacks.with_name(name), (1e9, 1e9))
    stop_in("b.mrcs", monkeypatch)
    with pytest.raises(Interrupted, match="while inputs were hashed"):
        resume_run(tmp_path / "run", Context(), quick_report)
    last = json.loads((tmp_path / "run/journal.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["code"]) == ("stop", "stopped-by-signal")


# --- the container image


def digests(run: Path) -> list[str | None]:
    return [start["container"].get("digest") for start in manifest_of(run)["starts"]]


@pytest.fixture
def image(tmp_path, monkeypatch) -> Path:
    """An image file that this process says it runs in."""
    path = tmp_path / "c.sif"
    path.write_bytes(b"an image")
    monkeypatch.setenv("APPTAINER_CONTAINER", str(path))
    return path


@pytest.mark.parametrize("kind", ["all", "small"])
def test_a_start_after_ingest_has_the_digest_of_its_image(kind, data, tmp_path, quick, image, monkeypatch):
    monkeypatch.setattr("cryoiso.pipeline.records.manifest.HASH_LIMIT", 10)
    first, expected = tmp_path / "first.sif", f"sha256:{hashing.sha256_of(image)}"
    first.write_bytes(b"another image")
    monkeypatch.setenv("APPTAINER_CONTAINER", str(first))
    job = write_job(data, f"{kind}.toml", run_hash_inputs=kind)
    run = run_job(job, tmp_path / "run", Context(), until="ingest").path
    monkeypatch.setenv("APPTAINER_CONTAINER", str(image))
    resume_run(run, Context(), quick_report)
    assert digests(run) == [f"sha256:{hashing.sha256_of(first)}", expected] and verify_run(run, Context()).good


def test_the_same_image_is_read_once_and_a_replaced_one_again(data, tmp_path, quick, image, monkeypatch):
    run = run_job(data / "job.toml", tmp_path / "run", Context(), until="ingest").path
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(input_hashes, "Hasher", None)
        resume_run(run, Context(), until="reference")
    old = f"sha256:{hashing.sha256_of(image)}"
    image.write_bytes(b"AN IMAGE")
    resume_run(run, Context(), quick_report)
    assert digests(run) == [old, old, f"sha256:{hashing.sha256_of(image)}"]


def test_a_start_that_was_stopped_early_gets_the_digest_from_the_next(data, tmp_path, quick, image, monkeypatch):
    run = run_job(data / "job.toml", tmp_path / "run", Context(), until="ingest").path
    assert digests(run)[0]
    text = (run / "manifest.json").read_text()
    (run / "manifest.json").write_text(text.replace('"digest"', '"lost"'))
    with pytest.MonkeyPatch.context() as patch:
        stop_in(image.name, patch)
        with pytest.raises(Interrupted):
            resume_run(run, Context(), quick_report)
    assert digests(run) == [None, None]
    signals.clear()
    resume_run(run, Context(), quick_report)
    assert digests(run) == 3 * [f"sha256:{hashing.sha256_of(image)}"]
