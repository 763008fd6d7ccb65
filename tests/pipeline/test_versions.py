"""A run folder of another version or with damaged records: one clear error, or a note; nothing in it is touched."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from errors_helper import raises_code
from pipeline_helper import cryoiso_here, forget_signals, hash_files, quick_report, simulate, use_quick_parts, write_job

from cryoiso import __version__
from cryoiso.core.errors import CryoisoError, InputError
from cryoiso.parallel.context import Context
from cryoiso.pipeline import run as pipeline_run
from cryoiso.pipeline.records import lock
from cryoiso.pipeline.reproduce.replay import replay_stage
from cryoiso.pipeline.reproduce.verify import verify_run
from cryoiso.pipeline.run import resume_run, run_job


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    simulate(folder)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    use_quick_parts(monkeypatch)
    monkeypatch.setattr("cryoiso.report.build", quick_report)
    yield
    forget_signals()


def edit(file: Path, change: Callable[[dict], Any]) -> None:
    facts = json.loads(file.read_text())
    made = change(facts)
    file.write_text(json.dumps(facts if made is None else made))


def as_version(run: Path, version: str) -> None:
    """As if another version had made the run."""

    def change(manifest: dict) -> None:
        manifest["cryoiso"] = version
        for start in manifest["starts"]:
            start["cryoiso"] = version

    edit(run / "manifest.json", change)
    journal = run / "journal.jsonl"
    journal.write_text(journal.read_text().replace(f'"cryoiso": "{__version__}"', f'"cryoiso": "{version}"'))
    (run / "seal.json").unlink(missing_ok=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- versions


def test_another_version_goes_on_only_when_told_to(copy, finished):
    """Refused without a change; with --other-version the same result, and both versions in journal and manifest."""
    as_version(copy, "9.9.9")
    shutil.rmtree(copy / "05_diagnose")
    before = contents(copy)
    done = cryoiso_here("resume", copy)
    assert done.returncode == 65 and done.stderr.count("error:") == 1
    assert f"expected cryoiso {__version__}, found cryoiso 9.9.9" in done.stderr and "--other-version" in done.stderr
    job = copy / "job.toml"
    again = cryoiso_here("run", job, "--out", copy, "--continue")
    assert again.returncode == 65 and "--other-version" in again.stderr
    assert contents(copy) == before
    done = cryoiso_here("resume", copy, "--other-version")
    assert done.returncode == 0 and "made by cryoiso 9.9.9, this is" in done.stderr, done.stderr
    assert hash_files(copy) == hash_files(finished)
    line = [json.loads(row) for row in (copy / "journal.jsonl").read_text().splitlines()]
    (resumed,) = [one for one in line if one["event"] == "resume"]
    assert resumed["cryoiso"] == __version__ and resumed["goes_on_from"] == "9.9.9"
    starts = json.loads((copy / "manifest.json").read_text())["starts"]
    assert [one["cryoiso"] for one in starts] == ["9.9.9", __version__] and starts[1]["goes_on_from"] == "9.9.9"
    verdict = verify_run(copy, Context())
    assert verdict.good and verdict.made_by.startswith(f"cryoiso 9.9.9, then {__version__}")
    resume_run(copy, Context(), quick_report)  # this version worked on it last


def test_an_unfinished_stage_of_another_version_begins_anew(data, tmp_path, monkeypatch):
    """Its checkpoint is of that version."""
    run, real = tmp_path / "run", pipeline_run.hash_outputs

    def broken(folder, places, comm):
        if any("refine" in place for place in places):
            raise CryoisoError("broken off", code="relion-failed")
        return real(folder, places, comm)

    monkeypatch.setattr(pipeline_run, "hash_outputs", broken)
    with pytest.raises(CryoisoError, match="broken off"):
        run_job(write_job(data), run, Context(), quick_report)
    monkeypatch.setattr(pipeline_run, "hash_outputs", real)
    last = json.loads((run / "journal.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["message"], last["code"]) == ("error", "broken off", "relion-failed")
    assert "(broken off [relion-failed])" in verify_run(run, Context()).unfinished
    same = Path(shutil.copytree(run, tmp_path / "same"))
    as_version(run, "0.0.1")
    for folder, anew in ((run, True), (same, False)):
        resume_run(folder, Context(), quick_report, other_version=True)
        lines = [json.loads(row) for row in (folder / "journal.jsonl").read_text().splitlines()]
        starts = [line for line in lines if line["event"] == "start" and line["stage"] == "refine"]
        assert [line["resumed"] for line in starts] == [False, not anew]


def test_verify_and_replay_name_the_versions(copy, tmp_path):
    verdict = verify_run(copy, Context())
    assert verdict.good and re.match(rf"cryoiso {re.escape(__version__)}, .*torch \S+, numpy \S+", verdict.made_by)
    assert not [note for note in verdict.notes if "made" in note and "not made" not in note]
    as_version(copy, "9.9.9")
    edit(copy / "manifest.json", lambda m: m["starts"][-1]["packages"].update(torch="0.4.1"))
    done = cryoiso_here("verify", copy)
    assert "made by cryoiso 9.9.9" in done.stdout and f"made by cryoiso 9.9.9, this is {__version__}" in done.stdout
    assert re.search(r"made with other packages.*torch 0\.4\.1, here \d", done.stdout)
    found = replay_stage("reconstruct", copy, tmp_path / "again", Context())
    assert found.identical and found.made_by.startswith("cryoiso 9.9.9") and "torch 0.4.1" in found.made_by
    record = json.loads((tmp_path / "again/replay.json").read_text())
    assert record["made_by"] == found.made_by and record["replayed_by"] == f"cryoiso {__version__}"


@pytest.mark.parametrize("schema", [1, 99])
def test_records_of_another_schema_are_not_read(copy, tmp_path, schema):
    edit(copy / "manifest.json", lambda m: m.update(schema=schema, cryoiso="9.9.9"))
    before = contents(copy)
    words = f"expected schema 2, cryoiso {__version__}, found schema {schema}, cryoiso 9.9.9"
    for work in (
        lambda: resume_run(copy, Context(), other_version=True), lambda: verify_run(copy, Context()),
        lambda: replay_stage("diagnose", copy, tmp_path / "again", Context()),
    ):  # fmt: skip
        with pytest.raises(InputError, match=re.escape(words)):
            work()
    assert contents(copy) == before and not (tmp_path / "again").exists()


def test_a_job_that_a_later_version_wrote(copy, tmp_path):
    """Its keys are not known here: the version is named, not the key alone."""
    as_version(copy, "9.9.9")
    with (copy / "resolved.toml").open("a") as stream:
        stream.write("\n[future]\nx = 1\n")
    for work in (
        lambda: verify_run(copy, Context()), lambda: replay_stage("diagnose", copy, tmp_path / "again", Context()),
    ):  # fmt: skip
        with pytest.raises(InputError, match=r"cryoiso 9\.9\.9 made this run.*future"):
            work()


# --- damaged records


def journal(change: Callable[[list[dict]], Any]) -> Callable[[Path], None]:
    def spoil(run: Path) -> None:
        lines = [json.loads(row) for row in (run / "journal.jsonl").read_text().splitlines()]
        lines = change(lines) or lines
        (run / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    return spoil


def line(text: bytes) -> Callable[[Path], None]:
    def spoil(run: Path) -> None:
        with (run / "journal.jsonl").open("ab") as stream:
            stream.write(text + b"\n")

    return spoil


def manifest(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    return lambda run: edit(run / "manifest.json", change)


def folder_instead(name: str) -> Callable[[Path], None]:
    def spoil(run: Path) -> None:
        (run / name).unlink(missing_ok=True)
        (run / name).mkdir()

    return spoil


def text_of(name: str, text: bytes) -> Callable[[Path], None]:
    return lambda run: (run / name).write_bytes(text) and None


SPOILT = {
    "a list as line": line(b"[1]"),
    "null as line": line(b"null"),
    "an empty object": line(b"{}"),
    "an empty line": line(b""),
    "NaN as line": line(b"NaN"),
    "a nested line": line(b"[" * 100_000 + b"]" * 100_000),
    "a long number": line(b"9" * 5000),
    "no text": line(b"\xff\xfe"),
    "a time that is none": line(b'{"time": "now", "event": "done"}'),
    "no outputs": journal(lambda lines: [{k: v for k, v in one.items() if k != "outputs"} for one in lines]),
    "no key": journal(lambda lines: [{k: v for k, v in one.items() if k != "key"} for one in lines]),
    "outputs in a list": journal(lambda lines: [{**one, "outputs": [1]} if "outputs" in one else one for one in lines]),
    "no hash": journal(lambda lines: [{**one, "outputs": {"a": {}}} if "outputs" in one else one for one in lines]),
    "journal is a folder": folder_instead("journal.jsonl"),
    "inputs in a list": manifest(lambda m: m.update(inputs=[1])),
    "an input is a number": manifest(lambda m: m.update(inputs={"/etc/passwd": 3})),
    "an input without size": manifest(lambda m: m.update(inputs={"/etc/passwd": {"sha256": "x"}})),
    "no inputs": manifest(lambda m: m.pop("inputs") and None),
    "no stacks": manifest(lambda m: m.pop("stacks") and None),
    "starts is a number": manifest(lambda m: m.update(starts=3)),
    "a start is a number": manifest(lambda m: m.update(starts=[3])),
    "no schema": manifest(lambda m: m.pop("schema") and None),
    "a list as manifest": text_of("manifest.json", b"[]"),
    "a nested manifest": text_of("manifest.json", b"[" * 100_000),
    "a manifest that is no text": text_of("manifest.json", b"\xff"),
    "a nested job": text_of("resolved.toml", b"a=" + b"[" * 50_000),
    "a job that is no text": text_of("resolved.toml", b"\xff\xfe"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_damaged_records_are_one_clear_error(copy, tmp_path, how):
    """In resume, verify and replay; nothing of the run is touched."""
    SPOILT[how](copy)
    before = contents(copy)
    for command in (("resume", copy), ("verify", copy), ("replay", "diagnose", copy, "--out", tmp_path / "again")):
        done = cryoiso_here(*command)
        assert done.returncode in (2, 65), (command, done.stdout, done.stderr)
        assert done.stderr.count("error:") == 1 and "Traceback" not in done.stderr, done.stderr
        assert re.search(r"journal\.jsonl|manifest\.json|resolved\.toml", done.stderr), done.stderr
    assert contents(copy) == before


@pytest.mark.parametrize("text", ["{}", "[]", "3", '{"host": 5, "pid": 1}', '{"host": "h", "pid": "x"}', "[" * 100_000])
def test_a_lock_that_names_nobody_is_that_of_a_run_that_died(tmp_path, monkeypatch, text):
    """Respected for a few seconds, in which a run may be writing it; then taken over."""
    path = tmp_path / "lock.json"
    path.write_text(text)
    with raises_code("run-locked", CryoisoError), lock.locked(path):
        pass
    monkeypatch.setattr(lock, "_age_s", lambda path: 6.0)
    with lock.locked(path):
        assert json.loads(path.read_text())["pid"] > 0
