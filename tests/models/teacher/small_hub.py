"""A hub on this machine that keeps what it sent."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

ROOT = Path(__file__).resolve().parents[3]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "someone/flux"


@dataclass(kw_only=True)
class Repository:
    """large: how names end of which the hub states the sha256. sent: files, and the bytes of each answer."""

    folder: Path | None = None
    private: bool = False
    large: str | tuple[str, ...] = ".safetensors"
    commit: str = COMMIT
    knows_ranges: bool = True
    sent: list[tuple[str, int]] = field(default_factory=list)

    def __post_init__(self):
        paths = [path for path in self.folder.rglob("*") if path.is_file()] if self.folder else []
        self.files = {str(path.relative_to(self.folder)): path.read_bytes() for path in paths}

    def entry(self, name: str) -> dict:
        data = self.files[name]
        sha256 = hashlib.sha256(data).hexdigest()
        large = {"lfs": {"oid": sha256, "size": len(data), "pointerSize": 134}} if name.endswith(self.large) else {}
        return {"type": "file", "path": name, "size": len(data), "oid": sha256, **large}

    def entries(self, names: Iterable[str]) -> bytes:
        return json.dumps([self.entry(name) for name in names if name in self.files]).encode()


class Hub(BaseHTTPRequestHandler):
    repositories: dict[str, Repository]

    def do_GET(self):
        self.answer(body=True)

    def do_HEAD(self):
        self.answer(body=False)

    def do_POST(self):
        asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
        match = re.fullmatch(r"/api/models/(\w+/\w+)/paths-info/\w+", self.path)
        self.give(self.repositories[match[1]].entries(asked), body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        match = re.fullmatch(r"(/api/models)?/(\w+/\w+)/(revision|tree|resolve)/([^/]+)/?(.*)", path)
        if match is None:
            return self.refuse(404, "EntryNotFound")
        name, kind, revision, rest = match.groups()[1:]
        if name == "someone/gated":
            return self.refuse(403, "GatedRepo")
        if name == "someone/broken":
            return self.refuse(400, "")
        if name not in self.repositories:
            return self.refuse(401, "RepoNotFound")
        repository = self.repositories[name]
        if revision not in ("main", "v1", repository.commit):
            return self.refuse(404, "RevisionNotFound")
        if kind == "revision":
            names = [{"rfilename": name} for name in repository.files]
            return self.give(json.dumps({"id": name, "sha": repository.commit, "siblings": names}).encode(), body)
        if kind == "tree":
            return self.give(repository.entries(repository.files), body)
        return self.give_file(repository, rest, body)

    def give_file(self, repository: Repository, name: str, body: bool) -> None:
        if name not in repository.files:
            self.refuse(404, "EntryNotFound")
            return
        data = whole = repository.files[name]
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if partly := asked is not None and repository.knows_ranges:
            data = whole[int(asked[1]) : int(asked[2]) + 1]
        if body:
            repository.sent.append((name, len(data)))
        etag = hashlib.sha256(whole).hexdigest()
        self.give(data, body, status=206 if partly else 200, etag=etag, commit=repository.commit)

    def give(self, data: bytes, body: bool, status: int = 200, etag: str = "0", commit: str = COMMIT) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *words):
        pass


@contextmanager
def serve(repositories: dict[str, Repository], kind: type[Hub] = Hub, **state: Any) -> Iterator[str]:
    """Address of a hub with these repositories. state: other attributes of its handlers."""
    handlers = type("OfThese", (kind,), {"repositories": repositories, **state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handlers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def run_apart(code: str, *arguments: str, home: Path, **environment: str) -> str:
    """What code prints; apart: address of the hub and place of its downloads are read when the library is imported."""
    kept = {key: value for key, value in os.environ.items() if "proxy" not in key.lower() and not key.startswith("HF_")}
    settings = {"HF_HUB_CACHE": str(home / "hub"), "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **environment}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, env={**kept, **settings}, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stdout
