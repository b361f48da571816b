"""A hub on 127.0.0.1, as huggingface_hub's client needs it, which misbehaves on request."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Self
from urllib.parse import unquote

import huggingface_hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Served:
    """A file on the hub and the troubles still to come, one per GET."""

    content: bytes
    cut_after: list[int] = field(default_factory=list)  # bytes sent before the connection is cut
    corrupt: int = 0  # how many times to deliver wrong bytes
    ranges: bool = True
    status: int = 0  # answered in place of the file
    announced_size: int = 0
    stall: threading.Event | None = None  # waits for it in the middle of the file

    @property
    def size(self) -> int:
        return self.announced_size or len(self.content)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


class Hub:
    """`files["org/name/path"]` is what it serves, `gets` are the (file, Range) that were asked for.

    Files of "elsewhere" are plain ones, at `url("elsewhere/name")`.
    """

    def __init__(self) -> None:
        self.files: dict[str, Served] = {}
        self.gets: list[tuple[str, str | None]] = []
        self.n_requests = 0
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return self.url("")[:-1]

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/{path}"

    @contextmanager
    def used(self, monkeypatch) -> Iterator[Self]:
        """Lets huggingface_hub's client ask this hub, without its pauses."""
        monkeypatch.setenv("HF_ENDPOINT", self.endpoint)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
        no_pauses = SimpleNamespace(sleep=lambda seconds: None)
        monkeypatch.setattr(huggingface_hub.file_download, "time", no_pauses)
        yield self
        huggingface_hub.close_session()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.hub.n_requests += 1
        path = unquote(self.path.partition("?")[0]).strip("/")
        if path.startswith("api/datasets/"):
            return self._list(path.removeprefix("api/datasets/"))
        for revision in ("main", "refs/convert/parquet"):
            path = path.replace(f"/resolve/{revision}/", "/")
        served = self.hub.files.get(path.removeprefix("datasets/").removeprefix("storage/"))
        if served is None:
            self._send(404, {"X-Error-Code": "EntryNotFound"})
        elif served.status:
            self._send(served.status)
        elif path.startswith("datasets/"):  # the real hub redirects to its storage, too
            location = self.hub.url(path.replace("datasets/", "storage/", 1))
            headers = {
                "Location": location.replace("127.0.0.1", "localhost"),
                "X-Repo-Commit": COMMIT,
                "X-Linked-Size": str(served.size),
                "X-Linked-Etag": f'"{served.sha256}"',
            }
            self._send(302, headers)
        else:
            self._deliver(path.removeprefix("storage/"), served)

    def _list(self, path: str) -> None:
        """The files of a data set, or of a folder in it."""
        for revision in ("main", "refs/convert/parquet"):
            path = path.replace(f"/tree/{revision}", "")
        files = {name: one for name, one in self.hub.files.items() if name.startswith(f"{path}/")}
        listed = [
            {
                "type": "file",
                "path": name.split("/", 2)[2],
                "size": one.size,
                "oid": "0",
                "lfs": {"size": one.size, "oid": one.sha256, "pointerSize": 1},
            }
            for name, one in sorted(files.items(), reverse=True)
        ]
        if not listed:
            return self._send(404, {"X-Error-Code": "EntryNotFound"})
        self._send(200, {"Content-Type": "application/json"}, json.dumps(listed).encode())

    def _deliver(self, name: str, served: Served) -> None:
        asked = self.headers.get("Range")
        if self.command == "GET":
            self.hub.gets.append((name, asked))
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and served.ranges else 0
        body = served.content[start:]
        headers = {"ETag": '"of-the-storage"'}
        if start:
            headers["Content-Range"] = f"bytes {start}-{served.size - 1}/{served.size}"
        if served.corrupt and self.command == "GET":
            served.corrupt -= 1
            body = bytes(byte ^ 255 for byte in body)
        self._send(206 if start else 200, headers, body, served)

    def _send(self, status: int, headers=(), body: bytes = b"", served=None) -> None:
        self.send_response(status)
        for key, value in {**dict(headers), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if served and served.stall is not None:
            half, body = body[: len(body) // 2], body[len(body) // 2 :]
            self.wfile.write(half)
            self.wfile.flush()
            served.stall.wait(60)
        if served and served.cut_after:
            body = body[: served.cut_after.pop(0)]
            self.close_connection = True
        self.wfile.write(body)
