"""A hub on this machine, with one repository, that keeps what it sent."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "someone/flux"


class Hub(BaseHTTPRequestHandler):
    files: dict[str, bytes]
    large: str
    knows_ranges: bool
    sent: list[tuple[str, int]]

    def do_GET(self):
        self.answer(body=True)

    def do_HEAD(self):
        self.answer(body=False)

    def do_POST(self):
        asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
        assert self.path == f"/api/models/{NAME}/paths-info/{COMMIT}"
        self.give(json.dumps([self.entry(name) for name in asked if name in self.files]).encode(), body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        if match := re.fullmatch(rf"/api/models/{NAME}/revision/(.+)", path):
            if match[1] not in ("main", "v1", COMMIT):
                return self.refuse(404, "RevisionNotFound")
            names = [{"rfilename": name} for name in self.files]
            return self.give(json.dumps({"id": NAME, "sha": COMMIT, "siblings": names}).encode(), body)
        if path == f"/api/models/{NAME}/tree/{COMMIT}":
            return self.give(json.dumps([self.entry(name) for name in self.files]).encode(), body)
        if match := re.fullmatch(rf"/{NAME}/resolve/{COMMIT}/(.+)", path):
            return self.give(self.files[match[1]], body, name=match[1])
        if path.startswith("/api/models/someone/gated"):
            return self.refuse(403, "GatedRepo")
        if path.startswith("/api/models/someone/broken"):
            return self.refuse(400, "")
        return self.refuse(401, "RepoNotFound")

    def give(self, data: bytes, body: bool, name: str = "") -> None:
        etag = hashlib.sha256(data).hexdigest()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked and self.knows_ranges:
            data = data[int(asked[1]) : int(asked[2]) + 1]
        self.send_response(206 if asked and self.knows_ranges else 200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(data)
            self.sent.append((name, len(data)))

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def entry(self, name: str) -> dict:
        data = self.files[name]
        sha256 = hashlib.sha256(data).hexdigest()
        large = {"lfs": {"oid": sha256, "size": len(data), "pointerSize": 134}} if name.endswith(self.large) else {}
        return {"type": "file", "path": name, "size": len(data), "oid": sha256, **large}

    def log_message(self, *words):
        pass


@contextmanager
def serve(teacher: Path, *, large: str = ".safetensors", knows_ranges: bool = True) -> Iterator[tuple[str, list]]:
    """Address of a hub with a teacher in it, and the files and bytes that it sends.

    large: how names end of which the hub states the sha256.
    """
    files = {str(path.relative_to(teacher)): path.read_bytes() for path in teacher.rglob("*") if path.is_file()}
    sent: list[tuple[str, int]] = []
    handler = type("OfTeacher", (Hub,), {"files": files, "large": large, "knows_ranges": knows_ranges, "sent": sent})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", sent
    server.shutdown()


def run_apart(code: str, *arguments: str, home: Path, **environment: str) -> str:
    """What code prints; apart: address of the hub and place of its downloads are read when the library is imported."""
    kept = {key: value for key, value in os.environ.items() if "proxy" not in key.lower() and not key.startswith("HF_")}
    settings = {"HF_HUB_CACHE": str(home / "hub"), "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **environment}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, env={**kept, **settings}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout
