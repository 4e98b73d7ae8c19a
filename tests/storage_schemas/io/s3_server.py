"""An S3 server on a socket (moto), and a proxy before it that counts requests and fails them on demand."""

import contextlib
import http.client
import itertools
import random
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_REGION": "us-east-1",
    "AWS_ALLOW_HTTP": "true",
}
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What becomes of a request: `status` alone answers without asking the server; the others ask it first."""

    status: int = 0
    body: bytes = SLOW_DOWN
    cut_body: bool = False
    forget_conditions: bool = False
    lose_answer: bool = False


Rule = Callable[[int, str, str], Fault | None]
"""A fault, or none, by the number of the request, its method and its path."""


def every_so_often(*, refuse: int, cut: int, seed: int) -> Rule:
    """500 or 503 for every `refuse`-th request, the connection dropped in mid-body for every `cut`-th."""

    def rule(number: int, method: str, path: str) -> Fault | None:
        if number % refuse == 0:
            return Fault(status=random.Random(f"{seed}-{number}").choice((500, 503)))
        return Fault(cut_body=True) if number % cut == 0 else None

    return rule


class Proxy(ThreadingHTTPServer):
    """Hands requests on to a server, but those for which the rule has a fault."""

    daemon_threads = True

    def __init__(self, server: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.server = server
        self.rule: Rule = lambda number, method, path: None
        self.requests: list[tuple[str, str]] = []
        self.faults = 0
        self.one_put = threading.Lock()
        self._lock = threading.Lock()

    def note(self, method: str, path: str) -> Fault | None:
        with self._lock:
            self.requests.append((method, path))
            fault = self.rule(len(self.requests), method, path)
            self.faults += fault is not None
        return fault

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of clients that went away."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Answers are small and are waited for.
    disable_nagle_algorithm = True
    server: Proxy

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.note(self.command, self.path)
        if fault and fault.status:
            self._answer(fault.status, [("Content-Type", "application/xml")], fault.body, str(len(fault.body)))
            return
        response, data = self._ask_server(body, fault)
        if fault and (fault.lose_answer or (fault.cut_body and not data)):
            self.close_connection = True
            return
        headers = [(k, v) for k, v in response.getheaders() if k not in ("Content-Length", "Connection", "Date")]
        length = response.getheader("Content-Length") or str(len(data))
        if fault and fault.cut_body:
            self.close_connection = True
            data = data[: len(data) // 2]
        self._answer(response.status, headers, data, length)

    def _ask_server(self, body: bytes, fault: Fault | None) -> tuple[http.client.HTTPResponse, bytes]:
        headers = dict(self.headers)
        if fault and fault.forget_conditions:
            headers = {name: value for name, value in headers.items() if name.lower() != "if-none-match"}
        upstream = http.client.HTTPConnection(*self.server.server, timeout=60)
        # moto looks, then writes; a store does both at once.
        with self.server.one_put if self.command == "PUT" else contextlib.nullcontext():
            upstream.request(self.command, self.path, body=body, headers=headers)
            response = upstream.getresponse()
            data = response.read()
        upstream.close()
        return response, data

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, length: str) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _forward

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@dataclass
class S3:
    """A running server with its proxy; `url` names an empty bucket."""

    proxy: Proxy
    bucket: str = ""
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}"

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.proxy.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        return {**CREDENTIALS, "AWS_ENDPOINT": self.endpoint}

    def fresh(self) -> None:
        """Another bucket, no faults, counters at nought."""
        self.bucket = f"bucket-{next(self._numbers)}"
        self.proxy.rule = lambda number, method, path: None
        self.ask("PUT", "")
        self.reset()

    def reset(self) -> None:
        self.proxy.requests, self.proxy.faults = [], 0

    def ask(self, method: str, path: str, data: bytes | None = None) -> bytes:
        """Ask the server itself, past the proxy."""
        host, port = self.proxy.server
        url = f"http://{host}:{port}/{self.bucket}/{path}"
        # moto takes the data of urllib's default type for a form.
        credential = "AWS4-HMAC-SHA256 Credential=key/20000101/us-east-1/s3/aws4_request, SignedHeaders=, Signature=0"
        headers = {"Content-Type": "application/octet-stream", "Authorization": credential}
        with urllib.request.urlopen(urllib.request.Request(url, method=method, data=data, headers=headers)) as answer:
            return answer.read()


@contextlib.contextmanager
def running_s3() -> Iterator[S3]:
    """Start moto and the proxy."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    proxy = Proxy(server.get_host_and_port())
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        yield S3(proxy)
    finally:
        proxy.shutdown()
        proxy.server_close()
        server.stop()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3]:
    pytest.importorskip("obstore")
    pytest.importorskip("moto.server")
    with running_s3() as s3:
        yield s3


@pytest.fixture
def s3(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    """The server with an empty bucket, and the environment that leads to it."""
    s3_server.fresh()
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server
