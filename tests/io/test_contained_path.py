"""Names in the records of a run, an index or a list of checksums never lead out of their folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from errors_helper import raises_code
from pipeline_helper import cryoiso_here
from relion_helper import write_task

from cryoiso.core.errors import EXIT_INPUT, InputError
from cryoiso.engines.relion.external import read_task
from cryoiso.io.contained_path import contained_path, links_out, why_not_contained
from cryoiso.io.shards import ShardSource, read_index
from cryoiso.parallel.context import Context
from cryoiso.pipeline.records.checksums import read_sums
from cryoiso.pipeline.records.hashing import sha256_of
from cryoiso.pipeline.records.journal import Journal, read_journal
from cryoiso.pipeline.reproduce.replay import replay_stage
from cryoiso.pipeline.reproduce.verify import verify_run
from cryoiso.pipeline.run import resume_run

BAD = ["../.bash_login", "a/../../x", "/etc/passwd", "..", "", ".", "a\nb", "a\0b", "\x1b[2J", 7, None, "a" * 256]


def edit_journal(run: Path, name: str) -> None:
    """Adds a file to what the stage ``reference`` says that it made."""
    lines = [json.loads(row) for row in (run / "journal.jsonl").read_text().splitlines()]
    for line in lines:
        if line["event"] == "end" and line["stage"] == "reference":
            secret = run / name
            line["outputs"][name] = {"bytes": secret.stat().st_size, "sha256": sha256_of(secret)}
    (run / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("name", BAD)
def test_a_name_that_leads_out_is_refused(name, tmp_path):
    with raises_code("record-leaves-folder", InputError):
        contained_path(tmp_path, name, "journal.jsonl", 3)


@pytest.mark.parametrize("name", ["a", "04_reconstruct/half1.mrc", "a..b/..c", "Å/ä.mrc", "a b", "a" * 255])
def test_a_name_inside_is_taken(name, tmp_path):
    assert contained_path(tmp_path, name, "x") == tmp_path / name and not why_not_contained(name)


def test_no_record_of_a_run_names_a_file_outside(copy, tmp_path, quick):
    (copy.parent / ".bash_login").write_text("echo mine\n")
    edit_journal(copy, "../.bash_login")
    message = r"journal.jsonl, row \d+: a file name in it leads out of the folder"
    for attempt in (
        lambda: replay_stage("refine", copy, tmp_path / "out" / "again", Context()),
        lambda: resume_run(copy, Context()),
        lambda: verify_run(copy, Context()),
        lambda: read_journal(copy / "journal.jsonl"),
        lambda: Journal(copy / "journal.jsonl"),
    ):
        with raises_code("record-leaves-folder", InputError, match=message):
            attempt()
    assert not (tmp_path / "out").exists()  # nothing was linked, neither inside nor beside
    done = cryoiso_here("verify", copy)
    assert done.returncode == EXIT_INPUT and "Traceback" not in done.stderr and ".bash_login" in done.stderr


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd"])
def test_the_seal_and_the_checksums_name_no_file_outside(copy, name):
    seal = json.loads((copy / "seal.json").read_text())
    seal["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    (copy / "seal.json").write_text(json.dumps(seal))
    with raises_code("record-leaves-folder", InputError, match=r"seal.json: a file name in it"):
        verify_run(copy, Context())
    sums = copy / "result/SHA256SUMS"
    sums.write_text(sums.read_text() + f"{'0' * 64}  {name}\n")
    with raises_code("record-leaves-folder", InputError, match=r"SHA256SUMS, row \d+: a file name in it"):
        read_sums(sums)


@pytest.mark.parametrize(
    "edit", [{"files": [1]}, {"files": {"a": 3}}, {"files": {"a": {"bytes": 1}}}, {"digest": 5}, {"time": None}]
)
def test_a_seal_of_another_form_is_an_error(copy, edit):
    seal = json.loads((copy / "seal.json").read_text())
    (copy / "seal.json").write_text(json.dumps({**seal, **edit}))
    with raises_code("record-damaged", InputError, match=r"seal.json: not a valid seal \(expected"):
        verify_run(copy, Context())


def test_checksums_that_are_no_text_are_an_error(copy):
    (copy / "result/SHA256SUMS").write_bytes(b"\xff" * 70)
    with raises_code("file-unreadable", InputError, match=r"SHA256SUMS: cannot be read.*UTF-8"):
        verify_run(copy, Context())


@pytest.mark.parametrize("name", ["../shard-00000.h5", "/etc/passwd"])
def test_an_index_names_no_shard_outside(copy, name):
    file = copy / "01_ingest/index.json"
    shutil.copy(copy / "01_ingest/shard-00000.h5", copy)  # it would be found there
    index = json.loads(file.read_text())
    index["shards"][0]["file"] = name
    file.write_text(json.dumps(index))
    for attempt in (read_index, ShardSource):
        with raises_code("record-leaves-folder", InputError, match=r"index.json: a file name in it"):
            attempt(copy / "01_ingest")


def test_links_that_lead_out_are_found(tmp_path):
    run = tmp_path / "run"
    (run / "a").mkdir(parents=True)
    (run / "a/in").symlink_to(run / "x")
    (run / "a/relative").symlink_to("../b")
    (run / "a/out").symlink_to("/etc")
    (run / "up").symlink_to("../other")
    assert links_out(run) == [run / "a/out", run / "up"]
    os.symlink(run, tmp_path / "alias")
    assert links_out(tmp_path / "alias") == [tmp_path / "alias/a/out", tmp_path / "alias/up"]


def test_relion_names_no_file_in_another_folder(tmp_path):
    """RELION writes its arrays beside their STAR file; the map that answers is written there and nowhere else."""
    (tmp_path / "job").mkdir()
    star = write_task(tmp_path / "job", 16, 1, 16)
    text = star.read_text().replace(f" {star.stem}", f" job/{star.stem}")  # as RELION does: from where it runs
    star.write_text(text)
    assert read_task(Path("job") / star.name, tmp_path).result == star.with_suffix(".mrc")
    for name in ("job/../secret.mrc", "/tmp/elsewhere.mrc", "other.mrc"):
        star.write_text(text.replace(f"Result job/{star.stem}.mrc", f"Result {name}"))
        with raises_code("relion-file-invalid", InputError, match="names a file in another folder"):
            read_task(Path("job") / star.name, tmp_path)
