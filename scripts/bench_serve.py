"""Measures a running server under many simultaneous clients: throughput, latencies, errors, leaks.

    python scripts/bench_serve.py --start                   # starts a server, newest run
    python scripts/bench_serve.py --url http://127.0.0.1:8000 --clients 32 --requests 200
    python scripts/bench_serve.py --start --clients 64 --seconds 120 --disconnects 0.3

First a few requests one after the other, then --requests of them (or for --seconds) by --clients
simultaneous clients; --disconnects is the share that hangs up in mid-answer. All answers are
streamed. ttft is the time to the first piece of text, itl that between two pieces. At the end every
slot of the server should be free again. The last line is one JSON object.
"""

import asyncio
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.table import Column, Table

from nanochat_jax.cli import run_script
from nanochat_jax.config import parse

SERVE = Path(__file__).resolve().parent / "serve.py"
QUESTIONS = (
    "Why is the sky blue?",
    "Write a short poem about the sea.",
    "How do I bake bread?",
    "What is a prime number? Explain it as to a child, with two or three examples.",
    "Tell me a story about a fox and a crow who share a piece of cheese.",
)


@dataclass(frozen=True)
class BenchServeConfig:
    """What to measure."""

    url: str = "http://127.0.0.1:8000"
    """The server."""
    start: bool = False
    """Start a server for this, and stop it afterwards."""
    run: str = ""
    """The run that it serves (the newest)."""
    slots: int = 8
    """Its slots."""
    clients: int = 8
    """Simultaneous clients."""
    requests: int = 40
    """Requests of all clients together."""
    seconds: float = 0.0
    """Send requests for so long, instead of a number of them."""
    sequential: int = 8
    """Requests one after the other beforehand, to compare with."""
    max_tokens: int = 64
    """Tokens of an answer at most."""
    disconnects: float = 0.0
    """Share of the requests that hang up in mid-answer."""
    api_key: str = ""
    """API key, if the server asks for one."""
    seed: int = 0
    """Of the questions and the disconnects."""


@dataclass
class RequestTiming:
    """One request."""

    status: int = 0  # 0: the connection failed
    tokens: int = 0
    times: list[float] = field(default_factory=list)  # of each piece of text, since the request
    hung_up: bool = False


def main() -> None:
    config = parse(BenchServeConfig, "bench_serve", description=__doc__)
    if not 0 <= config.disconnects <= 1:
        raise ValueError(f"--disconnects is a share from 0 to 1, not {config.disconnects}")
    with server(config) as (url, pid):
        result = asyncio.run(measure(config, url, pid))
    table = Table("what", Column("measured", justify="right"), title="the server")
    for name, value in result.items():
        text = "–" if value is None else f"{value:,.4g}" if isinstance(value, float) else str(value)
        table.add_row(name.replace("_", " "), text)
    Console().print(table)
    print(json.dumps(result))


@contextmanager
def server(config: BenchServeConfig) -> Iterator[tuple[str, int | None]]:
    """(address, process id) of the server; the id only of one started here."""
    if not config.start:
        yield config.url, None
        return
    command = [sys.executable, str(SERVE), "--port", "0", "--slots", str(config.slots)]
    command += ["--max-queue", str(4 * config.clients), "--no-access-log"]
    command += ["--run", config.run] if config.run else []
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        found = (re.search(r"listening on (http://\S+)", line) for line in process.stdout)
        address = next(filter(None, found), None)
        if address is None:
            raise ValueError("the server did not start; see its message above")
        try:
            yield address.group(1), process.pid
        finally:
            process.terminate()
            process.communicate(timeout=120)


async def measure(config: BenchServeConfig, url: str, pid: int | None) -> dict[str, Any]:
    """All requests; what they took, and what they left behind on the server."""
    headers = {"Authorization": f"Bearer {config.api_key}"} if config.api_key else {}
    limits = httpx.Limits(max_connections=config.clients + 1)
    async with httpx.AsyncClient(
        base_url=url, headers=headers, timeout=300, limits=limits
    ) as client:
        await until_ready(client)
        await run_clients(config, client, 1, iter(range(2)), disconnects=0.0)  # warm
        before, began = rss_mib(pid), time.perf_counter()
        numbers = iter(range(config.sequential))
        alone = await run_clients(config, client, 1, numbers, disconnects=0.0)
        alone_s, began = time.perf_counter() - began, time.perf_counter()
        numbers = iter(range(config.requests))
        if config.seconds:
            end = began + config.seconds
            numbers = takewhile(lambda _: time.perf_counter() < end, count())
        crowd = await run_clients(config, client, config.clients, numbers, config.disconnects)
        crowd_s = time.perf_counter() - began
        stuck = await stuck_slots(client)
    first = [timing.times[0] for timing in crowd if timing.times]
    between = [gap for timing in crowd for gap in np.diff(timing.times)]
    tokens_per_s = sum(timing.tokens for timing in crowd) / crowd_s
    sequential = sum(timing.tokens for timing in alone) / alone_s
    return {
        "requests": len(crowd),
        "clients": config.clients,
        "hung_up": sum(timing.hung_up for timing in crowd),
        "errors_4xx": sum(400 <= timing.status < 500 for timing in crowd),
        "errors_5xx": sum(timing.status >= 500 for timing in crowd),
        "errors_connection": sum(timing.status == 0 for timing in crowd),
        "tokens_per_s": tokens_per_s,
        "ttft_p50_ms": percentile_ms(first, 50),
        "ttft_p99_ms": percentile_ms(first, 99),
        "itl_p50_ms": percentile_ms(between, 50),
        "itl_p99_ms": percentile_ms(between, 99),
        "sequential_tokens_per_s": sequential,
        "concurrent_over_sequential": tokens_per_s / sequential if sequential else None,
        "seconds": crowd_s,
        "stuck_slots": stuck,
        "rss_growth_mib": None if before is None else (rss_mib(pid) or 0.0) - before,
    }


async def until_ready(client: httpx.AsyncClient) -> None:
    for _ in range(600):
        with suppress(httpx.ConnectError):
            if (await client.get("/ready")).status_code == 200:
                return
        await asyncio.sleep(0.5)
    raise ValueError(f"the server at {client.base_url} did not get ready within five minutes")


async def run_clients(
    config: BenchServeConfig,
    client: httpx.AsyncClient,
    clients: int,
    numbers: Iterator[int],
    disconnects: float,
) -> list[RequestTiming]:
    """The requests of these numbers, shared by all clients."""
    timings: list[RequestTiming] = []

    async def one() -> None:
        for number in numbers:
            rng = random.Random(f"{config.seed} {number}")
            leaves_after = rng.randrange(4) if rng.random() < disconnects else None
            body = {
                "messages": [{"role": "user", "content": rng.choice(QUESTIONS)}],
                "max_tokens": config.max_tokens,
                "seed": number,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            timing = RequestTiming()
            timings.append(timing)
            with suppress(httpx.TransportError):  # the status stays as it was
                await send(client, body, timing, leaves_after)
            if timing.status == 429:
                await asyncio.sleep(0.2)

    await asyncio.gather(*(one() for _ in range(clients)))
    return timings


async def send(
    client: httpx.AsyncClient, body: dict, timing: RequestTiming, leaves_after: int | None
) -> None:
    """One streamed answer; hangs up after so many pieces of text."""
    began = time.perf_counter()
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        timing.status = response.status_code
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if chunk.get("usage"):
                timing.tokens = chunk["usage"]["completion_tokens"]
            if any(choice["delta"].get("content") for choice in chunk["choices"]):
                timing.times.append(time.perf_counter() - began)
            if leaves_after is not None and len(timing.times) >= leaves_after:
                timing.hung_up = True
                return


async def stuck_slots(client: httpx.AsyncClient, seconds: float = 30.0) -> int:
    """Slots that are still busy some seconds after the last request."""
    end = time.perf_counter() + seconds
    while True:
        text = (await client.get("/metrics")).text
        found = re.search(r"^nanochat_busy_slots (\S+)$", text, re.MULTILINE)
        busy = int(float(found.group(1))) if found else 0
        if not busy or time.perf_counter() > end:
            return busy
        await asyncio.sleep(0.2)


def percentile_ms(seconds: Sequence[float], percent: int) -> float | None:
    return 1e3 * float(np.percentile(seconds, percent)) if seconds else None


def rss_mib(pid: int | None) -> float | None:
    """Resident memory of a process on this machine, where /proc has it."""
    path = Path(f"/proc/{pid}/status")
    if pid is None or not path.exists():
        return None
    found = re.search(r"^VmRSS:\s+(\d+) kB", path.read_text(), re.MULTILINE)
    return int(found.group(1)) / 1024 if found else None


if __name__ == "__main__":
    run_script(main)
