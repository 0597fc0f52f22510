"""A stand-in for the W&B server on the loopback interface, for tests.

The real client logs to it: GraphQL to open a run and to ask for upload addresses, the file
stream for history rows, PUT for files. It keeps what it is sent. It shows what the client
sends, not that the hosted service takes it.
"""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from wandb_artifacts import ArtifactService
from wandb_sweeps import SweepService

KEY = "f" * 8 + "0123456789abcdef" * 2
"""A key of the right form. No output may hold it."""


@dataclass
class ServedRun:
    """What the server holds of one run."""

    name: str
    display_name: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    """What the client measures of the machine."""
    summary: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    output: list[str] = field(default_factory=list)
    exit_code: int | None = None
    num_openings: int = 0
    about: dict[str, Any] = field(default_factory=dict)
    """Group, job type, tags, notes and sweep."""

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics that arrived, as `read_rows` reads them from metrics.jsonl."""
        # The client adds names that begin with _. A line of a picture, table or alert has no epoch.
        return [
            {
                name: None if value != value else value
                for name, value in line.items()
                if not name.startswith("_")
            }
            for line in self.history
            if "epoch" in line
        ]


class WandbServer(ArtifactService, SweepService):
    """Serves at `url` between `start` and `stop`; may be started again on the same port.

    `fail` makes that many of the next requests answer 503, `stall` that many of those of rows, and
    `deleted` holds the ids of runs that were deleted on their pages.
    """

    def __init__(self) -> None:
        ArtifactService.__init__(self)
        SweepService.__init__(self)
        self.runs: dict[str, ServedRun] = {}
        self.operations: Counter[str] = Counter()
        self.keys_seen: set[str] = set()
        self.fail = 0
        self.reject_key = False
        self.stall = 0
        self.deleted: set[str] = set()
        self.views: list[dict[str, Any]] = []
        self.port = 0
        self._http: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:  # type: ignore[override]
        return f"http://127.0.0.1:{self.port}"

    def reserve(self) -> None:
        """Fix the port without serving on it: a server that is down."""
        self.start()
        self.stop()

    def start(self) -> None:
        server = self

        class Handler(_Handler):
            state = server

        self._http = _QuietServer(("127.0.0.1", self.port), Handler)
        self.port = self._http.server_port
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http = None

    def __enter__(self) -> WandbServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self, name: str) -> ServedRun:
        return self.runs.setdefault(name, ServedRun(name))

    # GraphQL

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        match = re.search(r"\b(?:query|mutation)\s+(\w+)", query)
        operation = match.group(1) if match else ""
        self.operations[operation] += 1
        method = getattr(self, f"_on_{operation}", None)
        return {} if method is None else method(variables)

    def _on_Viewer(self, _: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {
            "viewer": {
                "id": "VXNlcjox",
                "username": "tester",
                "entity": "tester",
                "flags": "{}",
                "teams": {"edges": []},
            }
        }

    _on_GetDefaultEntity = _on_Viewer  # noqa: N815

    def _on_RunResumeStatus(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        run = self.runs.get(variables["name"])
        bucket = None
        if run is not None:
            bucket = {
                "id": run.name,
                "name": run.name,
                "historyLineCount": len(run.history),
                "eventsLineCount": 0,
                "logLineCount": 0,
                "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]),
                "summaryMetrics": json.dumps(run.summary),
                "displayName": run.display_name,
                "config": json.dumps(run.config),
                "eventsTail": "[]",
                "tags": [],
                "wandbConfig": json.dumps({"t": 1}),
            }
        return {"model": {"id": "p", "name": "p", "bucket": bucket}}

    def _on_Run(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        run = self.runs[variables["name"]]
        return {
            "project": {
                "run": {
                    "id": run.name,
                    "name": run.name,
                    "projectId": "1",
                    "state": "running",
                    "config": json.dumps(run.config),
                    "systemMetrics": "{}",
                    "summaryMetrics": json.dumps(run.summary),
                    "historyLineCount": len(run.history),
                    "historyKeys": {},
                    "user": {"name": "tester", "username": "tester"},
                }
            }
        }

    def _on_UpsertBucket(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        name = variables.get("name") or variables.get("id")
        assert name, variables
        inserted = name not in self.runs
        run = self.run(name)
        run.num_openings += 1
        run.about |= {key: value for key, value in variables.items() if value is not None}
        run.display_name = variables.get("displayName") or run.display_name
        if variables.get("config"):
            run.config.update(json.loads(variables["config"]))
        if variables.get("summaryMetrics"):
            run.summary.update(json.loads(variables["summaryMetrics"]))
        project = variables.get("project") or "p"
        return {
            "upsertBucket": {
                "bucket": {
                    "id": name,
                    "name": name,
                    "displayName": run.display_name,
                    "description": "",
                    "config": json.dumps(run.config),
                    "sweepName": None,
                    "historyLineCount": len(run.history),
                    "project": {
                        "id": "1",
                        "name": project,
                        "entity": {"id": "1", "name": "tester"},
                    },
                },
                "inserted": inserted,
            }
        }

    def _on_CreateRunFiles(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        run = variables["run"]
        return {
            "createRunFiles": {
                "runID": run,
                "uploadHeaders": [],
                "files": [
                    {"name": name, "uploadUrl": f"{self.url}/upload/{run}/{name}"}
                    for name in variables["files"]
                ],
            }
        }

    def _on_UpsertView2(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        self.views.append(variables)
        view = {"id": f"view{len(self.views)}", "name": variables["name"]}
        return {"upsertView": {"view": view, "inserted": True}}

    # The file stream

    def take_stream(self, name: str, body: dict[str, Any]) -> None:
        run = self.run(name)
        for file, chunk in (body.get("files") or {}).items():
            rows, offset = chunk["content"], chunk.get("offset", 0)
            if file == "wandb-history.jsonl":
                # By offset, as the service does: a repeated request adds no second copy.
                run.history[offset : offset + len(rows)] = [json.loads(row) for row in rows]
            elif file == "wandb-events.jsonl":
                run.events[offset : offset + len(rows)] = [json.loads(row) for row in rows]
            elif file == "wandb-summary.json":
                run.summary.update(json.loads(rows[-1]))
            elif file == "output.log":
                run.output += rows
        if body.get("complete"):
            run.exit_code = body.get("exitcode")


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no fault of a test."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: WandbServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self._refused():
            return
        if self.path == "/graphql":
            request = json.loads(body)
            query, variables = request["query"], request.get("variables") or {}
            name = variables.get("name") or variables.get("id")
            if "UpsertBucket" in query and name in self.state.deleted:
                said = f"run {name} was previously created and deleted; try a new run name"
                self._reply(409, {"errors": [{"message": said}], "data": {"upsertBucket": None}})
                return
            self._reply(200, {"data": self.state.answer(query, variables)})
        elif self.state.stall > 0:
            self.state.stall -= 1
            self._reply(503, {})
        elif match := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
            self.state.take_stream(match.group(1), json.loads(body))
            self._reply(200, {"exitcode": None, "limits": {}})
        else:
            self._reply(404, {})

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self._refused():
            return
        _, what, run, name = self.path.split("/", 3)
        if what == "artifact":
            self.state.take_artifact_file(f"{run}/{name}", body)
        else:
            self.state.run(run).files[name] = body
        self._reply(200, {})

    def do_GET(self) -> None:
        if self.path.startswith("/artifact/"):
            self._send(200, self.state.artifact_file(self.path.removeprefix("/artifact/")))
        else:
            self._reply(200, {})

    def _refused(self) -> bool:
        self.state.keys_seen.add(self.headers.get("Authorization") or "")
        if self.state.reject_key:
            self._reply(401, {"errors": [{"message": "invalid API key"}]})
            return True
        if self.state.fail > 0:
            self.state.fail -= 1
            self._reply(503, {})
            return True
        return False

    def _reply(self, status: int, body: dict[str, Any]) -> None:
        self._send(status, json.dumps(body).encode())

    def _send(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass
