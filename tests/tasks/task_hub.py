"""A hub on 127.0.0.1 with data sets as folders of Parquet files, which cuts and corrupts them."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class TaskHub:
    """`files["org/name", "subset/split/0000.parquet"]` is what it serves, `log` what was asked."""

    def __init__(self) -> None:
        self.files: dict[tuple[str, str], bytes] = {}
        self.cut: dict[str, int] = {}  # path → bytes after which the connection ends, once
        self.corrupt: set[str] = set()  # paths of which other bytes come than announced
        self.stall: threading.Event | None = None  # waited for in the middle of every file
        self.log: list[tuple[str, str, str | None]] = []  # method, path, Range
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: TaskHub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.hub.log.append((self.command, path, self.headers.get("Range")))
        if path.startswith("/api/datasets/"):
            self._list(path)
        elif path.startswith("/elsewhere/"):
            self._deliver(self.hub.files.get(("", path.rpartition("/")[2])), path)
        else:
            repo, _, name = path.removeprefix("/datasets/").partition(
                "/resolve/refs/convert/parquet/"
            )
            self._deliver(self.hub.files.get((repo, name)), name)

    def _list(self, path: str) -> None:
        repo, _, folder = path.removeprefix("/api/datasets/").partition(
            "/tree/refs/convert/parquet/"
        )
        names = [n for r, n in self.hub.files if r == repo and n.startswith(f"{folder}/")]
        if not names:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        listed = [{"type": "file", "path": name, "size": 1} for name in reversed(names)]
        self._send(200, json.dumps(listed).encode(), {"Content-Type": "application/json"})

    def _deliver(self, content: bytes | None, name: str) -> None:
        if content is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        sha256 = hashlib.sha256(content).hexdigest()
        headers = {"X-Repo-Commit": COMMIT, "X-Linked-Etag": f'"{sha256}"', "ETag": '"plain"'}
        if name.startswith("/elsewhere/"):
            headers = {"ETag": 'W/"plain"'}
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        body = content[start:]
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(206 if start else 200, body, headers, name)

    def _send(self, status: int, body: bytes, headers: dict[str, str], name: str = "") -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if name in self.hub.corrupt:
            body = bytes(byte ^ 255 for byte in body)
        if name in self.hub.cut:
            body, self.close_connection = body[: self.hub.cut.pop(name)], True
        if name and self.hub.stall is not None:
            half, body = body[: len(body) // 2], body[len(body) // 2 :]
            self.wfile.write(half)
            self.wfile.flush()
            self.hub.stall.wait(60)
        self.wfile.write(body)
