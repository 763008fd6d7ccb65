"""cryoSPARC as an engine that is interrupted: lost connections, killed jobs, restarts and signals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from cryosparc_helper import ledger_of, request
from errors_helper import raises_code

pytest.importorskip("cryosparc.tools")

from cryoiso.core.errors import CryoisoError, Interrupted
from cryoiso.engines.cryosparc.engine import CryosparcEngine
from cryoiso.parallel import signals


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "call", ["login", "create_external_job", "upload", "save_output", "create_job", "queue", "refresh", "load_output",
             "download_file"],
)  # fmt: skip
def test_a_lost_connection_makes_no_second_job(data, server, tmp_path, call, when):
    """Whether the request or its answer is lost."""
    out = tmp_path / "o"
    base = request(data, out)
    server.lose = {call: when}
    result = CryosparcEngine().refine(base)
    assert not server.lose and [job.kind for job in server.jobs.values()] == ["snowflake", "homo_refine_new"]
    assert server.jobs["J2"].queued == 1 and len(result.particles) == 60


@pytest.mark.parametrize("call", ["create_external_job", "create_job", "queue"])
def test_a_request_that_the_library_repeats_queues_nothing_twice(data, server, tmp_path, call):
    """cryosparc-tools sends a request again when its answer was lost: of a job made twice, one is never queued."""
    server.lose = {call: "twice"}
    CryosparcEngine().refine(request(data, tmp_path / "o"))
    assert not server.lose and sum(job.queued for job in server.jobs.values()) == 1
    assert sum(job.kind != "snowflake" and job.status == "completed" for job in server.jobs.values()) == 1


def test_a_killed_job_of_particles_is_filled_again(data, server, tmp_path):
    """Its files went with it."""
    base = request(data, tmp_path / "o", {"retry_min": 0})
    server.lose = {"save_output": "before"}
    upload = server.call

    def down_after(name: str, function: Callable[[], Any]) -> Any:
        if name == "save_output":
            server.down = True
        return upload(name, function)

    server.call = down_after
    with raises_code("cryosparc-unreachable"):
        CryosparcEngine().refine(base)
    assert ledger_of(tmp_path / "o")["uploaded"]
    server.call, server.down = upload, False
    server.jobs["J1"].status = "killed"
    for file in (tmp_path / "P1/J1").rglob("*.mrc*"):
        file.unlink()
    CryosparcEngine().refine(replace(base, resume=True))
    assert [job.kind for job in server.jobs.values()] == ["snowflake", "homo_refine_new"]
    assert list((tmp_path / "P1/J1/images").iterdir())


def test_a_restart_follows_the_job_that_is_there(data, server, tmp_path):
    """cryoSPARC stays away; later the same job is taken up, also with other settings that decide nothing."""
    out = tmp_path / "o"
    base = request(data, out, {"retry_min": 0})
    complete = server.complete
    server.complete = lambda job: setattr(server, "down", True)
    with raises_code("cryosparc-unreachable", CryoisoError, match="resume"):
        CryosparcEngine().refine(base)
    assert ledger_of(out)["jobs"] == {"particles": "J1", "refinement": "J2"}
    assert not list(out.glob("*.mrc")) and not (out / "refine.json").exists()
    server.down, server.complete = False, complete
    again = request(data, out, {"retry_min": 5}, resume=True)
    CryosparcEngine().refine(again)
    assert len(server.jobs) == 2 and server.jobs["J2"].queued == 1
    calls = list(server.calls)
    CryosparcEngine().refine(again)
    assert server.calls[len(calls) :] == ["login"]


@pytest.mark.parametrize(("on_stop", "status"), [("leave", "running"), ("kill", "killed")])
def test_a_signal_leaves_or_kills_the_job(data, server, tmp_path, monkeypatch, on_stop, status):
    """Then a resume takes its result, or queues the same job again."""
    base = request(data, tmp_path / "o", {"on_stop": on_stop})
    stopped = SimpleNamespace(now=False)
    monkeypatch.setattr(signals, "stop_signal", lambda: stopped.now)
    advance = server.advance

    def until_it_runs(job: Any) -> None:
        if job.status == "running":
            stopped.now = True
        else:
            advance(job)

    server.advance = until_it_runs
    with pytest.raises(Interrupted, match="P1-J2"):
        CryosparcEngine().refine(base)
    assert server.jobs["J2"].status == status
    server.advance, stopped.now = advance, False
    CryosparcEngine().refine(replace(base, resume=True))
    assert len(server.jobs) == 2 and server.jobs["J2"].queued == (1 if on_stop == "leave" else 2)


def test_a_failed_job_is_told_in_cryosparcs_words_and_queued_again_by_a_resume(data, server, tmp_path):
    base = request(data, tmp_path / "o")
    server.fails = "CUDA out of memory on worker 3"
    with raises_code("cryosparc-job-failed", CryoisoError, match="P1-J2 failed: CUDA out of memory on worker 3"):
        CryosparcEngine().refine(base)
    server.fails = ""
    CryosparcEngine().refine(replace(base, resume=True))
    assert len(server.jobs) == 2 and server.jobs["J2"].queued == 2
