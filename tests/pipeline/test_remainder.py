"""What is looked at before an interrupted run goes on: devices, memory and room for the stages that are left."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from errors_helper import raises_code
from pipeline_helper import cryoiso_here, quick_report, use_quick_parts

from cryoiso.core.errors import EXIT_MISSING, EXIT_OTHER, CryoisoError, MissingError
from cryoiso.io.atomic import DiskFullError
from cryoiso.parallel.context import Context
from cryoiso.pipeline.context import RunContext
from cryoiso.pipeline.job_inputs import Inputs
from cryoiso.pipeline.jobfile import read_resolved
from cryoiso.pipeline.planning.memory import needs_of
from cryoiso.pipeline.preflight import check_space
from cryoiso.pipeline.records.journal import Journal
from cryoiso.pipeline.records.run_folder import RunFolder
from cryoiso.pipeline.run import resume_run, run_job
from cryoiso.pipeline.site import machine
from cryoiso.pipeline.site.resume_check import _require_gpus_as_before, needs_left, stages_left


@pytest.fixture
def begun(data, tmp_path, quick) -> Path:
    """A run that is done up to the reference."""
    return run_job(data / "job.toml", tmp_path / "run", Context(), quick_report, until="reference").path


def say_gpus(run: Path) -> None:
    """The manifest says that the run was always started on a GPU."""
    manifest = json.loads((run / "manifest.json").read_text())
    for start in manifest["starts"]:
        start["machine"] = [{"host": "n1", "device": "cuda:0", "gpu": "NVIDIA X"}]
    (run / "manifest.json").write_text(json.dumps(manifest))


def no_gpu(monkeypatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def context_of(path: Path) -> tuple[RunContext, Inputs]:
    folder = RunFolder(path)
    run = RunContext(read_resolved(folder)[1], folder, Context(), journal=Journal(folder.journal))
    return run, Inputs(run.job, folder, run.comm)


def test_a_run_on_gpus_does_not_go_on_by_cpu_without_a_word(begun, monkeypatch):
    resume_run(begun, Context(), quick_report, until="refine")
    no_gpu(monkeypatch)
    say_gpus(begun)
    done = cryoiso_here("run", begun / "job.toml", "--out", begun, "--continue")
    assert done.returncode == EXIT_MISSING and done.stderr.count("error:") == 1
    for words in ("sees no GPU", "computed on GPUs before (NVIDIA X)", "cryoiso doctor", "run.device = 'cpu'"):
        assert words in done.stderr
    assert cryoiso_here("resume", begun, "--until", "reference").returncode == 0, "that needs no GPU"
    resolved = begun / "resolved.toml"
    resolved.write_text(resolved.read_text().replace('device = "auto"', 'device = "cpu"'))
    resume_run(begun, Context(), quick_report)
    lines = Journal(begun / "journal.jsonl").lines
    assert [line["stage"] for line in lines if line["event"] == "start"].count("ingest") == 1, "nothing is done again"


def test_a_run_that_only_read_images_on_a_host_with_gpus_goes_on_by_cpu(begun, monkeypatch):
    no_gpu(monkeypatch)
    say_gpus(begun)
    resume_run(begun, Context(), quick_report)


def test_networks_of_gpus_are_not_promised_on_cpus(begun, monkeypatch):
    resume_run(begun, Context(), quick_report, until="refine")
    no_gpu(monkeypatch)
    say_gpus(begun)
    run, _ = context_of(begun)
    run.job.run.workflow = "realign"
    run = replace(run, manifest=json.loads((begun / "manifest.json").read_text()))
    with raises_code("gpu-missing", MissingError) as caught:
        _require_gpus_as_before(run)
    assert "resolved.toml" not in str(caught.value)


def test_a_finished_run_is_looked_at_without_a_gpu(begun, monkeypatch):
    resume_run(begun, Context(), quick_report)
    say_gpus(begun)
    no_gpu(monkeypatch)
    resume_run(begun, Context(), quick_report)


def test_too_little_memory_is_told_before_a_stage_begins(begun, monkeypatch):
    little = {"memory_bytes": 2 << 30, "memory_free_bytes": 10 << 20, "memory_limit_bytes": None}
    monkeypatch.setattr(machine, "memory", lambda: little)
    with raises_code(
        "memory-short", CryoisoError, match=r"10 MiB a rank .* will need about .*Start fewer ranks"
    ) as caught:
        resume_run(begun, Context(), quick_report)
    assert caught.value.exit_code == EXIT_MISSING and not (begun / "03_refine").exists()
    monkeypatch.undo()
    with pytest.MonkeyPatch.context() as patch:
        use_quick_parts(patch)
        resume_run(begun, Context(), quick_report)
        patch.setattr(machine, "memory", lambda: little)
        resume_run(begun, Context(), quick_report)  # nothing is left to do


def test_a_full_disk_is_told_before_a_stage_begins(begun, monkeypatch):
    full = shutil.disk_usage(begun)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(DiskFullError, match=r"no space left on the disk.*needs .* 1000 bytes free") as caught:
        resume_run(begun, Context(), quick_report)
    assert caught.value.exit_code == EXIT_OTHER and not (begun / "03_refine").exists()


def test_only_what_is_left_is_asked_for(begun):
    run, inputs = context_of(begun)
    left = stages_left(run)
    assert left == ["refine", "reconstruct", "diagnose", "report"] and stages_left(run, "refine") == ["refine"]
    whole, rest = needs_of(inputs, 1), needs_left(inputs, 1, left)
    done = sum(p.stat().st_size for name in ("01_ingest", "02_reference") for p in (begun / name).iterdir())
    assert whole.disk_bytes - rest.disk_bytes == pytest.approx(done, rel=0.15)
    assert 0 < rest.files < whole.files and rest.memory_bytes == whole.memory_bytes
    assert needs_left(inputs, 1, ["diagnose"]).memory_bytes < whole.memory_bytes
    (begun / "03_refine").mkdir()
    (begun / "03_refine/half1.mrc").write_bytes(bytes(20_000))
    assert rest.disk_bytes - needs_left(inputs, 1, left).disk_bytes == 20_000, "half of the stage is there"


def test_copies_for_relion_that_are_there_are_not_asked_for_again(begun):
    """They lie in the stage's folder, and go when it ends."""
    _, inputs = context_of(begun)
    inputs.job.refine.engine, inputs.job.relion.images = "relion", "export"
    images = begun / "03_refine/relion/images"
    before = needs_left(inputs, 1, ["refine"]).disk_bytes
    images.mkdir(parents=True)
    for written in (20_000, 60_000):
        (images / "0.mrcs").write_bytes(bytes(written))
        assert before - needs_left(inputs, 1, ["refine"]).disk_bytes == written
    (images / "0.mrcs").write_bytes(bytes(2 * before))
    assert needs_left(inputs, 1, ["refine"]).disk_bytes == 0


def test_given_shards_need_no_room(data, tmp_path, quick, monkeypatch):
    _, inputs = context_of(run_job(data / "job.toml", tmp_path / "one", Context(), quick_report, until="ingest").path)
    box, _ = inputs.grid()
    need = 60 * 4 * box**3
    full = shutil.disk_usage(tmp_path)._replace(free=need + 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(DiskFullError):
        check_space(inputs)
    inputs.job.particles.file = str(tmp_path / "one/01_ingest")
    check_space(inputs)


def test_an_edited_job_leaves_everything_to_be_done(begun):
    resolved = begun / "resolved.toml"
    resolved.write_text(resolved.read_text().replace("seed = 1", "seed = 2"))
    assert stages_left(context_of(begun)[0])[0] == "ingest"


def test_stacks_that_no_stage_needs_may_be_gone(data, tmp_path, quick):
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    run = run_job(folder / "job.toml", tmp_path / "run", Context(), quick_report).path
    (run / "result/map.mrc").unlink()
    (folder / "particles.mrcs").unlink()
    journal = run / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(line for line in lines if '"report"' not in line and '"done"' not in line))
    resume_run(run, Context(), quick_report)
    assert (run / "result/map.mrc").exists()
