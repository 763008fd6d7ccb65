"""What a run keeps about itself, with anything in it: read right, or refused in the project's own words."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
from fuzz_helper import (
    bounded,
    byte_edits,
    edited,
    edits,
    examples,
    json_edits,
    pieces,
    refused_or,
    with_bytes,
    with_values,
    with_words,
)
from hypothesis import given
from hypothesis import strategies as st

from cryoiso.engines.relion import files as relion
from cryoiso.engines.relion.external import read_task
from cryoiso.io import checkpoint
from cryoiso.io.append_log import append, content, read_records
from cryoiso.io.shards import ShardSource
from cryoiso.parallel.context import Context
from cryoiso.pipeline.jobfile import read_resolved
from cryoiso.pipeline.records import lock
from cryoiso.pipeline.records.checksums import read_sums
from cryoiso.pipeline.records.journal import Journal, read_journal
from cryoiso.pipeline.records.manifest import read_manifest
from cryoiso.pipeline.reproduce.verify import verify_run

FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-"))


def changed_json(path: Path, changes: list) -> str:
    return json.dumps(with_values(json.loads(path.read_text()), changes), ensure_ascii=True)


RECORDS = ["manifest.json", "seal.json", "journal.jsonl", "result/SHA256SUMS", "01_ingest/index.json"]


@examples(120)
@given(
    name=st.sampled_from(RECORDS),
    changes=st.lists(edits, max_size=3),
    words=st.lists(st.tuples(st.floats(0, 1), pieces), max_size=2),
    values=json_edits,
    inside=st.booleans(),
)
def test_verify_never_falls_over_what_is_written(finished, name, changes, words, values, inside):
    path = finished / name
    whole = path.read_bytes()
    text = whole.decode()
    try:
        if inside and name.endswith(".json"):
            path.write_text(changed_json(path, values))
        elif inside and name.endswith(".jsonl"):
            lines = text.splitlines()
            at = int(values[0][0] * (len(lines) - 1))
            lines[at] = json.dumps(with_values(json.loads(lines[at]), values))
            path.write_text("\n".join(lines) + "\n")
        else:
            path.write_bytes(edited(with_words(text, words).decode("utf-8", "surrogatepass"), changes))
        refused_or(verify_run, finished, Context())
        refused_or(read_manifest, finished / "manifest.json")
        refused_or(read_journal, finished / "journal.jsonl")
        refused_or(read_sums, finished / "result/SHA256SUMS")
        source = refused_or(ShardSource, finished / "01_ingest")
        if source is not None:
            with source:
                images = refused_or(source.read, np.arange(len(source)))
            assert images is None or images.shape == (len(source), source.box_px, source.box_px)
    finally:
        path.write_bytes(whole)


@examples(80)
@given(changes=st.lists(edits, max_size=3), words=st.lists(st.tuples(st.floats(0, 1), pieces), max_size=3))
def test_resolved_jobs(finished, changes, words):
    from cryoiso.pipeline.records.run_folder import RunFolder

    path = finished / "resolved.toml"
    whole = path.read_bytes()
    try:
        path.write_bytes(edited(with_words(whole.decode(), words).decode("utf-8", "surrogatepass"), changes))
        refused_or(read_resolved, RunFolder(finished))
    finally:
        path.write_bytes(whole)


def test_the_finished_run_is_good_as_it_is(finished):
    assert verify_run(finished, Context()).good


@examples(80)
@given(st.lists(edits, max_size=3))
def test_a_journal_that_opens_can_be_continued(changes):
    path = FOLDER / "journal.jsonl"
    path.write_bytes(
        edited('{"time": "t", "event": "run"}\n{"time": "t", "event": "start", "stage": "ingest"}\n', changes)
    )
    journal = refused_or(Journal, path)
    if journal is not None:
        before = len(journal.lines)
        journal.append("stop", message="x")
        assert len(read_journal(path)) == before + 1


ARRAYS = {"a": np.arange(60, dtype=np.float32).reshape(3, 20), "b": np.array([1, 2, 3], np.int64)}
OLDER = {"a": np.zeros((3, 20), np.float32), "b": np.array([4, 5, 6], np.int64)}


@examples(200)
@given(byte_edits, st.floats(0, 1), st.floats(0, 1))
def test_a_damaged_checkpoint_gives_what_was_saved_or_nothing(changes, cut, where):
    path = FOLDER / "checkpoint.npz"
    checkpoint.remove(path)
    checkpoint.save(path, OLDER, {"iteration": 1})
    checkpoint.save(path, ARRAYS, {"iteration": 2})
    data = path.read_bytes()
    start = int(where * len(data))
    path.write_bytes(data[:start] + with_bytes(data[start:], changes, len(data), cut))
    found = refused_or(checkpoint.load, path)
    assert found is not None, "the generation before is whole"
    arrays, values = found
    expected = ARRAYS if values["iteration"] == 2 else OLDER
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name], array)
        assert arrays[name].dtype == array.dtype


@examples(100)
@given(byte_edits, st.floats(0, 1))
def test_kept_searches_give_what_was_saved_or_nothing(changes, cut):
    path = FOLDER / "kept.bin"
    path.unlink(missing_ok=True)
    records = [("first", b"abc" * 20), ("second", bytes(range(200)))]
    append(path, 0, records)
    path.write_bytes(with_bytes(path.read_bytes(), changes, 40, cut))
    for record in refused_or(read_records, path) or []:
        found = content(record)
        assert found is None or (record.key, found) in records


@examples(80)
@given(st.lists(edits, max_size=3), json_edits, st.booleans())
def test_locks(changes, values, inside):
    path = FOLDER / "lock.json"
    whole = json.dumps(lock._self())
    path.write_bytes(json.dumps(with_values(json.loads(whole), values)).encode() if inside else edited(whole, changes))
    with bounded():
        holder = lock._read(path)
        assert holder is None or isinstance(lock._is_stale(holder, path), bool)


TASK = """
data_external_reconstruct_general

_rlnExtReconsDataReal           run_it001_half1_class001_external_reconstruct_data_real.mrc
_rlnExtReconsDataImag           run_it001_half1_class001_external_reconstruct_data_imag.mrc
_rlnExtReconsWeight             run_it001_half1_class001_external_reconstruct_weight.mrc
_rlnExtReconsResult             run_it001_half1_class001_external_reconstruct.mrc
_rlnExtReconsResultStarfile     run_it001_half1_class001_external_reconstruct_out.star
_rlnTau2FudgeFactor             1.000000
_rlnPaddingFactor               2.000000
_rlnReferenceDimensionality     3
_rlnOriginalImageSize           8
_rlnCurrentImageSize            8

data_external_reconstruct_tau2

loop_
_rlnSpectralIndex #1
_rlnReferenceTau2 #2
_rlnGoldStandardFsc #3
0 1.0 1.0
1 0.5 0.9
2 0.2 0.5
3 0.1 0.2
4 0.0 0.0
"""
TASK_NAME = "run_it001_half1_class001_external_reconstruct.star"


@examples(120)
@given(st.lists(edits, max_size=3), st.lists(st.tuples(st.floats(0, 1), pieces), max_size=3))
def test_what_relion_hands_over(changes, words):
    path = FOLDER / TASK_NAME
    path.write_bytes(edited(with_words(TASK, words).decode("utf-8", "surrogatepass"), changes))
    task = refused_or(read_task, Path(TASK_NAME), FOLDER)
    if task is not None:
        assert all(file.parent.resolve() == FOLDER.resolve() for file in (*task.arrays, task.result))
        assert len(task.tau2) == task.box_px // 2 + 1 and 0 < task.current_px <= task.box_px and task.padding > 0
    for read in (relion.read_sampling, relion.read_model, relion.read_optimiser):
        refused_or(read, path)


def test_the_original_of_relion_is_read(tmp_path):
    (tmp_path / TASK_NAME).write_text(TASK)
    assert read_task(Path(TASK_NAME), tmp_path).tau2.tolist() == [1.0, 0.5, 0.2, 0.1, 0.0]
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
