"""The real application behind uvicorn, in a thread of the test; and what tests send to it."""

import asyncio
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import scripted
from fastapi import FastAPI

from nanochat_jax.engine.scheduler import Scheduler
from nanochat_jax.serve.app import create_app
from nanochat_jax.serve.server import Server, bind, url_of
from nanochat_jax.serve.settings import ServeConfig

ENGINE = {"n_slots": 4, "chunk": 8}  # always the same, so that its programs are compiled once


@dataclass
class Running:
    """A server under way: where, and what is in it."""

    url: str
    app: FastAPI
    server: Server
    listener: socket.socket

    @property
    def service(self):
        return self.app.state.service

    def stats(self):
        return self.service.scheduler.stats()


@contextmanager
def running_server(
    scheduler: Scheduler, meta: dict, wait: bool = True, **settings
) -> Iterator[Running]:
    """Serves until the block is left; ready when it begins, unless one does not `wait`."""
    config = ServeConfig(**({"port": 0, "run": "scripted", "access_log": False} | settings))
    app = create_app(scheduler, scripted.TOKENIZER, meta, config)
    bound = bind(config)
    server = Server(app)
    thread = threading.Thread(target=asyncio.run, args=[server.serve(sockets=[bound])])
    thread.start()
    try:
        wait_until(lambda: server.started)
        wait_until(lambda: not wait or app.state.service.worker.phase == "ready")
        yield Running(url_of(bound), app, server, bound)
    finally:
        server.should_exit = True
        thread.join()
        bound.close()


def wait_until(condition, seconds: float = 60) -> None:
    """Fails when the condition has not come true in that time."""
    tick = threading.Event()
    for _ in range(int(seconds / 0.005)):
        if condition():
            return
        tick.wait(0.005)
    pytest.fail(f"not true after {seconds} s")


def script_environment(run_folder: Path) -> dict[str, str]:
    """For a script that is to find this run, and not to compile for long."""
    base = str(run_folder.parent.parent)
    return os.environ | {"NANOCHAT_BASE_DIR": base, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def says(content: str = "hello", **more) -> dict:
    """The body of a chat request."""
    return {"messages": [{"role": "user", "content": content}], **more}
