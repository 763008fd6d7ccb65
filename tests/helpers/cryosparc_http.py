"""A stand-in for cryoSPARC's HTTP server, **not** cryoSPARC: cryosparc-tools itself, unchanged, talks to it.

The library reads from ``/openapi.json`` which requests there are, so that paths are free; names, arguments, bodies and
models are those that the library's own source (5.0.3) uses and checks. What cryoSPARC does behind them is assumed, as
in ``cryosparc_stand_in``, whose jobs and files this server serves.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any

from cryosparc.dataset import Dataset
from cryosparc_stand_in import FIELDS, REGISTER, Server

VERSION = "v5.0.3-stand-in"
USER, PASSWORD_TOKEN = "tester@example.com", "stand-in-token"
NOW = "2026-01-01T00:00:00Z"
DATASET, BYTES = "application/x-cryosparc-dataset", "application/octet-stream"
WORKSPACE, JOBS = "/projects/{project_uid}/workspaces/{workspace_uid}", "/projects/{project_uid}/jobs/{job_uid}"
OUTPUT = JOBS + "/outputs/{output_name}"
SEARCH = (
    "project_uid", "workspace_uid", "uid", "type", "status", "category", "created_at", "updated_at", "queued_at",
    "started_at", "completed_at", "waiting_at", "killed_at", "failed_at", "exported_at", "order", "after", "limit",
)  # fmt: skip


class Refusal(Exception):
    """An answer with an error status."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


@dataclass(frozen=True)
class Call:
    """One request that the library can make."""

    name: str
    """as in the library, e.g. ``jobs.enqueue``"""
    method: str
    path: str
    do: Callable[..., Any]
    """(path arguments..., query, body) -> what is sent"""
    query: tuple[str, ...] = ()
    body: str = ""
    """"json" or the type of a stream"""
    answer: Any = None
    """schema of JSON, or the type of a stream"""

    def schema(self) -> dict[str, Any]:
        """For ``/openapi.json``."""
        found = re.findall(r"{([^}]*)}", self.path)
        parameters = [{"name": n, "in": "path", "required": True, "schema": {"type": "string"}} for n in found]
        parameters += [{"name": n, "in": "query", "required": False, "schema": {}} for n in self.query]
        content = (
            {self.answer: {"schema": {"title": "Stream", "type": "string", "format": "binary"}}}
            if self.answer in (DATASET, BYTES)
            else {"application/json": {"schema": self.answer or {}}}
        )
        refused = {"description": "refused", "content": {"application/json": {"schema": {}}}}
        answers = {"200": {"description": "", "content": content}} | dict.fromkeys(("404", "409", "422"), refused)
        made: dict[str, Any] = {
            "summary": self.name, "parameters": parameters,
            "responses": answers,
        }  # fmt: skip
        if self.body:
            title = {"json": "params" if self.name == "jobs.create" else "body", DATASET: "dataset", BYTES: "stream"}
            media = "application/json" if self.body == "json" else self.body
            made["requestBody"] = {"content": {media: {"schema": {"title": title[self.body]}}}}
        return made


def model(name: str) -> dict[str, str]:
    """Schema of a model of the library."""
    return {"$ref": f"#/components/schemas/{name}"}


def many(schema: dict[str, Any]) -> dict[str, Any]:
    """Schema of a list."""
    return {"type": "array", "items": schema}


class HttpServer:
    """Serves the jobs of a ``cryosparc_stand_in.Server`` on a free port of this host until it is closed."""

    def __init__(self, state: Server) -> None:
        self.state = state
        self.calls = self._calls()
        self.requests: list[str] = []
        self.lose: dict[str, list[str]] = {}
        """Call -> what happens to its next requests, in order: the connection breaks "before" or "after" it has worked,
        or an HTTP status is sent instead."""
        self.agents: set[str] = set()
        self.token = PASSWORD_TOKEN
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"owner": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the server."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def openapi(self) -> dict[str, Any]:
        """What the library makes its functions of."""
        paths: dict[str, Any] = {}
        for call in self.calls:
            paths.setdefault(call.path, {})[call.method] = call.schema()
        return {"openapi": "3.1.0", "info": {"title": "stand-in", "version": VERSION}, "paths": paths, "components": {}}

    def handle(self, method: str, path: str, query: dict[str, Any], body: bytes) -> tuple[bytes, str]:
        """Answer and its type; one request at a time."""
        for call in self.calls:
            pattern = re.sub(r"{[^}]*}", "([^/]+)", call.path)
            found = re.fullmatch(pattern, path)
            if found and call.method == method:
                break
        else:
            raise Refusal(404, f"no such path: {path}")
        with self._lock:
            self.requests.append(call.name)
            orders = self.lose.get(call.name, [])
            order = orders.pop(0) if orders else ""
            if order.isdigit():
                raise Refusal(int(order), "busy")
            if order == "before":
                raise ConnectionAbortedError
            sent = json.loads(body) if call.body == "json" and body else body
            value = call.do(*map(urllib.parse.unquote, found.groups()), query, sent)
        if order == "after":
            raise ConnectionAbortedError
        if call.answer in (DATASET, BYTES):
            return value, call.answer
        return json.dumps(value).encode(), "application/json"

    def _calls(self) -> list[Call]:
        job, where, none = model("Job"), "/projects/{project_uid}", {"type": "string"}
        lanes, events = many(model("SchedulerLane")), many(model("TextEvent"))
        made = [
            Call("health", "get", "/health", lambda q, b: "OK", answer=none),
            Call("users.me", "get", "/users/me", lambda q, b: _user(), answer=model("User")),
            Call("config.get_version", "get", "/config/version", lambda q, b: VERSION, answer=none),
            Call("resources.find_lanes", "get", "/resources/lanes", lambda q, b: [_lane()], answer=lanes),
            Call("projects.find_one", "get", where, self._project, answer=model("Project")),
            Call("projects.mkdir", "post", f"{where}/mkdir", self._mkdir, ("path", "parents", "exist_ok"), answer=none),
            Call("projects.upload_file", "post", f"{where}/files", self._upload, ("path", "overwrite"), BYTES, none),
            Call("projects.download_file", "get", f"{where}/files", self._download, ("path",), answer=BYTES),
            Call("workspaces.find_one", "get", WORKSPACE, self._workspace, answer=model("Workspace")),
            Call("jobs.create", "post", f"{WORKSPACE}/jobs", self._create,
                 ("type", "title", "description", "created_by_job_uid", "enable_bench"), "json", job),
            Call("jobs.find", "get", "/jobs", self._find, SEARCH, answer=many(job)),
            Call("jobs.find_one", "get", JOBS, self._refresh, answer=job),
            Call("jobs.connect", "post", f"{JOBS}/inputs/{{input_name}}", self._connect,
                 ("source_job_uid", "source_output_name"), answer=job),
            Call("jobs.enqueue", "post", f"{JOBS}/enqueue", self._enqueue, ("lane", "hostname", "gpus"), answer=job),
            Call("jobs.kill", "post", f"{JOBS}/kill", self._status("killed"), answer=job),
            Call("jobs.clear", "post", f"{JOBS}/clear", self._status("building"), answer=job),
            Call("jobs.mark_running", "post", f"{JOBS}/mark_running", self._mark_running, ("status",), answer=job),
            Call("jobs.mark_completed", "post", f"{JOBS}/mark_completed", self._status("completed"), answer=job),
            Call("jobs.mark_failed", "post", f"{JOBS}/mark_failed", self._status("failed"), ("error",), answer=job),
            Call("jobs.add_external_output", "put", OUTPUT, self._add_output, (), "json", job),
            Call("jobs.get_output_fields", "post", f"{OUTPUT}/fields", self._fields, (), "json",
                 many({"type": "array", "prefixItems": {}})),
            Call("jobs.save_output", "put", f"{OUTPUT}/dataset", self._save,
                 ("filename", "version"), DATASET, job),
            Call("jobs.load_output", "get", f"{OUTPUT}/dataset", self._load, ("version", "slots"),
                 answer=DATASET),
            Call("jobs.get_event_logs", "get", f"{JOBS}/events", self._events, ("checkpoint",), answer=events),
        ]  # fmt: skip
        return made

    def _job(self, uid: str) -> Any:
        if uid not in self.state.jobs:
            raise Refusal(404, f"no job {uid}")
        return self.state.jobs[uid]

    def _sent(self, uid: str) -> dict[str, Any]:
        """A job as the library's model ``Job`` reads it."""
        job = self._job(uid)
        outputs = {
            name: {"type": kind, "title": name, "slots": [_slot(slot) for slot in slots]}
            for name, (kind, slots) in job.outputs.items()
        }
        spec = {
            "type": job.kind, "params": job.params, "outputs": outputs, "ui_tile_width": 1, "ui_tile_height": 1,
            "resource_spec": {},
        }  # fmt: skip
        errors = [{"message": error.message, "warning": error.warning} for error in job.errors_run]
        return {
            "_id": f"{int(uid[1:]):024d}", "uid": uid, "project_uid": "P1", "workspace_uids": ["W1"], "spec": spec,
            "job_dir": uid, "job_dir_size_last_updated": NOW, "uid_num": int(uid[1:]), "project_uid_num": 1,
            "status_num": 0, "build_errors": [], "status": job.status, "description": job.desc, "version": job.version,
            "deleted": job.deleted, "queue_message": job.queue_message, "errors_run": errors,
        }  # fmt: skip

    def _project(self, uid: str, query: Any, body: Any) -> Any:
        if uid != "P1":
            raise Refusal(404, f"no project {uid}")
        return {"uid": uid, "project_dir": str(self.state.root), "owner_user_id": "1" * 24, "title": "stand-in",
                "size_last_updated": NOW, "uid_num": 1}  # fmt: skip

    def _workspace(self, project: str, uid: str, query: Any, body: Any) -> Any:
        if uid != "W1":
            raise Refusal(404, f"no workspace {uid}")
        return {"uid": uid, "project_uid": project, "workspace_type": "base", "uid_num": 1, "project_uid_num": 1}

    def _create(self, project: str, workspace: str, query: Any, body: Any) -> Any:
        kind, params = query["type"][0], (body or {})
        if (kind != "snowflake" and kind not in REGISTER) or "no_such_param" in params:
            raise Refusal(422, f"unknown job type or parameter: {kind}")
        uid = self.state.new(kind)
        job = self.state.jobs[uid]
        job.desc, job.params = query.get("description", [""])[0], dict(params)
        return self._sent(uid)

    def _connect(self, project: str, uid: str, name: str, query: Any, body: Any) -> Any:
        source, output = query["source_job_uid"][0], query["source_output_name"][0]
        if output not in self._job(source).outputs:
            raise Refusal(422, f"{source} has no output {output}")
        self._job(uid).connections[name] = (source, output)
        return self._sent(uid)

    def _enqueue(self, project: str, uid: str, query: Any, body: Any) -> Any:
        job = self._job(uid)
        missing = [name for name in REGISTER[job.kind] if name not in job.connections]
        if job.status != "building" or missing:
            raise Refusal(409, f"not in status building, or inputs are missing: {missing}")
        job.status, job.lane, job.queued = "queued", query.get("lane", [None])[0], job.queued + 1
        return self._sent(uid)

    def _refresh(self, project: str, uid: str, query: Any, body: Any) -> Any:
        self.state.advance(self._job(uid)) if self._job(uid).kind != "snowflake" else None
        return self._sent(uid)

    def _find(self, query: Any, body: Any) -> Any:
        order = -1 if query.get("order", ["1"])[0] == "-1" else 1
        return [] if "after" in query else [self._sent(uid) for uid in list(self.state.jobs)[::order]]

    def _status(self, status: str) -> Callable[..., Any]:
        def change(project: str, uid: str, query: Any, body: Any) -> Any:
            job = self._job(uid)
            job.status = status
            if status == "building":
                job.errors_run, job.looks = [], 0
            return self._sent(uid)

        return change

    def _mark_running(self, project: str, uid: str, query: Any, body: Any) -> Any:
        return self._status(query.get("status", ["running"])[0])(project, uid, query, body)

    def _add_output(self, project: str, uid: str, name: str, query: Any, body: Any) -> Any:
        self._job(uid).outputs[name] = (body["type"], [_slot(slot)["name"] for slot in body["slots"]])
        return self._sent(uid)

    def _fields(self, project: str, uid: str, name: str, query: Any, body: Any) -> Any:
        slots = self._job(uid).outputs[name][1]
        fields = [["uid", "<u8"]]
        for slot in slots:
            for field, kind, *shape in FIELDS[slot]:
                shaped = f"{tuple(shape[0])}".replace(" ", "") if shape else ""
                fields.append([f"{slot}/{field}", f"{shaped.replace('(', '').replace(',)', '').replace(')', '')}<{kind}"
                               if shape else ("O" if kind == "O" else f"<{kind}")])  # fmt: skip
        return fields

    def _save(self, project: str, uid: str, name: str, query: Any, body: bytes) -> Any:
        if self._job(uid).status not in ("running", "waiting"):
            raise Refusal(409, "the job does not run")
        self._job(uid).tables[name] = Dataset.load(BytesIO(body)).to_pystrs()
        return self._sent(uid)

    def _load(self, project: str, uid: str, name: str, query: Any, body: Any) -> bytes:
        if name not in self._job(uid).tables:
            raise Refusal(404, f"no output {name}")
        return b"".join(self._job(uid).tables[name].stream())

    def _events(self, project: str, uid: str, query: Any, body: Any) -> Any:
        return [
            {
                "_id": "0" * 24,
                "created_at": NOW,
                "project_uid": project,
                "job_uid": uid,
                "type": event.type,
                "text": event.text,
            }
            for event in self._job(uid).log
        ]

    def _place(self, query: Any) -> Any:
        place = (self.state.root / query["path"][0].strip("/")).resolve()
        if not place.is_relative_to(self.state.root.resolve()):
            raise Refusal(422, "outside the project")
        return place

    def _mkdir(self, project: str, query: Any, body: Any) -> str:
        self._place(query).mkdir(parents=True, exist_ok=query.get("exist_ok", ["false"])[0].lower() == "true")
        return "OK"

    def _upload(self, project: str, query: Any, body: bytes) -> str:
        place = self._place(query)
        if place.exists() and query.get("overwrite", ["false"])[0].lower() != "true":
            raise Refusal(409, "the file exists")
        with place.open("wb") as stream:
            shutil.copyfileobj(BytesIO(body), stream)
        return str(place)

    def _download(self, project: str, query: Any, body: Any) -> bytes:
        place = self._place(query)
        if not place.is_file():
            raise Refusal(404, f"no file {query['path'][0]}")
        return place.read_bytes()


def _slot(slot: Any) -> dict[str, str]:
    return {"name": slot, "dtype": slot} if isinstance(slot, str) else {"name": slot["name"], "dtype": slot["dtype"]}


def _user() -> dict[str, Any]:
    return {"_id": "1" * 24, "emails": [], "name": "tester", "first_name": "Test", "last_name": "Er"}


def _lane() -> dict[str, Any]:
    return {"name": "gpu", "type": "node", "title": "gpu"}


class _Handler(BaseHTTPRequestHandler):
    owner: HttpServer
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        split = urllib.parse.urlsplit(self.path)
        path = split.path.removeprefix(_suffix())
        body = self._body()
        self.owner.agents.add(self.headers.get("User-Agent", ""))
        try:
            if path == "/openapi.json":
                return self._send(200, json.dumps(self.owner.openapi()).encode(), "application/json")
            if self.headers.get("Authorization") != f"Bearer {self.owner.token}":
                raise Refusal(401, "not logged in")
            query = urllib.parse.parse_qs(split.query, keep_blank_values=True)
            content, kind = self.owner.handle(self.command.lower(), path, query, body)
            self._send(200, content, kind)
        except Refusal as refusal:
            content = json.dumps({"detail": refusal.detail}).encode()
            self._send(refusal.status, content, "application/json")
        except ConnectionAbortedError:
            self.close_connection = True  # no answer at all: the client sees a broken connection
            self.connection.close()
        except Exception as error:  # a fault of the stand-in is an answer, too, or the client would try for ever
            content = json.dumps({"detail": f"{type(error).__name__}: {error}"}).encode()
            self._send(500, content, "application/json")

    do_GET = do_POST = do_PUT = _answer

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


def _suffix() -> str:
    from cryosparc.constants import API_SUFFIX

    return API_SUFFIX
