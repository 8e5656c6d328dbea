"""A small hub on this machine: the calls by which huggingface_hub makes a repository, commits to it and reads it.

It keeps files in memory; every commit can be read by its name. What is larger than `large` bytes comes by LFS, in one
part. It does not have: Xet, LFS in several parts, tokens and rights, branches and pull requests, limits of rate.
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
    """Repositories by name (of data: datasets/ORG/NAME), and every call that came."""

    def __init__(self) -> None:
        self.repositories: dict[str, Files] = {}
        self.commits: dict[str, Files] = {}
        self.private: dict[str, bool] = {}  # as was asked for when it was made
        self.messages: list[str] = []  # of commits
        self.calls: list[str] = []
        self.uploaded: dict[str, bytes] = {}  # by LFS, {sha256: content}
        self.address = ""
        self.large = 10**9
        self.refused = 10**9  # from this commit on
        self.full = False  # nothing large is taken

    def sha(self, name: str) -> str:
        """The name of the commit that a repository is at."""
        files = dict(self.repositories[name])
        whole = json.dumps({path: hashlib.sha256(data).hexdigest() for path, data in files.items()})
        sha = hashlib.sha1(whole.encode()).hexdigest()
        self.commits[sha] = files
        return sha

    def at(self, name: str, revision: str) -> Files | None:
        return self.repositories.get(name) if revision == "main" else self.commits.get(revision)


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
        if path.startswith("/api/"):
            self._info(path.removeprefix("/api/"))
            return
        repository, _, rest = path.strip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        data = (self.hub.at(repository, revision) or {}).get(name)
        if data is None:
            self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        commit = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": self.hub.sha(repository)}
        self._send(200, data, {"Content-Type": "application/octet-stream", **commit})

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        sha256 = self.path.rpartition("/")[2]
        self.hub.calls.append(f"PUT {self.path}")
        content = self._body()
        if self.hub.full:
            self._send(403, b"", {})
            return
        assert hashlib.sha256(content).hexdigest() == sha256
        self.hub.uploaded[sha256] = content
        self._send(200, b"", {})

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.calls.append(f"POST {path}")
        body = self._body()
        if path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._large(json.loads(body)["objects"])
        else:
            repository, what = _parts(path.removeprefix("/api/"))
            if repository not in self.hub.repositories:
                self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            elif what.startswith("preupload/"):
                self._modes(json.loads(body)["files"])
            else:
                self._commit(repository, body)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _create(self, told: dict[str, Any]) -> None:
        kind = "datasets/" if told.get("type") == "dataset" else ""
        name = f"{told['organization']}/{told['name']}" if told.get("organization") else told["name"]
        if f"{kind}{name}" not in self.hub.repositories:
            self.hub.repositories[f"{kind}{name}"] = {}
            self.hub.private[f"{kind}{name}"] = told.get("private") or told.get("visibility") == "private"
        self._answer(200, {"url": f"{self.hub.address}/{kind}{name}", "name": name, "id": name})

    def _modes(self, asked: list[dict[str, Any]]) -> None:
        files = [
            {
                "path": one["path"], "uploadMode": "lfs" if one["size"] > self.hub.large else "regular",
                "shouldIgnore": False, "oid": None,
            }
            for one in asked
        ]  # fmt: skip
        self._answer(200, {"files": files})

    def _large(self, asked: list[dict[str, Any]]) -> None:
        objects = []
        for one in asked:
            upload = {"actions": {"upload": {"href": f"{self.hub.address}/lfs/{one['oid']}", "header": {}}}}
            objects.append(one if one["oid"] in self.hub.uploaded else {**one, **upload})
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _commit(self, repository: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        if len(self.hub.messages) >= self.hub.refused:
            self._answer(403, {"error": "no more of these"})
            return
        files = dict(self.hub.repositories[repository])
        for key, value in ((line["key"], line["value"]) for line in lines):
            if key == "header":
                self.hub.messages.append(value["summary"])
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.uploaded[value["oid"]]
        self.hub.repositories[repository] = files
        sha = self.hub.sha(repository)
        address = f"{self.hub.address}/{repository}/commit/{sha}"
        self._answer(200, {"success": True, "commitOid": sha, "commitUrl": address, "hookOutput": ""})

    def _info(self, path: str) -> None:
        repository, what = _parts(path)
        kind, _, rest = what.partition("/")
        revision, _, below = rest.partition("/") if kind in ("revision", "tree") else ("main", "", "")
        files = self.hub.at(repository, revision)
        if repository not in self.hub.repositories:
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif files is None:
            self._answer(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
        elif kind == "tree":
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
                if not below or name.startswith(f"{below}/")
            ]
            if below and not tree:
                self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
                return
            self._answer(200, tree)
        else:
            sha = self.hub.sha(repository) if revision == "main" else revision
            siblings = [{"rfilename": name} for name in files]
            name = repository.removeprefix("datasets/")
            self._answer(200, {"id": name, "sha": sha, "siblings": siblings, "private": False})

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


def _parts(path: str) -> tuple[str, str]:
    """Of models/ORG/NAME/REST or datasets/ORG/NAME/REST: the name of the repository, and the rest."""
    kind, organization, name, *rest = [*path.split("/"), "", ""]  # some calls name no repository
    return f"{'' if kind == 'models' else 'datasets/'}{organization}/{name}", "/".join(rest).strip("/")
