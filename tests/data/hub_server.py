"""A hub on 127.0.0.1: announces files, delivers them by ranges, and misbehaves on request."""

import hashlib
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Served:
    """A file on the hub and the troubles still to come, one per GET."""

    content: bytes
    cut_after: list[int] = field(default_factory=list)  # bytes sent before the connection is cut
    corrupt: int = 0  # how many times to deliver wrong bytes
    ranges: bool = True
    announced_size: int | None = None
    stall: threading.Event | None = None  # waits for it in the middle of the file


class Hub:
    """`hub.files[name]` is what it serves; `hub.gets` are the (name, Range) it was asked for."""

    def __init__(self, repo_id: str) -> None:
        self.repo_id = repo_id
        self.files: dict[str, Served] = {}
        self.gets: list[tuple[str, str | None]] = []
        self.heads: list[str] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def storage(self) -> str:
        """Another host, as with the real hub: the announcement is not to be asked for there."""
        return self.endpoint.replace("127.0.0.1", "localhost")

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    """The real hub answers with a redirect to its storage; so does this one."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        resolve = f"/datasets/{self.hub.repo_id}/resolve/main/"
        name = self.path.rpartition("/")[2]
        if name not in self.hub.files or not self.path.startswith((resolve, "/storage/")):
            self._head(404, {"X-Error-Code": "EntryNotFound", "Content-Length": "0"})
        elif self.path.startswith(resolve):
            self._redirect(name, with_body)
        else:
            self._deliver(name, with_body)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def _redirect(self, name: str, with_body: bool) -> None:
        if not with_body:
            self.hub.heads.append(name)
        served = self.hub.files[name]
        headers = {
            "Location": f"{self.hub.storage}/storage/{name}",
            "X-Repo-Commit": COMMIT,
            "X-Linked-Size": str(served.announced_size or len(served.content)),
            "X-Linked-Etag": f'"{hashlib.sha256(served.content).hexdigest()}"',
            "Content-Length": "0",
        }
        self._head(302, headers)

    def _deliver(self, name: str, with_body: bool) -> None:
        served = self.hub.files[name]
        size = len(served.content)
        if not with_body:
            return self._head(200, {"Content-Length": str(size)})
        asked = self.headers.get("Range")
        self.hub.gets.append((name, asked))
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and served.ranges else 0
        body = served.content[start:]
        if served.corrupt:
            served.corrupt -= 1
            body = bytes(byte ^ 255 for byte in body)
        headers = {"Content-Length": str(len(body)), "ETag": '"of-the-storage"'}
        if start:
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        self._head(206 if start else 200, headers)
        self._send(served, body)

    def _send(self, served: Served, body: bytes) -> None:
        if served.stall is not None:
            half, body = body[: len(body) // 2], body[len(body) // 2 :]
            self.wfile.write(half)
            self.wfile.flush()
            served.stall.wait(60)
        if served.cut_after:
            body = body[: served.cut_after.pop(0)]
            self.close_connection = True
        self.wfile.write(body)
