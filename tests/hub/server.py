"""A small imitation of the Hub over HTTP on loopback, for the real huggingface_hub client.

It knows what downloads and pushes ask for: model info and trees, files with ranges, large files
behind a redirect to another host name, tokens, gates, error codes, LFS uploads and commits. Faults
can be switched on: cuts, slowness, refusals, altered content.

    with HubServer() as hub:
        hub.add("owner/model", folder)
        run_python(code, environment=hub.environment(cache))

huggingface_hub reads its settings when it is imported, so clients are fresh processes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_test"
STRANGER = "hf_stranger"
"""A token that is valid, and has access to nothing that is private or gated."""

_LFS_SUFFIXES = (".safetensors", ".bin", ".mp4")


@dataclass
class Repo:
    """A model repository: commits, oldest first, each a whole tree of files."""

    private: bool = False
    gated: bool = False
    commits: list[dict[str, bytes]] = field(default_factory=list)
    branches: dict[str, int] = field(default_factory=dict)

    def sha(self, number: int) -> str:
        content = repr(sorted((k, _sha256(v)) for k, v in self.commits[number].items()))
        return hashlib.sha1(f"{number}{content}".encode()).hexdigest()

    def find(self, revision: str) -> int | None:
        if revision in self.branches:
            return self.branches[revision]
        return next((n for n in range(len(self.commits)) if self.sha(n) == revision), None)

    @property
    def files(self) -> dict[str, bytes]:
        """Of the newest commit of main."""
        return self.commits[self.branches["main"]]


def _open_gate() -> threading.Event:
    gate = threading.Event()
    gate.set()
    return gate


@dataclass
class Faults:
    """What goes wrong. Counters run down as faults happen.

    Attributes:
        cuts: times that a large file's connection is closed halfway.
        cut_at_start: close before the first byte of it instead.
        failures: requests answered with `status`.
        status: for `failures`.
        altered: times that a large file comes with other content of the same length.
        gate: large files stop after their first piece while it is not set.
        missing: names of files that are listed and not there.
        no_ranges: ask for a part and get the whole.
        moves: files of new commits to a model's main, one after each answer that tells its commit.
    """

    cuts: int = 0
    cut_at_start: bool = False
    failures: int = 0
    status: int = 503
    altered: int = 0
    gate: threading.Event = field(default_factory=_open_gate)
    missing: set[str] = field(default_factory=set)
    no_ranges: bool = False
    moves: list[dict[str, bytes]] = field(default_factory=list)


class HubServer:
    """The server and its repositories; a context manager."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.uploads: dict[str, bytes] = {}
        self.faults = Faults()
        self.log: list[str] = []
        self.leaks: list[str] = []
        """Requests to the storage host that carried a token."""
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def storage(self) -> str:
        """Large files lie on another host, as the client sees it."""
        return f"http://localhost:{self._server.server_port}"

    def add(
        self,
        repo_id: str,
        files: Path | dict[str, bytes],
        *,
        private: bool = False,
        gated: bool = False,
        branch: str = "main",
    ) -> str:
        """Commit a folder's files, or these, to a repository; returns the commit."""
        if isinstance(files, Path):
            files = {
                path.relative_to(files).as_posix(): path.read_bytes()
                for path in sorted(files.rglob("*"))
                if path.is_file()
            }
        repo = self.repos.setdefault(repo_id, Repo())
        repo.private, repo.gated = private, gated
        return self.commit(repo, branch, files)

    def commit(self, repo: Repo, branch: str, files: dict[str, bytes]) -> str:
        repo.commits.append(files)
        repo.branches[branch] = len(repo.commits) - 1
        repo.branches.setdefault("main", len(repo.commits) - 1)
        return repo.sha(repo.branches[branch])

    def requests(self, fragment: str) -> list[str]:
        """Logged requests that contain a text, such as "GET /owner"."""
        with self.lock:
            return [line for line in self.log if fragment in line]

    def environment(self, home: Path, *, token: str | None = None, **more: str) -> dict[str, str]:
        """Environment of a process that uses only this server, with its cache in `home`."""
        kept = {
            key: value
            for key, value in os.environ.items()
            if not key.lower().endswith("_proxy") and not key.startswith("HF_")
        }
        return {
            **kept,
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **({} if token is None else {"HF_TOKEN": token}),
            **more,
        }


def git_sha1(content: bytes) -> str:
    """Git's name of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(name: str) -> bool:
    return name.endswith(_LFS_SUFFIXES)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._handle()

    def do_GET(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def do_PUT(self) -> None:
        self._handle()

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test's output clean."""

    def _handle(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.log.append(f"{self.command} {path}")
            fails = self.hub.faults.failures > 0
            if fails:
                self.hub.faults.failures -= 1
        if fails:
            self._reply(self.hub.faults.status, b"try later")
            return
        for method, pattern, answer in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method:
                answer(self, **found.groupdict())
                return
        self._reply(404, error="EntryNotFound")

    # Who is asking

    @property
    def token(self) -> str | None:
        value = self.headers.get("Authorization", "")
        return value.removeprefix("Bearer ") or None

    def _may_read(self, repo_id: str) -> Repo | None:
        """Return the repository, or None after sending a refusal."""
        repo = self.hub.repos.get(repo_id)
        if self.token not in (None, TOKEN, STRANGER):
            self._reply(401, message="Invalid credentials in Authorization header")
        elif repo is None or (repo.private and self.token != TOKEN):
            # The Hub does not distinguish private from missing.
            self._reply(401 if self.token is None else 404, error="RepoNotFound")
        elif repo.gated and self.token != TOKEN and "/api/" not in self.path:
            self._reply(401 if self.token is None else 403, error="GatedRepo")
        else:
            return repo
        return None

    def _may_write(self, repo_id: str) -> Repo | None:
        if self.token == TOKEN:
            return self.hub.repos.setdefault(repo_id, Repo())
        if self.token is None:
            self._reply(401, message="Invalid username or password.")
        else:
            self._reply(403, message="you are not allowed to write here")
        return None

    # Reading

    def model_info(self, repo_id: str, revision: str = "main") -> None:
        repo = self._may_read(repo_id)
        if repo is None:
            return
        number = repo.find(revision)
        if number is None:
            self._reply(404, error="RevisionNotFound")
            return
        names = [{"rfilename": name} for name in repo.commits[number]]
        self._json({"id": repo_id, "sha": repo.sha(number), "siblings": names})
        with self.hub.lock:
            if self.hub.faults.moves:
                self.hub.commit(repo, "main", self.hub.faults.moves.pop(0))

    def tree(self, repo_id: str, revision: str) -> None:
        repo = self._may_read(repo_id)
        if repo is None:
            return
        number = repo.find(revision)
        if number is None:
            self._reply(404, error="RevisionNotFound")
            return
        entries = []
        for name, content in repo.commits[number].items():
            entry: dict[str, Any] = {
                "type": "file",
                "path": name,
                "oid": git_sha1(content),
                "size": len(content),
            }
            if is_lfs(name):
                size = len(content)
                entry["lfs"] = {"oid": _sha256(content), "size": size, "pointerSize": 130}
            entries.append(entry)
        self._json(entries)

    def file(self, repo_id: str, revision: str, name: str) -> None:
        repo = self._may_read(repo_id)
        if repo is None:
            return
        number = repo.find(revision)
        if number is None:
            self._reply(404, error="RevisionNotFound")
            return
        content = repo.commits[number].get(name)
        headers = {"X-Repo-Commit": repo.sha(number)}
        if content is None or name in self.hub.faults.missing:
            self._reply(404, error="EntryNotFound", headers=headers)
        elif is_lfs(name):
            digest = _sha256(content)
            headers |= {
                "X-Linked-Etag": f'"{digest}"',
                "X-Linked-Size": str(len(content)),
                "Location": f"{self.hub.storage}/storage/{digest}?signature=x",
            }
            self.hub.uploads.setdefault(digest, content)
            self._reply(302, headers=headers)
        else:
            self._reply(200, content, headers={**headers, "ETag": f'"{git_sha1(content)}"'})

    def stored(self, digest: str) -> None:
        """A large file, from the other host: no token may come here."""
        if self.token is not None:
            self.hub.leaks.append(self.path)
        content = self.hub.uploads.get(digest)
        if content is None:
            self._reply(404)
            return
        faults = self.hub.faults
        with self.hub.lock:
            cut = faults.cuts > 0 and self.command == "GET"
            faults.cuts -= cut
            altered = faults.altered > 0 and self.command == "GET"
            faults.altered -= altered
        if altered:
            content = bytes([content[0] ^ 1]) + content[1:]
        start, status = 0, 200
        headers = {"ETag": f'"{digest}"'}
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if wanted and not faults.no_ranges:
            start, status = int(wanted[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        part = content[start:]
        if cut:
            part = part[: 0 if faults.cut_at_start else len(part) // 2]
        self._reply(status, part, headers=headers, length=len(content) - start)
        if cut:
            self.close_connection = True

    # Writing

    def create(self) -> None:
        asked = json.loads(self.body)
        repo_id = "/".join(filter(None, [asked.get("organization"), asked["name"]]))
        existed = repo_id in self.hub.repos
        repo = self._may_write(repo_id)
        if repo is None:
            return
        if existed:
            self._json({"url": f"{self.hub.endpoint}/{repo_id}"}, status=409)
            return
        repo.private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.hub.commit(repo, "main", {".gitattributes": b"*.safetensors filter=lfs"})
        self._json({"url": f"{self.hub.endpoint}/{repo_id}", "id": repo_id, "name": repo_id})

    def branch(self, repo_id: str, name: str) -> None:
        repo = self._may_write(repo_id)
        if repo is None:
            return
        if name in repo.branches:
            self._json({}, status=409)
            return
        repo.branches[name] = repo.branches["main"]
        self._json({})

    def preupload(self, repo_id: str, revision: str) -> None:
        repo = self._may_write(repo_id)
        if repo is None:
            return
        number = repo.find(revision)
        if number is None:
            self._reply(404, error="RevisionNotFound")
            return
        answers = []
        for entry in json.loads(self.body)["files"]:
            name, old = entry["path"], repo.commits[number].get(entry["path"])
            oid = None if old is None else _sha256(old) if is_lfs(name) else git_sha1(old)
            mode = "lfs" if is_lfs(name) else "regular"
            answers.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answers})

    def lfs_batch(self, repo_id: str) -> None:
        if self._may_write(repo_id) is None:
            return
        objects = []
        for entry in json.loads(self.body)["objects"]:
            answer = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.hub.uploads:
                href = f"{self.hub.storage}/storage/{entry['oid']}"
                answer["actions"] = {"upload": {"href": href}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def upload(self, digest: str) -> None:
        with self.hub.lock:
            cut = self.hub.faults.cuts > 0
            self.hub.faults.cuts -= cut
        if cut:
            self._reply(500, b"lost")
        elif _sha256(self.body) != digest:
            self._reply(400, b"wrong content")
        else:
            self.hub.uploads[digest] = self.body
            self._reply(200)

    def yaml(self) -> None:
        self._json({"errors": [], "warnings": []})

    def commit(self, repo_id: str, revision: str) -> None:
        repo = self._may_write(repo_id)
        if repo is None:
            return
        number = repo.find(revision)
        if number is None:
            self._reply(404, error="RevisionNotFound")
            return
        files = dict(repo.commits[number])
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        sha = self.hub.commit(repo, revision, files)
        url = f"{self.hub.endpoint}/{repo_id}/commit/{sha}"
        self._json({"commitUrl": url, "commitOid": sha, "success": True})

    # Answers

    def _json(self, document: Any, status: int = 200) -> None:
        self._reply(
            status, json.dumps(document).encode(), headers={"Content-Type": "application/json"}
        )

    def _reply(
        self,
        status: int,
        body: bytes = b"",
        *,
        error: str = "",
        message: str = "",
        headers: dict[str, str] | None = None,
        length: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if error:
            self.send_header("X-Error-Code", error)
        if message:
            self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command == "HEAD":
            return
        piece = 1 << 16
        for start in range(0, len(body), piece):
            if start:
                self.hub.faults.gate.wait()
            self.wfile.write(body[start : start + piece])


_ID = r"(?P<repo_id>[\w.-]+/[\w.-]+)"
_REVISION = r"(?P<revision>[^/]+|refs/pr/\d+)"
_ROUTES = (
    ("GET", rf"/api/models/{_ID}", _Handler.model_info),
    ("GET", rf"/api/models/{_ID}/revision/{_REVISION}", _Handler.model_info),
    ("GET", rf"/api/models/{_ID}/tree/{_REVISION}", _Handler.tree),
    ("GET HEAD", rf"/{_ID}/resolve/{_REVISION}/(?P<name>.+)", _Handler.file),
    ("GET HEAD", r"/storage/(?P<digest>\w+)", _Handler.stored),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.yaml),
    ("POST", rf"/api/models/{_ID}/branch/(?P<name>.+)", _Handler.branch),
    ("POST", rf"/api/models/{_ID}/preupload/{_REVISION}", _Handler.preupload),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/storage/(?P<digest>\w+)", _Handler.upload),
    ("POST", rf"/api/models/{_ID}/commit/{_REVISION}", _Handler.commit),
)
