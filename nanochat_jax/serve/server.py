"""Running the application under uvicorn, until a signal lets it drain and end."""

import asyncio
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI

from nanochat_jax.serve.service import Service
from nanochat_jax.serve.settings import ServeConfig

FAREWELL_SECONDS = 5  # for the last words to clients whose answers were cut short


class Server(uvicorn.Server):
    """After the first SIGTERM or SIGINT new work is refused and running answers are finished, for
    `drain_seconds` at most; the second signal cuts them short, the third kills the process."""

    def __init__(self, app: FastAPI, say: Callable[[str], object] = lambda _: None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                ws="none",
                timeout_keep_alive=30,  # more than the pauses of most clients
                timeout_graceful_shutdown=FAREWELL_SECONDS,
            )
        )
        self._service: Service = app.state.service
        self._say = say
        self._signals = 0
        self._deadline = float("inf")

    def drain(self) -> None:
        """Begins the end; the listener stays open and answers 503, so that others may notice."""
        seconds = self._service.config.drain_seconds
        self._say(f"shutting down: running answers have {seconds} s, Ctrl-C cuts them short")
        self._service.draining = True
        self._deadline = time.monotonic() + seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Only counts: a signal may come in the middle of anything."""
        self._signals += 1
        if self._signals == 2:
            signal.signal(sig, signal.SIG_DFL)

    async def on_tick(self, counter: int) -> bool:
        if self._signals and not self._service.draining:
            self.drain()
        if self._signals > 1:
            self._deadline = min(self._deadline, time.monotonic())
        return await super().on_tick(counter) or self._has_drained()

    def _has_drained(self) -> bool:
        if not self._service.draining:
            return False
        if time.monotonic() >= self._deadline:
            self._service.cancel_all()
        overdue = time.monotonic() > self._deadline + FAREWELL_SECONDS
        return not self._service.running or overdue

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Unlike uvicorn's, does not raise the signals again: having drained is a good end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        caught = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in caught}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def bind(config: ServeConfig) -> socket.socket:
    """A socket that is bound and does not listen yet; ValueError where it cannot be had."""
    try:
        found = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, address = found[0]
        with ExitStack() as undo:
            bound = undo.enter_context(socket.socket(family, kind, protocol))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            undo.pop_all()
    except OSError as error:
        raise ValueError(
            f"cannot listen on {config.host} port {config.port} ({error.strerror or error}); "
            "choose others with --host and --port"
        ) from None
    return bound


def url_of(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(app: FastAPI, bound: socket.socket, say: Callable[[str], object]) -> None:
    """Serves until a signal; returns when everything has ended."""
    asyncio.run(Server(app, say).serve(sockets=[bound]))
