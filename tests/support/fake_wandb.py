"""A W&B server on 127.0.0.1 that keeps what arrives, and can be made to fail in the ways that servers do.

It stands for the real one in what the client can see: runs are upserted by name, file streams are lines at offsets,
and a run that exists says how many lines it has, so that a resumed run goes on after them.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import yaml

Mode = Literal["ok", "error", "stream-error", "file-error", "no-sweeps", "no-states", "slow", "silent", "unauthorized"]
HISTORY, EVENTS, SUMMARY = "wandb-history.jsonl", "wandb-events.jsonl", "wandb-summary.json"


@dataclass
class FakeRun:
    """What the server knows of one run."""

    name: str
    project: str = ""
    group: str | None = None
    display_name: str | None = None
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[int, str]] = field(default_factory=dict)
    exit_code: int | None = None
    complete: bool = False
    sweep: str | None = None

    def rows(self, file: str) -> list[dict[str, Any]]:
        """The lines of a stream, by offset."""
        lines = self.files.get(file, {})
        return [json.loads(lines[i]) for i in sorted(lines)]

    @property
    def history(self) -> list[dict[str, Any]]:
        return self.rows(HISTORY)

    @property
    def summary(self) -> dict[str, Any]:
        rows = self.rows(SUMMARY)
        return rows[-1] if rows else {}

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration as the user gave it."""
        return {k: v["value"] for k, v in self.config.items() if k != "_wandb"}


class FakeWandb:
    """Context manager; `url` is what WANDB_BASE_URL must be, `mode` may be changed while it runs."""

    def __init__(self, mode: Mode = "ok", delay: float = 1.0) -> None:
        self.mode: Mode = mode
        self.delay = delay
        self.runs: dict[str, FakeRun] = {}
        self.requests: list[tuple[str, str]] = []
        self.keys: set[str] = set()
        self.sweeps: dict[str, dict[str, Any]] = {}
        self.views: dict[str, dict[str, Any]] = {}
        self.lock = threading.Lock()
        self._closing = threading.Event()
        outer = self

        class Handler(_Handler):
            server_state = outer

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> FakeWandb:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def hold(self) -> None:
        """Say nothing until the server goes."""
        self._closing.wait(600)

    def operations(self, name: str) -> int:
        """How often an operation was asked for."""
        return sum(op == name for _, op in self.requests)


class _Server(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients are killed in tests: a connection that breaks is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: FakeWandb

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve("GET")

    def do_PUT(self) -> None:
        self._serve("PUT")

    def do_POST(self) -> None:
        self._serve("POST")

    def _serve(self, method: str) -> None:
        state = self.server_state
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        call = json.loads(body) if body[:1] == b"{" else {}
        found = re.search(r"(?:query|mutation)\s+(\w+)", call.get("query", ""))
        operation = found.group(1) if found else self.path
        with state.lock:
            state.requests.append((method, operation))
            if self.headers.get("Authorization", "").startswith("Basic "):
                state.keys.add(base64.b64decode(self.headers["Authorization"][6:]).decode())
        mode = state.mode
        if mode == "silent":
            state.hold()
            self.close_connection = True
            return
        if mode == "slow":
            time.sleep(state.delay)
        broken = {"error": "", "stream-error": "/file_stream", "file-error": "/upload/"}
        if mode in broken and broken[mode] in self.path:
            return self._answer({"errors": [{"message": "the server is broken"}]}, 500)
        if mode == "unauthorized":
            return self._answer({"errors": [{"message": "user is not logged in"}]}, 401)
        if mode == "no-sweeps" and ("UpsertSweep" in operation or "AttachRun" in operation):
            return self._answer({"errors": [{"message": "sweeps are not for you"}], "data": None})
        if mode == "no-states" and "UpsertSweepState" in operation:
            return self._answer({"errors": [{"message": "the state is not for you"}], "data": None})
        with state.lock:
            if self.path.endswith("/file_stream"):
                self._answer(_stream(state, self.path.split("/")[-2], call))
            elif "graphql" in self.path:
                self._answer({"data": _graphql(state, call.get("query", ""), call.get("variables") or {})})
            else:
                self._answer({}, 404 if "otel" in self.path else 200)

    def _answer(self, value: Any, code: int = 200) -> None:
        payload = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)


def _stream(state: FakeWandb, name: str, call: dict[str, Any]) -> dict[str, Any]:
    run = state.runs[name]
    for file, chunk in call.get("files", {}).items():
        lines = run.files.setdefault(file, {})
        lines.update({chunk.get("offset", 0) + i: line for i, line in enumerate(chunk["content"])})
    if call.get("complete") is not None:
        run.complete = bool(call["complete"])
        run.exit_code = call.get("exitcode")
    return {"exitcode": None, "limits": {}}


def _graphql(state: FakeWandb, query: str, given: dict[str, Any]) -> dict[str, Any]:
    project = {"id": "UHJvamVjdA==", "name": given.get("project") or "p", "entity": {"id": "RW50", "name": "someone"}}
    answer: dict[str, Any] = {}
    if "viewer" in query:
        who = {"id": "VXNlcg==", "entity": "someone", "username": "someone", "name": "someone", "email": "a@b.c"}
        answer["viewer"] = {**who, "flags": "{}", "teams": {"edges": []}, "admin": False, "apiKeys": {"edges": []}}
    if "serverInfo" in query:
        answer["serverInfo"] = {"cliVersionInfo": {"max_cli_version": "99.0.0"}, "features": []}
    if "upsertSweep" in query:
        name = given["id"].removeprefix("node-") if given.get("id") else f"sweep{len(state.sweeps) + 1}"
        if name not in state.sweeps:
            state.sweeps[name] = yaml.safe_load(given["config"]) | {"project": given["project"], "state": "PENDING"}
        state.sweeps[name]["state"] = given.get("state") or state.sweeps[name]["state"]
        answer["upsertSweep"] = {"sweep": {"id": f"node-{name}", "name": name, "project": project}}
    if "upsertView" in query:
        number = given.get("id") or f"view-{len(state.views) + 1}"
        inserted = number not in state.views
        state.views[number] = given
        answer["upsertView"] = {"view": {"id": number, "name": given["name"]}, "inserted": inserted}
    if "allViews" in query:
        found = [{"node": {"id": k, "displayName": v["displayName"], "spec": v["spec"]}} for k, v in state.views.items()]
        answer["project"] = {"allViews": {"edges": found}}
    if "RunResumeStatus" in query:
        answer["model"] = {**project, "bucket": _resume_status(state.runs.get(given.get("name", "")))}
    if "upsertBucket" in query:
        inserted = given["name"] not in state.runs
        run = state.runs.setdefault(given["name"], FakeRun(given["name"]))
        run.project = given.get("project") or run.project
        run.group = given.get("groupName") or run.group
        run.display_name = given.get("displayName") or run.display_name
        run.tags = given.get("tags") or run.tags
        run.sweep = given.get("sweep") or run.sweep
        run.config = json.loads(given["config"]) if given.get("config") else run.config
        bucket = {"id": f"id-{run.name}", "name": run.name, "displayName": run.display_name, "project": project}
        bucket |= {"description": None, "config": json.dumps(run.config), "sweepName": None, "historyLineCount": 0}
        answer["upsertBucket"] = {"bucket": bucket, "inserted": inserted}
    if "createRunFiles" in query:
        host = state.url
        files = [{"name": name, "uploadUrl": f"{host}/upload/{name}"} for name in given.get("files", [])]
        answer["createRunFiles"] = {"runID": "id", "uploadHeaders": [], "files": files}
    return answer


def _resume_status(run: FakeRun | None) -> dict[str, Any] | None:
    if run is None or not run.config:
        return None
    history, events = run.files.get(HISTORY, {}), run.files.get(EVENTS, {})
    return {
        "id": f"id-{run.name}",
        "name": run.name,
        "summaryMetrics": json.dumps(run.summary),
        "displayName": run.display_name,
        "logLineCount": 0,
        "historyLineCount": len(history),
        "eventsLineCount": len(events),
        "historyTail": json.dumps([history[max(history)]] if history else []),
        "eventsTail": json.dumps([events[max(events)]] if events else []),
        "config": json.dumps(run.config),
        "tags": run.tags,
        "wandbConfig": json.dumps({"t": 1}),
    }


def refusing_url() -> str:
    """An address where nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"
