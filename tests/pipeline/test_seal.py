"""Manifest, seal, verify and replay: what a run says of itself, and whether a folder still is what the run left."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from mpi_helper import run_mpi
from pipeline_helper import (
    QuickEngine,
    cryoiso,
    cryoiso_here,
    hash_files,
    quick_report,
    use_quick_parts,
    write_job,
)

from cryoiso.core.errors import EXIT_INPUT, EXIT_OTHER, EXIT_USAGE, InputError, Interrupted
from cryoiso.io.mrc import read_map, write_map
from cryoiso.parallel import signals
from cryoiso.parallel.context import Context
from cryoiso.pipeline.records import environment
from cryoiso.pipeline.records.hashing import sha256_of, share_by_size
from cryoiso.pipeline.records.journal import Journal
from cryoiso.pipeline.reproduce.compare import compare_files
from cryoiso.pipeline.reproduce.replay import replay_stage
from cryoiso.pipeline.reproduce.verify import verify_run
from cryoiso.pipeline.run import resume_run, run_job
from cryoiso.pipeline.stages import input_hashes


def damage(path: Path) -> None:
    with open(path, "r+b") as stream:
        stream.seek(-3, os.SEEK_END)
        stream.write(b"xyz")


# --- manifest and seal


def test_manifest_says_what_was_done_with_what(finished, data):
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["config"]["sample"]["symmetry"] == "C3" and len(manifest["job_key"]) == 64
    stack = manifest["inputs"][str(data / "particles.mrcs")]
    assert stack["kind"] == "stack" and stack["sha256"] == sha256_of(data / "particles.mrcs")
    (start,) = manifest["starts"]
    assert start["machine"][0]["cpu"] and start["packages"]["matplotlib"] and start["threads"] >= 1
    assert len(start["git"].get("commit", 40 * "0")) == 40
    stages = {stage["name"]: stage for stage in manifest["stages"]}
    assert list(stages) == ["ingest", "reference", "refine", "reconstruct", "diagnose", "report"]
    assert stages["ingest"]["ended"] >= stages["ingest"]["started"] and stages["refine"]["key"]
    half = stages["reconstruct"]["outputs"]["04_reconstruct/half1.mrc"]
    assert half["sha256"] == sha256_of(finished / "04_reconstruct/half1.mrc")


def test_seal_covers_every_file_but_logs_and_timings(finished):
    seal = json.loads((finished / "seal.json").read_text())
    there = {str(p.relative_to(finished)) for p in finished.rglob("*") if p.is_file()}
    left_out = {name for name in there if name.startswith("logs/") or name.endswith("timing.json")} | {"seal.json"}
    assert set(seal["files"]) == there - left_out and "03_refine/timing.json" in left_out
    assert all(facts["sha256"] == sha256_of(finished / name) for name, facts in seal["files"].items())
    lines = "".join(f"{seal['files'][name]['sha256']}  {name}\n" for name in sorted(seal["files"]))
    assert hashlib.sha256(lines.encode()).hexdigest() == seal["digest"]


def test_digest_of_results_is_that_of_the_job_not_of_the_start(finished, data, tmp_path, quick):
    again = run_job(data / "job.toml", tmp_path / "again", Context(), quick_report).path
    resume_run(again, Context(), quick_report)
    first, second = (json.loads((p / "seal.json").read_text()) for p in (finished, again))
    assert first["digest_of_results"] == second["digest_of_results"] and first["digest"] != second["digest"]
    assert verify_run(again, Context()).good  # the second start is sealed too


def test_large_stacks_are_hashed_unless_not_wanted(data, tmp_path, quick, monkeypatch):
    monkeypatch.setattr("cryoiso.pipeline.records.manifest.HASH_LIMIT", 10)
    for kind in ("all", "small"):
        run = run_job(write_job(data, f"{kind}.toml", run_hash_inputs=kind), tmp_path / kind, Context()).path
        stack = json.loads((run / "manifest.json").read_text())["inputs"][str(data / "particles.mrcs")]
        assert ("sha256" in stack) == (kind == "all") and stack["bytes"] > 10
    verdict = verify_run(tmp_path / "small", Context())
    assert verdict.good and any("sizes alone" in note for note in verdict.notes)


def test_a_stop_signal_ends_the_hashing(data, tmp_path, quick, monkeypatch):
    def slowly(path, seen):
        while True:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.01)
            seen(1)

    monkeypatch.setattr(input_hashes, "sha256_of", slowly)
    with pytest.raises(Interrupted, match="stopped by a signal"):
        run_job(data / "job.toml", tmp_path / "run", Context(), quick_report)
    monkeypatch.undo()
    signals.clear()
    with pytest.MonkeyPatch.context() as patch:
        use_quick_parts(patch)
        resume_run(tmp_path / "run", Context(), quick_report)
    verdict = verify_run(tmp_path / "run", Context())
    assert verdict.good and verdict.checked["inputs"] == 4


def test_an_unreadable_stack_is_named(tmp_path):
    hasher = input_hashes.Hasher([str(tmp_path / "gone.mrcs")])
    hasher._thread.join()
    assert isinstance(hasher.error, InputError) and "gone.mrcs" in str(hasher.error)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_ranks_share_bytes_not_names(ranks):
    sizes = [10 << 20, 900 << 20, 5, 300 << 20, 300 << 20, 300 << 20, 0]
    owner = share_by_size(sizes, ranks)
    load = [sum(s for s, o in zip(sizes, owner) if o == rank) for rank in range(ranks)]
    assert sum(load) == sum(sizes) and max(load) <= max(900 << 20, 1.1 * sum(sizes) / ranks)


def test_container_and_batch_job_are_told_by_the_environment(tmp_path):
    image, labels, nodes = tmp_path / "c.sif", tmp_path / "labels.json", tmp_path / "nodes"
    image.write_bytes(b"12345")
    labels.write_text('{"org.label-schema.build-date": "Monday"}')
    found = environment.container({"APPTAINER_CONTAINER": str(image), "CRYOISO_IMAGE_DIGEST": "sha256:ab"}, labels)
    assert found["image"] == str(image) and found["bytes"] == 5 and found["digest"] == "sha256:ab"
    assert found["labels"] == {"org.label-schema.build-date": "Monday"}
    slurm = environment.batch_job({"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_RESTART_COUNT": "1"})
    assert slurm == {"name_of_system": "Slurm", "job": "7", "nodes": "n[1-2]", "restarts": "1"}
    nodes.write_text("a\na\nb\n")
    assert environment.batch_job({"PBS_JOBID": "8.s", "PBS_NODEFILE": str(nodes)})["nodes"] == "a,b"
    assert environment.batch_job({}) == {}


def test_the_image_of_a_container_is_hashed_with_the_stacks(data, tmp_path, quick, monkeypatch):
    image = tmp_path / "c.sif"
    image.write_bytes(b"an image")
    monkeypatch.setenv("SINGULARITY_CONTAINER", str(image))
    run = run_job(data / "job.toml", tmp_path / "run", Context()).path
    (start,) = json.loads((run / "manifest.json").read_text())["starts"]
    assert start["container"]["digest"] == f"sha256:{sha256_of(image)}"


# --- verify


def test_a_copied_run_is_as_it_was(copy):
    verdict = verify_run(copy, Context())
    assert verdict.good and verdict.sealed and verdict.checked["inputs"] == 4 and not verdict.notes
    assert verdict.checked["outputs"] > 20


@pytest.mark.parametrize(
    "name, by", [("01_ingest/shard-00000.h5", "ingest"), ("result/half1.mrc", "report"), ("job.toml", "seal")]
)
def test_a_changed_file_is_found(copy, name, by):
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*")}
    damage(copy / name)
    verdict = verify_run(copy, Context())
    assert not verdict.good and verdict.state == "finished"
    first = verdict.differences[0]
    assert (first.file, first.by, first.problem) == (name, by, "has another content") and first.since and first.modified
    after = {p: p.stat().st_mtime_ns for p in copy.rglob("*")}
    assert {p for p in before.keys() | after.keys() if before.get(p) != after.get(p)} == {copy / name}


def test_a_lost_a_torn_and_a_strange_file_are_found(copy):
    (copy / "03_refine/particles.star").unlink()
    with open(copy / "02_reference/reference.mrc", "ab") as stream:
        stream.write(b"more")
    (copy / "result/mine.txt").write_text("a note")
    verdict = verify_run(copy, Context(), inputs=False)
    assert {(d.file, d.problem) for d in verdict.differences} == {
        ("03_refine/particles.star", "is gone"), ("02_reference/reference.mrc", "has another size"),
    }  # fmt: skip
    assert any("result/mine.txt" in note for note in verdict.notes)


def test_a_changed_record_is_found(copy):
    """Who changes a result and its line in the journal is betrayed by the seal, and the other way round."""
    damage(copy / "result/map.mrc")
    text = (copy / "journal.jsonl").read_text()
    old = json.loads((copy / "seal.json").read_text())["files"]["result/map.mrc"]["sha256"]
    (copy / "journal.jsonl").write_text(text.replace(old, sha256_of(copy / "result/map.mrc")))
    found = {d.file for d in verify_run(copy, Context()).differences}
    assert "journal.jsonl" in found and "result/map.mrc" in found  # the latter against SHA256SUMS
    seal = (copy / "seal.json").read_text()
    (copy / "seal.json").write_text(seal.replace(old, sha256_of(copy / "result/map.mrc")))
    assert "seal.json" in {d.file for d in verify_run(copy, Context()).differences}


def test_inputs_that_changed_or_went(data, tmp_path, quick):
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    run = run_job(folder / "job.toml", tmp_path / "run", Context()).path
    damage(folder / "particles.mrcs")
    (folder / "truth.star").unlink()
    verdict = verify_run(run, Context())
    assert [(d.file, d.by) for d in verdict.differences] == [(str(folder / "particles.mrcs"), "input")]
    assert verdict.notes == [f"not there: input {folder / 'truth.star'}"]
    assert verify_run(run, Context(), inputs=False).good


def test_an_unfinished_run_is_said_to_be_unfinished(data, tmp_path, quick, monkeypatch):
    def fail(*a, **k):
        raise InputError("no more", code="file-unreadable")

    monkeypatch.setattr(QuickEngine, "refine", fail)
    with pytest.raises(InputError):
        run_job(data / "job.toml", tmp_path / "run", Context())
    done = cryoiso_here("verify", tmp_path / "run")
    assert done.returncode == EXIT_INPUT
    assert "UNFINISHED not done: refine, reconstruct, diagnose, report; the run ended with an error" in done.stdout
    assert "DIFFERENT" not in done.stdout


def test_a_run_killed_before_its_seal_is_unfinished(data, tmp_path, quick, monkeypatch):
    monkeypatch.setattr("cryoiso.pipeline.run.write_seal", lambda *a: None)
    run = run_job(data / "job.toml", tmp_path / "run", Context(), quick_report).path
    assert "not sealed" in verify_run(run, Context()).unfinished
    monkeypatch.undo()
    resume_run(run, Context(), quick_report)
    assert verify_run(run, Context()).good


def test_command_verify(copy, tmp_path):
    done = cryoiso_here("verify", copy, "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["good"] and found["differences"] == []
    damage(copy / "result/fsc.xml")
    done = cryoiso_here("verify", copy, "--inputs", "skip")
    assert done.returncode == EXIT_INPUT and "DIFFERENT  result/fsc.xml has another content" in done.stdout
    assert cryoiso_here("verify", tmp_path / "nothing").returncode == EXIT_USAGE


# --- replay


@pytest.mark.parametrize("stage", ["ingest", "reference", "refine", "reconstruct", "diagnose", "report"])
def test_a_stage_done_again_is_identical(stage, finished, tmp_path, quick):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    found = replay_stage(stage, finished, tmp_path / "again", Context(), quick_report)
    assert found.identical and found.same > 0, found.as_dict()
    assert json.loads((tmp_path / "again/replay.json").read_text())["identical"]
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before


@pytest.mark.parametrize("inside", [False, True])
def test_replay_writes_beside_the_run_by_default(copy, quick, monkeypatch, inside):
    """As printed in the README, 'replay STAGE RUN'; also where RUN is the present folder."""
    monkeypatch.chdir(copy if inside else copy.parent)
    done = cryoiso_here("replay", "reconstruct", "." if inside else "copy")
    assert done.returncode == 0, done.stderr
    assert json.loads((copy.parent / "copy-replay-reconstruct" / "replay.json").read_text())["identical"]
    assert cryoiso_here("replay", "reconstruct", copy).returncode == EXIT_USAGE  # not over an earlier one


def test_another_seed_is_told_in_poses_and_fsc(finished, tmp_path, quick, monkeypatch):
    real = QuickEngine.refine

    def otherwise(self, request, comm):
        object.__setattr__(request, "seed", request.seed + 1)
        real(self, request, comm)

    monkeypatch.setattr(QuickEngine, "refine", otherwise)
    found = replay_stage("refine", finished, tmp_path / "again", Context())
    assert not found.identical and "differ" in found.verdict and "rounding" not in found.verdict
    star = next(one for one in found.different if one.file == "03_refine/particles.star")
    assert star.numbers["different_poses"] > 0 and "particles have another pose" in star.words


def test_replay_refuses_what_it_cannot_judge(copy, tmp_path, quick, finished):
    for words in (["polish", copy, "--out", tmp_path / "a"], ["refine", finished, "--out", finished / "b"]):
        assert cryoiso_here("replay", *words).returncode == EXIT_USAGE
    damage(copy / "02_reference/reference.mrc")
    done = cryoiso_here("replay", "refine", copy, "--out", tmp_path / "c")
    assert done.returncode == EXIT_INPUT and "[run-inputs-changed]" in done.stderr
    assert not (tmp_path / "c").exists()


def test_maps_are_compared_by_what_matters(tmp_path):
    rng = np.random.default_rng(1)
    one = rng.normal(size=(16, 16, 16)).astype(np.float32)
    write_map(tmp_path / "a.mrc", one, 2.0)
    for name, noise, rounding in (("b.mrc", 1e-6, True), ("c.mrc", 0.3, False)):
        write_map(tmp_path / name, one + noise * rng.normal(size=one.shape), 2.0)
        found = compare_files(name, tmp_path / "a.mrc", tmp_path / name, "C1")
        assert found is not None and found.rounding == rounding
        assert found.numbers["relative_difference"] == pytest.approx(noise, rel=0.1)
        assert found.numbers["fsc_lowest"] > (0.999999 if rounding else 0.3)


def test_texts_are_the_same_but_for_their_folder(tmp_path):
    for name, key in (("old", 1), ("new", 1), ("other", 2)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"maps": f"/runs/{name}/half1.mrc", "n": key}))
    names = {"/runs/old": "/runs/new"}
    assert compare_files("f", tmp_path / "old.json", tmp_path / "new.json", "C1", names) is None
    found = compare_files("f", tmp_path / "old.json", tmp_path / "other.json", "C1", names)
    assert found is not None and "n (by 0.5 of its value)" in found.words


# --- the real program, on ranks


@pytest.mark.mpi
def test_verify_and_replay_on_ranks(data, tmp_path):
    """The real engine: run on two ranks, verified on three, replayed on one and on three."""
    words = ["-m", "cryoiso.cli.main"]
    run_mpi(2, [*words, "run", data / "job.toml", "--out", tmp_path / "run"], 600)
    before = hash_files(tmp_path / "run")
    done = run_mpi(3, [*words, "verify", tmp_path / "run"], 300)
    assert done.stdout.count("all as the run left it") == 1
    assert cryoiso("replay", "reconstruct", tmp_path / "run", "--out", tmp_path / "reconstruct").returncode == 0
    done = run_mpi(3, [*words, "replay", "refine", tmp_path / "run", "--out", tmp_path / "refine"], 300)
    assert "identical" in done.stdout
    assert hash_files(tmp_path / "run") == before
    damage(tmp_path / "run/04_reconstruct/half2.mrc")
    done = run_mpi(2, [*words, "verify", tmp_path / "run"], 300, check=False)
    assert done.returncode == EXIT_INPUT and done.stdout.count("DIFFERENT") == 1
    assert Journal(tmp_path / "run/journal.jsonl").lines[-1]["event"] == "done"
    assert EXIT_OTHER == 1 and read_map(tmp_path / "run/result/half2.mrc").box_px == 24
