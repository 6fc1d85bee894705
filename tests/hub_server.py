# SPDX-License-Identifier: Apache-2.0
"""The parts of the Hub that pushing and loading a model use, on 127.0.0.1, with everything in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse


TOKEN = "hf_test"


@dataclass
class Commit:
    """What a repository holds after a commit."""

    oid: str
    message: str
    files: dict[str, bytes]


@dataclass
class HubServer:
    """
    Serves until the `with` block ends. Each repository is a list of commits; a revision is `main` or a commit's id.

    Attributes:
        endpoint (`str`): for `HF_ENDPOINT`.
        repositories (`dict[str, list[Commit]]`): what was pushed.
        unknown (`list[str]`): requests that it has no answer for.
    """

    repositories: dict[str, list[Commit]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    def __enter__(self) -> HubServer:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add_folder(self, repository: str, folder: Path) -> None:
        """A repository with one commit, of the files in a folder."""
        self.commit(repository, "add", {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})

    def commit(self, repository: str, message: str, added: dict[str, bytes], deleted: tuple[str, ...] = ()) -> Commit:
        commits = self.repositories.setdefault(repository, [])
        files = {**(commits[-1].files if commits else {}), **added}
        files = {path: content for path, content in files.items() if path not in deleted}
        oid = hashlib.sha1(f"{repository} {len(commits)} {message}".encode()).hexdigest()
        commits.append(Commit(oid, message, files))
        return commits[-1]

    def find(self, repository: str, revision: str) -> Commit | None:
        commits = self.repositories.get(repository, [])
        if revision == "main":
            return commits[-1] if commits else Commit("0" * 40, "", {})
        return next((commit for commit in commits if commit.oid == revision), None)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        """Quiet."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self._allowed():
            return
        path = unquote(urlparse(self.path).path)
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
            self.hub.repositories.setdefault(name, [])
            self._json({"url": f"{self.hub.endpoint}/{name}"})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/[^/]+", path):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self._json({"files": files})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/[^/]+", path):
            lines = [json.loads(line) for line in body.splitlines() if line.strip()]
            message = next(line["value"]["summary"] for line in lines if line["key"] == "header")
            added = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            deleted = tuple(line["value"]["path"] for line in lines if line["key"] == "deletedFile")
            oid = self.hub.commit(match[1], message, added, deleted).oid
            self._json(
                {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{match[1]}/commit/{oid}"}
            )
        else:
            self._missing()

    def do_GET(self) -> None:
        if not self._allowed():
            return
        path = unquote(urlparse(self.path).path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            commit = self.hub.find(match[1], match[2] or "main")
            if commit is None or match[1] not in self.hub.repositories:
                return self._missing("RepoNotFound")
            files = [{"rfilename": name} for name in commit.files]
            return self._json({"id": match[1], "modelId": match[1], "sha": commit.oid, "siblings": files, "tags": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(/.*)?", path):
            commit = self.hub.find(match[1], match[2])
            if commit is None or match[3]:
                return self._missing("EntryNotFound")
            return self._json(
                [{"type": "file", "path": n, "size": len(c), "oid": _etag(c)} for n, c in commit.files.items()]
            )
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            commit = self.hub.find(match[1], match[2])
            if commit is None or match[1] not in self.hub.repositories:
                return self._missing("RepoNotFound" if match[1] not in self.hub.repositories else "RevisionNotFound")
            if match[3] not in commit.files:
                return self._missing("EntryNotFound", commit)
            return self._answer(200, commit.files[match[3]], "application/octet-stream", commit)
        return self._missing()

    do_HEAD = do_GET

    def _allowed(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._answer(401, b'{"error": "no access"}', "application/json", code="RepoNotFound")
        return False

    def _json(self, content) -> None:
        self._answer(200, json.dumps(content).encode(), "application/json")

    def _missing(self, code: str | None = None, commit: Commit | None = None) -> None:
        if code is None:
            self.hub.unknown.append(f"{self.command} {self.path}")
        self._answer(404, b'{"error": "not found"}', "application/json", commit, code)

    def _answer(
        self, status: int, body: bytes, kind: str, commit: Commit | None = None, code: str | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if commit is not None:
            self.send_header("X-Repo-Commit", commit.oid)
            self.send_header("ETag", f'"{_etag(body)}"')
        if code is not None:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
