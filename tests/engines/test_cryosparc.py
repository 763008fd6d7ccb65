"""cryoSPARC as an engine, against a stand-in for it; nothing here has spoken to a real cryoSPARC."""

from __future__ import annotations

import functools
import inspect
import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from cryosparc_helper import _made, request
from errors_helper import raises_code
from mpi_helper import run_mpi

pytest.importorskip("cryosparc.tools")
import cryosparc_stand_in as stand_in

from cryoiso.core.config import parse_job
from cryoiso.core.errors import CryoisoError, MissingError, UsageError
from cryoiso.core.types import Particles
from cryoiso.engines.cryosparc.engine import CryosparcEngine
from cryoiso.engines.native import NativeEngine
from cryoiso.io import read_map, read_particles
from cryoiso.io.conventions import to_cryosparc_frame
from cryoiso.io.sources import ArraySource, StackSource
from cryoiso.methods.auxiliary.corefine import co_refine
from cryoiso.parallel.context import Context
from cryoiso.physics.filters import lowpass
from cryoiso.physics.so3 import angular_distance_deg
from cryoiso.physics.symmetry import point_group
from cryoiso.pipeline.stages.engines import require_engine

SECRET = "correct-horse-battery"


def parameters(function: Any) -> list[tuple[str, Any]]:
    """Names and kinds, without self."""
    return [(p.name, p.kind) for p in inspect.signature(function).parameters.values() if p.name != "self"]


def test_cryosparc_stand_in_has_the_librarys_face():
    """The same arguments as in the library that is installed, and the fields that its models have."""
    from cryosparc import tools
    from cryosparc.controllers.job import ExternalJobController, JobController
    from cryosparc.controllers.project import ProjectController
    from cryosparc.models.event import TextEvent
    from cryosparc.models.job import Job, RunError

    job = "refresh queue kill clear load_output"
    external = "start stop mkdir upload add_output alloc_output save_output"
    project = "find_workspace create_external_job create_job find_job find_external_job find_jobs download_file"
    compared = 0
    for ours, theirs, names in (
        (stand_in.Job, JobController, job), (stand_in.ExternalJob, ExternalJobController, external),
        (stand_in.Project, ProjectController, project), (stand_in.CryoSPARC, tools.CryoSPARC, "find_project get_lanes"),
    ):  # fmt: skip
        for name in names.split():
            if name == "find_jobs":
                theirs_here = {n for n, _ in parameters(theirs.find_jobs)}
                assert {"workspace_uid", "order"} <= theirs_here, theirs_here
            else:
                assert parameters(getattr(ours, name)) == parameters(getattr(theirs, name)), name
            compared += 1
        for name in ("status", "desc", "outputs"):
            assert isinstance(inspect.getattr_static(JobController, name), property)
    assert compared == 21
    assert dict(parameters(tools.CryoSPARC))["timeout"] == inspect.Parameter.KEYWORD_ONLY
    assert {"version", "deleted", "queue_message", "errors_run", "description"} <= set(Job.model_fields)
    assert {"message", "warning"} <= set(RunError.model_fields) and {"text", "type"} <= set(TextEvent.model_fields)
    statuses = set(Job.model_fields["status"].annotation.__args__)
    assert {"building", "queued", "running", "completed", "killed", "failed"} <= statuses


def test_poses_and_half_maps_come_back(data, server, tmp_path, monkeypatch, caplog):
    """By uid from reversed rows; both jobs made once, half-sets sent beside the poses, nothing temporary left."""
    caplog.set_level(logging.INFO, "cryoiso")
    seen: list[Any] = []
    monkeypatch.setattr("cryoiso.engines.cryosparc.errand.PROGRESS_S", 0.0)
    section = {"lane": "gpu", "params": {"refine_scale_min": True}}
    sent = request(data, tmp_path / "o", section, on_checkpoint=seen.append)
    result = CryosparcEngine().refine(sent)
    truth = read_particles(data / "truth.star", "", ("pose",))
    assert np.array_equal(result.particles.uid, truth.uid) and np.array_equal(result.particles.half, truth.half)
    assert np.abs(result.particles.rotation - truth.rotation).max() < 1e-6
    assert np.abs(result.particles.shift_A - truth.shift_A).max() < 1e-4
    held, job = server.jobs["J1"], server.jobs["J2"]
    assert len(server.jobs) == 2 and job.queued == 1 and job.lane == "gpu" and job.kind == "homo_refine_new"
    assert np.array_equal(held.tables["particles"]["alignments3D/split"], truth.half - 1)
    expected = {"refine_symmetry": "C3", "refine_gs_resplit": False, "refine_res_init": 20.0, "refine_scale_min": True}
    assert job.params == expected
    for half, letter in ((1, "A"), (2, "B")):
        theirs = read_map(tmp_path / f"P1/J2/half_{letter}.mrc").data
        np.testing.assert_array_equal(read_map(tmp_path / f"o/half{half}.mrc").data, theirs)
    record = json.loads((tmp_path / "o/refine.json").read_text())
    assert record["engine"] == "cryosparc" and record["cryosparc"]["uid"] == "J2"
    assert record["cryosparc"]["version"] == "v5.0.3-stand-in" and [r["iteration"] for r in seen] == [1]
    assert not list((tmp_path / "o").rglob("*.part"))
    log = caplog.text
    assert "P1-J2: queued" in log and "P1-J2: running" in log and "P1-J2: completed" in log
    assert "-- Iteration 1" in log, "a line of its own log"


def test_the_native_engine_behind_the_stand_in_gives_what_it_gives_alone(data, server, tmp_path):
    """Images, CTFs, half-sets and reference survive the way to cryoSPARC, poses and half-maps the way back."""
    base = request(data, tmp_path / "o")
    alone = replace(
        base, folder=_made(tmp_path / "alone"), program=None,
        reference=replace(base.reference, data=lowpass(base.reference.data, 7.0, 20.0)),
    )  # fmt: skip
    expected = NativeEngine().refine(alone)

    def refine(rows: np.ndarray, root: Path, job: Any, source: dict[str, Any]) -> tuple[Particles, dict[int, Path]]:
        inside = replace(
            alone, source=StackSource(stand_in.particles_of(rows, root)), folder=_made(root / "native"),
            reference=read_map(root / source["volume"]["map/path"][0]), symmetry=job.params["refine_symmetry"],
            lowpass_A=job.params["refine_res_init"],
        )  # fmt: skip
        found = NativeEngine().refine(inside)
        return found.particles, found.half_maps

    server.refine = refine
    result = CryosparcEngine().refine(base)
    assert not np.array_equal(result.particles.rotation, np.tile(np.eye(3), (60, 1, 1)))
    moved = angular_distance_deg(result.particles.rotation, expected.particles.rotation, point_group("C3"))
    assert moved.max() < 1e-3
    for half in (1, 2):
        ours, theirs = (read_map(tmp_path / f / f"half{half}.mrc").data for f in ("o", "alone"))
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


def test_a_co_refinement_gives_half_maps_of_the_raw_particles_alone(data, server, tmp_path):
    """Auxiliary particles go to cryoSPARC with the raw ones, and leave no trace in the half-maps."""
    plain = request(data, tmp_path / "plain", {"half_maps": "reconstruct"})
    CryosparcEngine().refine(plain)
    p = plain.source.particles
    others = ArraySource(np.flip(plain.source.read(np.arange(len(p))), 0), replace(p, uid=p.uid + np.uint64(1)))
    joint = replace(plain, folder=_made(tmp_path / "joint"))
    found = co_refine(CryosparcEngine(), joint, others, Context(), pooled=True)
    assert len(server.jobs["J3"].tables["particles"]) == 120 and len(found.auxiliary) == 60
    truth = read_particles(data / "truth.star", "", ("pose",))
    assert np.abs(found.raw.rotation - truth.rotation).max() < 1e-6
    for name in ("half1.mrc", "half2.mrc"):
        assert (tmp_path / "joint" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


RANKS = """
import sys
from pathlib import Path
import cryosparc.tools
from cryosparc_helper import request, truth_of
from cryosparc_stand_in import Server
import test_cryosparc as here
from cryoiso.parallel.context import get_context
data, out = map(Path, sys.argv[1:])
comm = get_context()
def session(**options):
    assert comm.rank == 0, "only rank 0 speaks to cryoSPARC"
    return server.session(**options)
if comm.rank == 0:
    server = Server(out / "P1", truth_of(data))
cryosparc.tools.CryoSPARC = session
result = here.CryosparcEngine().refine(request(data, out / "o", {"half_maps": "reconstruct"}), comm)
assert len(result.particles) == 60
if comm.rank == 0:
    assert len(server.jobs) == 2
    server.root = out / "Q1"
    server.fails = "no GPU"
try:
    here.CryosparcEngine().refine(request(data, out / "p", {"half_maps": "reconstruct"}), comm)
except here.CryoisoError as error:
    assert error.code == "cryosparc-job-failed" and "no GPU" in str(error), error
    print("told")
"""


@pytest.mark.mpi
def test_two_ranks_give_what_one_gives(data, server, tmp_path):
    """And an error of cryoSPARC is an error of every rank."""
    CryosparcEngine().refine(request(data, tmp_path / "one", {"half_maps": "reconstruct"}))
    script = RANKS.replace("sys.argv[1:]", repr((str(data), str(_made(tmp_path / "two")))))
    path = os.pathsep.join([*map(str, (Path(__file__).parent, Path(stand_in.__file__).parent)), *sys.path])
    done = run_mpi(2, script, env={"PYTHONPATH": path})
    assert done.stdout.count("told") == 2
    for name in ("half1.mrc", "half2.mrc", "particles.star"):
        one, two = ((tmp_path / f / name).read_bytes() for f in ("one", "two/o"))
        assert one == two, name


def test_a_missing_particle_is_an_error(data, server, tmp_path):
    refine = server.refine

    def lose_one(*given: Any) -> Any:
        posed, maps = refine(*given)
        return posed.take(np.arange(1, len(posed))), maps

    server.refine = lose_one
    with raises_code("cryosparc-particles-lost", CryoisoError, match=r"60 were given, 59 came back, 1 are missing"):
        CryosparcEngine().refine(request(data, tmp_path / "o"))
    assert not list((tmp_path / "o").glob("*.*"))


def test_changed_half_sets_and_a_volume_without_half_maps_are_refused(data, server, tmp_path):
    refine = server.refine
    server.refine = lambda *given: (lambda posed, maps: (replace(posed, half=3 - posed.half), maps))(*refine(*given))
    with raises_code("command-result-invalid", CryoisoError, match="half-sets"):
        CryosparcEngine().refine(request(data, tmp_path / "a"))
    server.refine = lambda *given: (refine(*given)[0], {})
    with raises_code("cryosparc-result-invalid", CryoisoError, match="map_half_A"):
        CryosparcEngine().refine(request(data, tmp_path / "b"))
    result = CryosparcEngine().refine(request(data, tmp_path / "c", {"half_maps": "reconstruct"}))
    one, two = (read_map(result.half_maps[h]).data for h in (1, 2))
    assert np.corrcoef(one.ravel(), two.ravel())[0, 1] > 0.3


def test_odd_dihedral_symmetry_goes_through_cryosparcs_frame(data, server, tmp_path):
    """Projections of the map that is sent, at the poses that come back in its frame, are those of ours."""
    from cryoiso.engines.cryosparc.frame import in_cryosparcs_frame

    truth = read_particles(data / "truth.star", "", ("pose",))
    result = CryosparcEngine().refine(request(data, tmp_path / "o", symmetry="D7"))
    assert np.abs(result.particles.rotation - truth.rotation).max() < 1e-6
    ball = np.zeros((24, 24, 24), np.float32)
    z, y, x = np.indices(ball.shape) - 12
    spot = np.array([4.0, 1.0, -3.0])  # x, y, z from the centre
    ball = np.exp(-((x - spot[0]) ** 2 + (y - spot[1]) ** 2 + (z - spot[2]) ** 2) / 4).astype(np.float32)
    theirs = in_cryosparcs_frame(ball, "D7")
    centre = np.array([np.sum(theirs * axis) for axis in (x, y, z)]) / theirs.sum()
    seen = to_cryosparc_frame(truth.rotation, "D7") @ centre
    assert np.abs(seen - truth.rotation @ spot).max() < 0.02


def test_references_of_half_sets_are_joined_only_where_half_sets_share(data, server, tmp_path):
    """Finer than refine.join_halves_A nothing of either half-set reaches the other."""
    base = request(data, tmp_path / "o")
    rng = np.random.default_rng(1)
    halves = {
        h: replace(base.reference, data=base.reference.data + rng.normal(0, 1, (24, 24, 24)).astype(np.float32))
        for h in (1, 2)
    }
    CryosparcEngine().refine(replace(base, half_references=halves))
    sent = np.abs(np.fft.fftn(read_map(tmp_path / "P1/J1/reference.mrc").data))
    k = np.fft.fftfreq(24, 7.0)
    radius = np.sqrt(k[:, None, None] ** 2 + k[:, None] ** 2 + k**2)
    assert sent[radius > 1 / 30].max() < 1e-3 * sent.max() and server.jobs["J2"].params["refine_res_init"] == 40.0
    none = base.settings.model_copy(update={"join_halves_A": 0.0})
    with raises_code("options-conflict", UsageError, match="join_halves_A"):
        CryosparcEngine().refine(replace(base, half_references=halves, settings=none))


def test_a_local_refinement_sends_poses_mask_and_extent(data, server, tmp_path):
    truth = read_particles(data / "truth.star", "", ("image", "ctf", "pose"))
    base = replace(request(data, tmp_path / "o", local_deg=5.0), source=StackSource(truth))
    with raises_code("option-missing", UsageError, match="mask"):
        CryosparcEngine().refine(base)
    ones = replace(base.reference, data=np.ones_like(base.reference.data))
    CryosparcEngine().refine(replace(base, mask=ones))
    held, job = server.jobs["J1"], server.jobs["J2"]
    assert job.kind == "new_local_refine" and job.params["init_r_extent"] == 5.0
    assert (
        job.connections["mask"] == ("J1", "mask") and np.abs(held.tables["particles"]["alignments3D/pose"]).max() > 0.1
    )


def test_the_library_itself_without_a_server(data, tmp_path, monkeypatch):
    """The installed cryosparc-tools: no address, no login, and an address where nothing answers."""
    from cryosparc import tools

    real, nowhere = tools.CryoSPARC, "http://localhost:1"
    unset = {"base_url": None, "host": None, "base_port": None, "email": None, "password": None}
    base = request(data, tmp_path / "o", {"retry_min": 0})
    for given, code, words in (
        ({}, "cryosparc-not-logged-in", "address"),
        ({"base_url": nowhere}, "cryosparc-not-logged-in", "no login"),
        ({"base_url": nowhere, "email": "me", "password": SECRET}, "cryosparc-unreachable", "retry_min"),
    ):
        monkeypatch.setattr(tools, "CryoSPARC", functools.partial(real, **{**unset, **given}))
        with raises_code(code, CryoisoError, match=words):
            CryosparcEngine().refine(base)


def test_no_credentials_are_written(data, server, tmp_path, monkeypatch, caplog):
    """Neither files nor log nor messages, though the library's own errors repeat them."""
    caplog.set_level(logging.DEBUG)
    for name in ("PASSWORD", "LICENSE_ID", "EMAIL"):
        monkeypatch.setenv(f"CRYOSPARC_{name}", f"{SECRET}-{name}")
    monkeypatch.setenv("CRYOSPARC_BASE_URL", f"http://me:{SECRET}@stand-in")
    server.lose = {"create_job": "after", "refresh": "before"}
    CryosparcEngine().refine(request(data, tmp_path / "o"))

    def refused(**options: Any) -> Any:
        answer = httpx.Response(401, request=httpx.Request("GET", f"http://me:{SECRET}@stand-in"))
        raise RuntimeError(f"token {SECRET}") from httpx.HTTPStatusError(
            SECRET, request=answer.request, response=answer
        )

    monkeypatch.setattr("cryosparc.tools.CryoSPARC", refused)
    with raises_code("cryosparc-not-logged-in", CryoisoError, match="401") as caught:
        CryosparcEngine().refine(request(data, tmp_path / "p"))
    assert SECRET not in str(caught.value) and SECRET not in caplog.text
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) > 10 and not any(SECRET.encode() in file.read_bytes() for file in written)


def test_what_is_wrong_is_found_before_anything_runs(data, server, tmp_path, monkeypatch):
    def job(**section: Any) -> Any:
        common = {"particles": {"file": "p.star"}, "reference": {"file": "r.mrc"}, "refine": {"engine": "cryosparc"}}
        workflow = section.pop("workflow", "refine")
        return parse_job({**common, "cryosparc": section, "run": {"workflow": workflow}})

    good = {"project": "P1", "workspace": "W1"}
    require_engine(job(**good))
    require_engine(job(**good, params="{refine_scale_min = true}"))
    for section, code, words in (
        ({"workspace": "W1"}, "option-missing", "cryosparc.project"),
        ({**good, "project": "P9"}, "cryosparc-not-found", "project P9"),
        ({**good, "workspace": "W9"}, "cryosparc-not-found", "workspace P1-W9"),
        ({**good, "lane": "cpu"}, "cryosparc-not-found", "known: gpu"),
        ({**good, "params": {"refine_gs_resplit": True}}, "options-conflict", "half-sets"),
        ({**good, "workflow": "realign"}, "options-conflict", "reference"),
        ({**good, "job": "local"}, "option-missing", "sample.mask"),
    ):
        with raises_code(code, match=words):
            require_engine(job(**section))
    with raises_code("job-bad-value", UsageError, match="params"):
        job(**good, params="refine_scale_min")
    with raises_code("cryosparc-refused", match="no_such_param"):
        CryosparcEngine().refine(request(data, tmp_path / "o", {"params": {"no_such_param": 1}}))
    monkeypatch.setattr("cryosparc.tools.CryoSPARC", _raising(ValueError("no session")))
    with raises_code("cryosparc-not-logged-in", match="CRYOSPARC_BASE_URL"):
        require_engine(job(**good))
    monkeypatch.setitem(sys.modules, "cryosparc", None)
    with raises_code("program-missing", MissingError, match=r"cryoiso\[cryosparc\]"):
        require_engine(job(**good))


def _raising(error: Exception) -> Callable[..., Any]:
    def call(**options: Any) -> Any:
        raise error

    return call
