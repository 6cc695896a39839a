"""A model hub on loopback: as much of the Hub's HTTP as loading an adapter takes."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

Files = dict[str, bytes]


class Hub:
    """`repositories[name][revision]` is a commit; `commits[commit]` has its files."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, str]] = {}
        self.commits: dict[str, Files] = {}
        self.downloads: Counter[str] = Counter()
        self.url = ""

    def push(self, repository: str, files: Files, revision: str = "main") -> str:
        """A new commit; returns its id."""
        commit = hashlib.sha1(json.dumps([len(self.commits), repository]).encode()).hexdigest()
        self.commits[commit] = files
        self.repositories.setdefault(repository, {}).update({revision: commit, commit: commit})
        return commit


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if info := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._info(info[1], info[2] or "main")
        elif file := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(file[1], file[2], file[3])
        else:
            self._answer(404, b"")

    def _info(self, repository: str, revision: str) -> None:
        commit = self.hub.repositories.get(repository, {}).get(revision)
        if commit is None:
            known = repository in self.hub.repositories
            error = "RevisionNotFound" if known else "RepoNotFound"
            return self._answer(404, b"{}", {"X-Error-Code": error})
        siblings = [{"rfilename": n, "size": len(c)} for n, c in self.hub.commits[commit].items()]
        body = {"_id": "1", "id": repository, "modelId": repository, "sha": commit, "siblings": siblings}
        return self._answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _file(self, repository: str, revision: str, name: str) -> None:
        commit = self.hub.repositories.get(repository, {}).get(revision, "")
        content = self.hub.commits.get(commit, {}).get(name)
        if content is None:
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        if self.command == "GET":
            self.hub.downloads[f"{repository}/{name}"] += 1
        etag = hashlib.sha256(content).hexdigest()
        return self._answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@contextmanager
def serving_hub() -> Iterator[Hub]:
    hub = Hub()

    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OfHub", (Handler,), {"hub": hub}))
    thread = Thread(target=server.serve_forever)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
