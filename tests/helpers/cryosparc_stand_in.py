"""A stand-in for a cryoSPARC, **not** cryoSPARC: it has the face that cryosparc-tools 5 shows to programs.

Names, arguments and statuses are those of that library's source, and ``test_cryosparc_stand_in_has_the_librarys_face``
compares them with the installed one. What cryoSPARC itself does behind it (fields of tables, when a job fails, what its
refinements find) is not in the library: fields are those of .cs files, and a function of the test refines.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
from cryosparc.dataset import Dataset
from cryosparc.errors import APIError

from cryoiso.io import read_cs
from cryoiso.io.cs_write import fields_of_particles

_BLOB = [("path", "O"), ("idx", "u4"), ("shape", "u4", (2,)), ("psize_A", "f4"), ("sign", "f4"), ("import_sig", "u8")]
_MAP = [("path", "O"), ("idx", "u4"), ("shape", "u4", (3,)), ("psize_A", "f4")]
_CTF = [
    ("type", "O"), ("exp_group_id", "u4"), ("accel_kv", "f4"), ("cs_mm", "f4"), ("amp_contrast", "f4"), ("df1_A", "f4"),
    ("df2_A", "f4"), ("df_angle_rad", "f4"), ("phase_shift_rad", "f4"), ("scale", "f4"), ("scale_const", "f4"),
    ("shift_A", "f4", (2,)), ("tilt_A", "f4", (2,)), ("trefoil_A", "f4", (2,)), ("tetra_A", "f4", (4,)),
    ("anisomag", "f4", (4,)), ("bfactor", "f4"),
]  # fmt: skip
_ALIGNMENTS = [
    ("split", "u4"), ("shift", "f4", (2,)), ("pose", "f4", (3,)), ("psize_A", "f4"), ("error", "f4"), ("class", "u4"),
]  # fmt: skip
FIELDS = {"blob": _BLOB, "ctf": _CTF, "alignments3D": _ALIGNMENTS, "map": _MAP, "mask": _MAP}
REGISTER = {  # job type -> inputs that must be connected
    "homo_refine_new": ("particles", "volume"),
    "nonuniform_refine_new": ("particles", "volume"),
    "new_local_refine": ("particles", "volume", "mask"),
}


class Server:
    """What stays when a session is gone: jobs and files.

    Args:
        root: folder of project P1, which has workspace W1.
        refine: (particles as a structured array, folder of the project, job) -> posed Particles in the order of the
            array, and half -> map file.
    """

    def __init__(self, root: Path, refine: Callable[..., Any]) -> None:
        self.root, self.refine, self.jobs = root, refine, {}
        self.lose: dict[str, str] = {}
        """Call -> what happens to it once: its connection is lost "before" or "after" it has worked, or it is made
        "twice"."""
        self.fails, self.down, self.calls = "", False, []

    def session(self, base_url: Any = None, **options: Any) -> CryoSPARC:
        return CryoSPARC(self, **options)

    def call(self, name: str, function: Callable[[], Any]) -> Any:
        self.calls.append(name)
        when = self.lose.pop(name, "")
        if self.down or when == "before":
            raise httpx.ConnectError("lost")
        value = function()
        if when == "twice":  # the library itself repeats a request whose answer was lost
            return function()
        if when == "after":
            raise httpx.ReadTimeout("lost")
        return value

    def refuse(self, status: int, detail: str = "") -> APIError:
        response = httpx.Response(status, request=httpx.Request("POST", "http://stand-in/api"))
        return APIError("Received error response", res=response, data={"detail": detail})

    def new(self, kind: str, **facts: Any) -> str:
        uid = f"J{len(self.jobs) + 1}"
        self.jobs[uid] = SimpleNamespace(
            uid=uid, kind=kind, status="building", desc="", outputs={}, tables={}, connections={}, params={},
            deleted=False, looks=0,
            version="v5.0.3-stand-in", queue_message=None, errors_run=[], log=[], lane=None, queued=0, **facts,
        )  # fmt: skip
        (self.root / uid).mkdir(parents=True)
        return uid

    def advance(self, job: Any) -> None:
        """Of a job that is in the queue or runs: the next status."""
        if job.status == "queued":
            job.status = "running"
            job.log.append(SimpleNamespace(type="text", text="-- Iteration 1"))
        elif job.status == "running" and not job.looks:
            job.looks += 1
        elif job.status == "running":
            if self.fails:
                job.status = "failed"
                job.errors_run = [SimpleNamespace(message=self.fails, warning=False)]
            else:
                self.complete(job)

    def complete(self, job: Any) -> None:
        source = {k: self.jobs[uid].tables[name] for k, (uid, name) in job.connections.items()}
        particles, maps = self.refine(source["particles"].to_records(fixed=True), self.root, job, source)
        fields = fields_of_particles(particles)
        table = Dataset({name: fields[name] for name in fields.dtype.names}).to_pystrs()
        job.tables["particles"] = table
        columns: dict[str, Any] = {"uid": np.array([1], np.uint64)}
        for half, letter in ((1, "A"), (2, "B")):
            if half in maps:
                shutil.copy(maps[half], self.root / job.uid / f"half_{letter}.mrc")
                columns[f"map_half_{letter}/path"] = np.array([f"{job.uid}/half_{letter}.mrc"], object)
        job.tables["volume"] = Dataset(columns)
        job.status = "completed"


class CryoSPARC:
    def __init__(self, server: Server, *, timeout: int = 300) -> None:
        self._server = server
        server.call("login", lambda: None)
        logs = lambda project_uid, job_uid, *, checkpoint=None: server.jobs[job_uid].log  # noqa: E731
        self.api = SimpleNamespace(jobs=SimpleNamespace(get_event_logs=logs))

    def find_project(self, project_uid: str) -> Project:
        if project_uid != "P1":
            raise self._server.refuse(404)
        return Project(self)

    def get_lanes(self) -> list[Any]:
        return [SimpleNamespace(name="gpu")]


class Project:
    uid = "P1"

    def __init__(self, cs: CryoSPARC) -> None:
        self.cs, self._server = cs, cs._server

    def find_workspace(self, workspace_uid: str) -> Any:
        if workspace_uid != "W1":
            raise self._server.refuse(404)
        return SimpleNamespace(uid=workspace_uid)

    def create_external_job(self, workspace_uid: str, title: str = "", desc: str = "") -> ExternalJob:
        return self._server.call("create_external_job", lambda: self._new(ExternalJob, "snowflake", desc))

    def create_job(
        self, workspace_uid: str, type: str, connections: dict = {}, params: dict = {}, title: str = "", desc: str = ""  # noqa: B006
    ) -> Job:  # fmt: skip
        def create() -> Job:
            missing = [name for name in REGISTER[type] if name not in connections]
            if missing or "no_such_param" in params:
                raise self._server.refuse(422, f"unknown or missing: {missing or 'no_such_param'}")
            job = self._new(Job, type, desc)
            job.model.connections, job.model.params = dict(connections), dict(params)
            return job

        return self._server.call("create_job", create)

    def _new(self, face: Any, kind: str, desc: str) -> Any:
        uid = self._server.new(kind)
        self._server.jobs[uid].desc = desc
        return face(self.cs, uid)

    def find_job(self, job_uid: str) -> Job:
        if job_uid not in self._server.jobs:
            raise self._server.refuse(404)
        return Job(self.cs, job_uid)

    def find_external_job(self, job_uid: str) -> ExternalJob:
        return ExternalJob(self.cs, job_uid)

    def find_jobs(self, workspace_uid: Any = None, *, order: int = 1, **search: Any) -> Any:
        return iter([Job(self.cs, uid) for uid in list(self._server.jobs)[::order]])

    def download_file(self, path: Any, target: Any = "") -> Any:
        def download() -> Any:
            shutil.copy(self._server.root / str(path), target)
            return target

        return self._server.call("download_file", download)


class Job:
    project_uid = "P1"

    def __init__(self, cs: CryoSPARC, uid: str) -> None:
        self.cs, self._server, self.uid = cs, cs._server, uid
        self.model = self._server.jobs[uid]

    @property
    def status(self) -> str:
        return self.model.status

    @property
    def desc(self) -> str:
        return self.model.desc

    @property
    def outputs(self) -> dict[str, Any]:
        return self.model.outputs

    def refresh(self) -> Job:
        self._server.call("refresh", lambda: self._server.advance(self.model))
        return self

    def queue(self, lane: Any = None, hostname: Any = None, gpus: list = [], cluster_vars: dict = {}) -> None:  # noqa: B006
        def enqueue() -> None:
            if self.status != "building":
                raise self._server.refuse(409, "not in status building")
            self.model.status, self.model.lane = "queued", lane
            self.model.queued += 1

        self._server.call("queue", enqueue)

    def kill(self) -> None:
        self.model.status = "killed"

    def clear(self) -> None:
        self.model.status, self.model.errors_run = "building", []

    def load_output(self, name: str, slots: Any = "all", version: Any = "F") -> Dataset:
        return self._server.call("load_output", lambda: self.model.tables[name].copy())


class ExternalJob(Job):
    def start(self, status: str = "waiting") -> None:
        self.model.status = status

    def stop(self, error: str = "") -> None:
        self.model.status = "failed" if error else "completed"

    def mkdir(self, target_path: Any, parents: bool = False, exist_ok: bool = False) -> None:
        (self._server.root / self.uid / str(target_path)).mkdir(parents=parents, exist_ok=exist_ok)

    def upload(self, target_path: Any, source: Any, *, overwrite: bool = False) -> None:
        place = self._server.root / self.uid / str(target_path)
        assert overwrite or not place.exists()
        self._server.call("upload", lambda: source.save(place))

    def add_output(
        self, type: str, name: Any = None, slots: Any = (), passthrough: Any = None, title: Any = None, *,
        alloc: Any = None
    ) -> str:  # fmt: skip
        assert name not in self.outputs and alloc is None
        self.model.outputs[name] = (type, slots)
        return name

    def alloc_output(self, name: str, alloc: Any = 0, *, dtype_params: dict = {}) -> Dataset:  # noqa: B006
        fields = [(f"{slot}/{field[0]}", *field[1:]) for slot in self.outputs[name][1] for field in FIELDS[slot]]
        return Dataset({"uid": alloc}).add_fields(fields)

    def save_output(
        self, name: str, dataset: Dataset, *, version: int = 0, image: Any = None, savefig_kw: dict = {}, **kwargs: Any  # noqa: B006
    ) -> None:  # fmt: skip
        self._server.call("save_output", lambda: self.model.tables.update({name: dataset.copy()}))


def particles_of(rows: np.ndarray, root: Path) -> Any:
    """Particles of a table, as cryoSPARC reads them: paths from the folder of the project."""
    file = root / "rows.cs"
    with suppress(FileNotFoundError):
        file.unlink()
    with file.open("wb") as stream:
        np.lib.format.write_array(stream, rows, allow_pickle=False)
    return read_cs(file, project=str(root))
