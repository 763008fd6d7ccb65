"""The engine through cryosparc-tools itself, over HTTP, to a stand-in of a server; **not** cryoSPARC.

Nothing of the library is replaced: its session file, its client and models, its streams and its repeated requests are
those of the installed package. Only the default of the address, which it reads when it is imported, is set.
"""

from __future__ import annotations

import json
import warnings
from datetime import UTC, datetime
from pathlib import Path

import mrcfile
import numpy as np
import pytest
from errors_helper import raises_code

pytest.importorskip("cryosparc.tools")
import cryosparc_stand_in as stand_in
from cryosparc import auth, tools
from cryosparc_helper import request, truth_of
from cryosparc_http import PASSWORD_TOKEN, USER, HttpServer

from cryoiso.core.errors import CryoisoError
from cryoiso.engines.cryosparc.engine import CryosparcEngine
from cryoiso.io import read_map, read_particles


def login(url: str) -> None:
    """A session as ``python -m cryosparc.tools login`` leaves it, in the user's configuration folder."""
    auth.get_default_auth_config_path.cache_clear()
    sessions = auth.InstanceAuthSessions({})
    sessions.insert(url, USER, auth.Token(access_token=PASSWORD_TOKEN, token_type="bearer"),
                    datetime(2100, 1, 1, tzinfo=UTC))  # fmt: skip
    sessions.save()


@pytest.fixture
def server(data, tmp_path, monkeypatch):
    """A server whose refinements find the true poses, and a login at it."""
    made = HttpServer(stand_in.Server(tmp_path / "P1", truth_of(data)))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(tools.CryoSPARC.__init__, "__defaults__", (made.url,))
    login(made.url)
    yield made
    made.close()
    auth.get_default_auth_config_path.cache_clear()


def test_poses_and_half_maps_come_back_through_the_library(data, server, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the library warns of answers that it does not understand
        result = CryosparcEngine().refine(
            request(data, tmp_path / "o", {"lane": "gpu", "params": {"refine_scale_min": True}})
        )
    truth = read_particles(data / "truth.star", "", ("pose",))
    assert np.array_equal(result.particles.uid, truth.uid) and np.array_equal(result.particles.half, truth.half)
    assert np.abs(result.particles.rotation - truth.rotation).max() < 1e-6
    assert np.abs(result.particles.shift_A - truth.shift_A).max() < 1e-4
    held, job = server.state.jobs["J1"], server.state.jobs["J2"]
    assert (held.kind, job.kind, job.queued, job.lane) == ("snowflake", "homo_refine_new", 1, "gpu")
    assert job.connections == {"particles": ("J1", "particles"), "volume": ("J1", "volume")}
    assert np.array_equal(held.tables["particles"]["alignments3D/split"], truth.half - 1)
    assert job.params["refine_symmetry"] == "C3" and job.params["refine_scale_min"] is True
    for half, letter in ((1, "A"), (2, "B")):
        theirs = read_map(tmp_path / f"P1/J2/half_{letter}.mrc").data
        np.testing.assert_array_equal(read_map(tmp_path / f"o/half{half}.mrc").data, theirs)
    assert any("cryosparc-tools/" in agent for agent in server.agents)
    assert PASSWORD_TOKEN not in (tmp_path / "o/refine.json").read_text()
    assert json.loads((tmp_path / "o/refine.json").read_text())["cryosparc"]["version"] == "v5.0.3-stand-in"


@pytest.mark.parametrize(
    "call",
    ["users.me", "jobs.create", "projects.upload_file", "jobs.save_output", "jobs.enqueue", "jobs.find_one",
     "jobs.load_output", "projects.download_file"],
)  # fmt: skip
@pytest.mark.parametrize("fault", [["503"], ["before"] * 4, ["after"]])
def test_faults_of_the_network(data, server, tmp_path, call, fault):
    """A busy server, a connection that breaks four times (the library gives up after three), an answer that is lost."""
    server.lose = {call: list(fault)}
    result = CryosparcEngine().refine(request(data, tmp_path / "o"))
    assert len(result.particles) == 60 and server.lose[call] == []
    project = tmp_path / "P1"  # a job whose creation is not answered stays there without files
    (reference,), (stack,) = list(project.rglob("reference.mrc")), list(project.rglob("*.mrcs"))
    ours = next((tmp_path / "o").rglob("reference.mrc"))  # the library repeats an upload with the rest of its stream
    assert reference.read_bytes() == ours.read_bytes()
    assert mrcfile.read(stack).shape == (60, 24, 24)
    queued = [job for job in server.state.jobs.values() if job.queued]
    assert [(job.kind, job.queued, job.status) for job in queued] == [("homo_refine_new", 1, "completed")]


def test_refusals_have_the_servers_reason_and_never_the_address(data, server, tmp_path):
    for number, (section, code, words) in enumerate(
        [
            ({"params": {"no_such_param": 1}}, "cryosparc-refused", "unknown job type or parameter"),
            ({"lane": "none"}, "cryosparc-not-found", "known: gpu"),
        ]
    ):
        with raises_code(code, CryoisoError, match=words) as caught:
            CryosparcEngine().refine(request(data, tmp_path / f"o{number}", section))
        assert "127.0.0.1" not in str(caught.value) and PASSWORD_TOKEN not in str(caught.value)
    server.state.fails = "CUDA out of memory"
    with raises_code("cryosparc-job-failed", CryoisoError, match="CUDA out of memory"):
        CryosparcEngine().refine(request(data, tmp_path / "p"))


def test_without_a_login(data, server, tmp_path):
    server.token = "another"
    with raises_code("cryosparc-not-logged-in", CryoisoError, match="status 401"):
        CryosparcEngine().refine(request(data, tmp_path / "o"))
    auth.get_default_auth_config_path().unlink()
    with raises_code("cryosparc-not-logged-in", CryoisoError, match="no login"):
        CryosparcEngine().refine(request(data, tmp_path / "o"))


def test_requests_are_those_of_the_librarys_source(server):
    """Every call that the stand-in serves exists in the library's own list of them, with its arguments."""
    stub = Path(tools.__file__).with_name("api.pyi").read_text()
    for call in server.calls:
        name = call.name.rpartition(".")[2]
        assert f"def {name}(" in stub, call.name
        at = [stub[i : i + 2500].split("->")[0] for i in _places(stub, f"def {name}(")]
        assert any(all(argument in text for argument in call.query) for text in at), call.name


def _places(text: str, word: str) -> list[int]:
    found, at = [], text.find(word)
    while at >= 0:
        found.append(at)
        at = text.find(word, at + 1)
    return found
