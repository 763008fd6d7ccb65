"""Programs that a run folder names start in the user's own runs only, or when the user says so."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path

import pytest
from errors_helper import raises_code
from pipeline_helper import cryoiso_here, quick_report, write_job

from cryoiso.core.config import parse_job
from cryoiso.core.errors import EXIT_USAGE, InputError, UsageError
from cryoiso.parallel.context import Context
from cryoiso.pipeline.records import trust
from cryoiso.pipeline.reproduce.replay import replay_stage
from cryoiso.pipeline.reproduce.verify import verify_run
from cryoiso.pipeline.run import resume_run, run_job


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A state folder of its own; ``stranger`` is another one."""
    monkeypatch.setenv("CRYOISO_STATE_DIR", str(tmp_path / "me"))
    return tmp_path / "me"


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    return lambda: monkeypatch.setenv("CRYOISO_STATE_DIR", str(tmp_path / "somebody else"))


def job_with_program(data: Path, tmp_path: Path) -> Path:
    """A job whose post_command would leave a file; the workflow ``refine`` does not come to it, an edited one would."""
    return write_job(data, "program.toml", auxiliary_post_command=f"touch {tmp_path}/PWNED {{input}} {{output}}")


def begin(job: Path, folder: Path) -> Path:
    return run_job(job, folder, Context(), quick_report, until="reference").path


def edit(run: Path, old: str, new: str) -> None:
    text = (run / "resolved.toml").read_text()
    assert old in text
    (run / "resolved.toml").write_text(text.replace(old, new))


def test_the_key_is_made_once_and_is_private(home):
    one, two = trust._secret(make=True), trust._secret(make=True)
    assert one == two and len(one) == 64
    assert stat.S_IMODE((home / "run-key").stat().st_mode) == 0o600 and stat.S_IMODE(home.stat().st_mode) == 0o700
    assert [file.name for file in home.iterdir()] == ["run-key"]


def test_only_settings_about_programs_count():
    files = {"particles": {"file": "p.star"}, "reference": {"file": "r.mrc"}}
    assert trust.programs_of(parse_job(files)) == {}
    job = parse_job({**files, "relion": {"program": "/tmp/x", "extra": "--o /y"}, "auxiliary": {"rounds": 1}})
    assert trust.programs_of(job) == {"relion.program": "/tmp/x", "relion.extra": "--o /y"}


def test_ones_own_run_goes_on_wherever_it_is(data, tmp_path, quick, home):
    run = begin(job_with_program(data, tmp_path), tmp_path / "run")
    moved = Path(shutil.copytree(run, tmp_path / "moved"))
    resume_run(run, Context(), quick_report)
    resume_run(moved, Context(), quick_report)
    assert cryoiso_here("run", data / "program.toml", "--out", run, "--continue").returncode == 0
    assert replay_stage("reference", run, tmp_path / "again", Context()).identical


def test_a_requeued_job_goes_on_without_the_key_with_the_programs_of_its_own_job_file(
    data, tmp_path, quick, monkeypatch, caplog
):
    """Homes that compute nodes cannot write to, images that do not see them."""
    monkeypatch.setenv("CRYOISO_STATE_DIR", "/proc/none")
    job = job_with_program(data, tmp_path)
    run = begin(job, tmp_path / "run")
    assert json.loads((run / "manifest.json").read_text())["signature"]["mac"] == ""
    with raises_code("run-not-trusted", UsageError, match="resume --trust"):
        resume_run(run, Context(), quick_report, until="reference")
    run_job(job, run, Context(), quick_report, until="reference", go_on=True)
    assert "the programs that it names are those of your job file" in caplog.text
    edit(run, "touch", "true")
    with pytest.raises(UsageError, match="post_command = 'true"):
        run_job(job, run, Context(), quick_report, until="reference", go_on=True)
    edit(run, "true /", "touch /")
    (run / "out").symlink_to(tmp_path)
    with raises_code("run-not-trusted", UsageError, match="leads out of it"):
        run_job(job, run, Context(), quick_report, until="reference", go_on=True)


def test_programs_of_somebody_elses_run_want_trust(data, tmp_path, quick, home, stranger):
    run = run_job(job_with_program(data, tmp_path), tmp_path / "run", Context(), quick_report).path
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    stranger()
    other = write_job(data, "other.toml", auxiliary_post_command="true {input} {output}")
    for words in (("resume", run), ("replay", "reference", run, "--out", tmp_path / "again"),
                  ("run", other, "--out", run, "--continue")):  # fmt: skip
        done = cryoiso_here(*words)
        assert done.returncode == EXIT_USAGE and done.stderr.count("error:") == 1, done.stderr
        for text in ("not of a run that you have started", "auxiliary.post_command = 'touch", "cryoiso resume --trust"):
            assert text in done.stderr
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before and not (tmp_path / "again").exists()
    assert verify_run(run, Context()).good, "to look is allowed"
    assert replay_stage("reference", run, tmp_path / "again", Context(), trust=True).identical
    resume_run(run, Context(), quick_report, trust=True)
    resume_run(run, Context(), quick_report)  # from then on it is one's own: a requeued job needs no option


def test_a_signature_is_of_these_programs_alone(data, tmp_path, quick, home, caplog):
    run = begin(job_with_program(data, tmp_path), tmp_path / "run")
    edit(run, 'program = "relion_refine_mpi"', 'program = "/tmp/mine"')
    with pytest.raises(UsageError, match=r"programs were changed since you started.*relion\.program = '/tmp/mine'"):
        resume_run(run, Context(), quick_report)
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["signature"]["programs"]["relion.program"] = "/tmp/mine"  # without the key this is no signature
    (run / "manifest.json").write_text(json.dumps(manifest))
    with raises_code("run-not-trusted", UsageError):
        resume_run(run, Context(), quick_report)
    resume_run(run, Context(), quick_report, trust=True)
    assert "relion.program: 'relion_refine_mpi' -> '/tmp/mine'" in caplog.text


def test_an_edited_job_is_said_and_not_replayed(data, tmp_path, quick, home, caplog):
    run = run_job(data / "job.toml", tmp_path / "run", Context(), quick_report).path
    edit(run, "seed = 1", "seed = 2")
    with pytest.raises(InputError, match=r"resolved\.toml: was changed since the run: run\.seed: 1 -> 2"):
        replay_stage("reference", run, tmp_path / "again", Context())
    assert not (tmp_path / "again").exists()
    resume_run(run, Context(), quick_report)
    assert "was changed since the last start (run.seed: 1 -> 2); what depends on it is done again" in caplog.text
    assert replay_stage("refine", run, tmp_path / "again", Context()).identical


@pytest.mark.parametrize(
    "signed", [None, 7, {}, {"mac": "é", "programs": {}, "job_key": ""}, {"mac": "", "programs": 3}]
)
def test_a_run_without_a_signature_is_nobodys(data, tmp_path, quick, home, signed, caplog):
    """As of an earlier version; without programs it goes on, with a word."""
    run = begin(data / "job.toml", tmp_path / "run")
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**manifest, "signature": signed}))
    resume_run(run, Context(), quick_report, until="reference")
    assert "not of a run that you have started; it names no programs" in caplog.text


def test_links_out_of_somebody_elses_run_are_not_written_through(data, tmp_path, quick, home, stranger):
    run = begin(data / "job.toml", tmp_path / "run")
    (tmp_path / "precious").write_text("mine")
    (run / "logs/rank-0000.log").unlink()
    (run / "logs/rank-0000.log").symlink_to(tmp_path / "precious")
    stranger()
    with raises_code("run-not-trusted", UsageError, match=r"logs/rank-0000\.log leads out of it, to .*/precious"):
        resume_run(run, Context(), quick_report)
    assert (tmp_path / "precious").read_text() == "mine"


def test_without_a_place_for_the_key_a_run_says_so_at_its_start(data, tmp_path, quick, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CRYOISO_STATE_DIR", str(tmp_path / "file" / "state"))
    run = begin(job_with_program(data, tmp_path), tmp_path / "run")
    assert "cannot be signed as yours" in caplog.text and "CRYOISO_STATE_DIR" in caplog.text
    with pytest.raises(UsageError, match=r"--trust.*CRYOISO_STATE_DIR"):
        resume_run(run, Context(), quick_report)
    resume_run(run, Context(), quick_report, trust=True)


def test_the_key_lies_in_the_state_folder_of_the_home(monkeypatch, tmp_path):
    monkeypatch.delenv("CRYOISO_STATE_DIR")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert trust._folder() == tmp_path / ".local/state/cryoiso"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "s"))
    assert trust._folder() == tmp_path / "s/cryoiso"
