"""A small hub on this machine: the calls by which huggingface_hub makes a repository, commits to it and reads it.

It keeps files in memory, one revision each. It does not have: LFS or Xet (every file is committed inside of the call,
as the real hub takes what is small), tokens and rights, branches and pull requests, limits of rate or size.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


class Hub:
    """Repositories by name, and every call that came."""

    def __init__(self) -> None:
        self.repositories: dict[str, Files] = {}
        self.calls: list[str] = []
        self.address = ""

    def sha(self, name: str) -> str:
        whole = json.dumps({path: hashlib.sha256(data).hexdigest() for path, data in self.repositories[name].items()})
        return hashlib.sha1(whole.encode()).hexdigest()


@contextmanager
def served() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.calls.append(f"{self.command} {path}")
        if path.startswith("/api/models/"):
            self._info(path.removeprefix("/api/models/"))
            return
        repository, _, rest = path.strip("/").partition("/resolve/")
        name = rest.partition("/")[2]
        data = self.hub.repositories.get(repository, {}).get(name)
        if data is None:
            self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        commit = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": self.hub.sha(repository)}
        self._send(200, data, {"Content-Type": "application/octet-stream", **commit})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.calls.append(f"POST {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/repos/create":
            told = json.loads(body)
            name = f"{told['organization']}/{told['name']}" if told.get("organization") else told["name"]
            self.hub.repositories.setdefault(name, {})
            self._answer(200, {"url": f"{self.hub.address}/{name}", "name": name, "id": name})
            return
        if path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
            return
        repository, _, what = path.removeprefix("/api/models/").rpartition("/")
        repository, _, what = repository.rpartition("/")
        if repository not in self.hub.repositories:
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif what == "preupload":
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for one in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        else:
            self._commit(repository, body)

    def _commit(self, repository: str, body: bytes) -> None:
        for line in body.splitlines():
            told = json.loads(line)
            if told["key"] == "file":
                content = base64.b64decode(told["value"]["content"])
                self.hub.repositories[repository][told["value"]["path"]] = content
        sha = self.hub.sha(repository)
        address = f"{self.hub.address}/{repository}/commit/{sha}"
        self._answer(200, {"success": True, "commitOid": sha, "commitUrl": address, "hookOutput": ""})

    def _info(self, path: str) -> None:
        repository = path.partition("/revision/")[0].partition("/tree/")[0]
        if repository not in self.hub.repositories:
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return
        files = self.hub.repositories[repository]
        if "/tree/" in path:
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            self._answer(200, tree)
            return
        siblings = [{"rfilename": name} for name in files]
        self._answer(200, {"id": repository, "sha": self.hub.sha(repository), "siblings": siblings, "private": False})

    def _answer(self, code: int, told: Any, headers: dict[str, str] | None = None) -> None:
        self._send(code, json.dumps(told).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, code: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass
