"""A stand-in for the Hugging Face Hub on the loopback interface, for tests.

The hub's own client talks to it: creation of a model, commits with files in them or sent before by
LFS, the list of a model's files, and their content, of which that of LFS lies behind a redirection.
It shows what the client sends and takes, not that the hosted service does the same.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz01234567"
"""No output may hold it."""


class HubServer:
    """Serves at `url` between `start` and `stop`."""

    def __init__(self) -> None:
        self.models: dict[str, dict[str, dict[str, bytes]]] = {}
        """Files by model and commit; the last commit is `main`."""
        self.tags: dict[str, str] = {}
        """Revisions, a commit or `main`, by tag."""
        self.private: dict[str, Any] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.messages: list[str] = []
        self.claimed: dict[str, int] = {}
        """Sizes of files that the list of files claims in place of the true ones."""
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("H", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def start(self) -> None:
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        """Add a commit with these files over those of the last one; its hash."""
        commits = self.models.setdefault(repo, {})
        whole = {**(list(commits.values())[-1] if commits else {}), **files}
        digest = hashlib.sha1(repr((repo, len(commits), sorted(whole))).encode()).hexdigest()
        commits[digest] = whole
        return digest


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._do("HEAD")

    def do_GET(self) -> None:
        self._do("GET")

    def do_POST(self) -> None:
        self._do("POST")

    def do_PUT(self) -> None:
        self._do("PUT")

    def _do(self, method: str) -> None:
        body = self._body()
        path = self.path.partition("?")[0]
        self.hub.requests.append(f"{method} {path}")
        for pattern, answer in _ROUTES:
            if found := re.fullmatch(pattern, f"{method} {path}"):
                return answer(self, body, *found.groups())
        return self._json({"error": f"no route for {method} {path}"}, 404)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, content: bytes, status: int = 200, **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: Any, status: int = 200, **headers: object) -> None:
        content = json.dumps(value).encode()
        self._send(content, status, Content_Type="application/json", **headers)

    def _refused(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return False
        self._json({"error": "Invalid username or password."}, 401)
        return True

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if self._refused():
            return
        known = repo in self.hub.models
        if not known:
            self.hub.commit(repo, {".gitattributes": b""})
            self.hub.private[repo] = asked.get("private", asked.get("visibility"))
        answer = {"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo}
        if known:
            answer["error"] = "You already created this model repo"
        self._json(answer, 409 if known else 200)

    def _validate(self, body: bytes) -> None:
        head = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
        errors = [{"message": f"no {key}"} for key in ("library_name", "tags") if key not in head]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _preupload(self, body: bytes, repo: str) -> None:
        if self._refused():
            return
        files = []
        for path in (file["path"] for file in json.loads(body)["files"]):
            mode = "lfs" if path.endswith((".safetensors", ".png")) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
        self._json({"files": files})

    def _batch(self, body: bytes, repo: str) -> None:
        if self._refused():
            return
        objects = []
        for wanted in json.loads(body)["objects"]:
            href = f"{self.hub.url}/blobs/{wanted['oid']}"
            objects.append({**wanted, "actions": {"upload": {"href": href}}})
        self._json({"transfer": "basic", "objects": objects})

    def _put(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs[oid] = body
        self._send(b"")

    def _blob(self, body: bytes, oid: str) -> None:
        self._send(self.hub.blobs[oid])

    def _commit(self, body: bytes, repo: str) -> None:
        if self._refused():
            return
        files = {}
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert entry["key"] == "lfsFile"
                files[value["path"]] = self.hub.blobs[value["oid"]]
        oid = self.hub.commit(repo, files)
        url = f"{self.hub.url}/{repo}/commit/{oid}"
        self._json({"success": True, "commitOid": oid, "commitUrl": url})

    def _found(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.hub.models.get(repo)
        if commits is None:
            self._json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return None
        revision = self.hub.tags.get(revision, revision)
        oid = list(commits)[-1] if revision == "main" else revision
        if oid not in commits:
            self._json({"error": "Revision not found"}, 404, X_Error_Code="RevisionNotFound")
            return None
        return oid, commits[oid]

    def _info(self, body: bytes, repo: str, revision: str | None) -> None:
        if found := self._found(repo, revision or "main"):
            oid, files = found
            sizes = {name: self.hub.claimed.get(name, len(data)) for name, data in files.items()}
            listed = [{"rfilename": name, "size": size} for name, size in sizes.items()]
            self._json({"id": repo, "modelId": repo, "sha": oid, "siblings": listed})

    def _resolve(self, body: bytes, repo: str, revision: str, name: str) -> None:
        if found := self._found(repo, revision):
            oid, files = found
            data = files[name]
            etag = hashlib.sha256(data).hexdigest()
            if name.endswith(".safetensors"):
                self.hub.blobs[etag] = data
                # By another name of the host, as the client follows those to the hub itself.
                location = f"{self.hub.url}/blobs/{etag}".replace("127.0.0.1", "localhost")
                linked = {"X_Linked_Size": len(data), "X_Linked_ETag": f'"{etag}"'}
                return self._send(b"", 302, Location=location, X_Repo_Commit=oid, **linked)
            self._send(data, ETag=f'"{etag}"', X_Repo_Commit=oid)
        return None


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    (r"POST /api/repos/create", _Handler._create),
    (r"POST /api/validate-yaml", _Handler._validate),
    (rf"POST /api/models/{_REPO}/preupload/main", _Handler._preupload),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", _Handler._batch),
    (r"PUT /blobs/(\w+)", _Handler._put),
    (r"(?:GET|HEAD) /blobs/(\w+)", _Handler._blob),
    (rf"POST /api/models/{_REPO}/commit/main", _Handler._commit),
    (rf"GET /api/models/{_REPO}(?:/revision/([\w.-]+))?", _Handler._info),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/([\w.-]+)/([\w.-]+)", _Handler._resolve),
]
