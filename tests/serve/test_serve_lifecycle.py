"""Clients that leave, queues that fill, engines that fail, and the end of a server."""

import json
import signal
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import httpx
import scripted
from running import says, script_environment, wait_until

ROOT = Path(__file__).resolve().parent.parent.parent
ENDLESS = {"prompt": "x", "temperature": 0, "max_tokens": 4000}


def is_idle(server) -> bool:
    stats = server.stats()
    return stats.busy_slots == stats.queued == len(server.service.running) == 0


def events(response) -> list:
    """The data of a stream of server-sent events."""
    lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


# --- clients that leave ---------------------------------------------------------------------------


def test_a_client_that_leaves_its_stream_frees_the_slots(chat_server, http):
    wait_until(lambda: is_idle(chat_server))
    before = chat_server.stats().tokens_generated
    with http.stream("POST", "/v1/completions", json=ENDLESS | {"stream": True, "n": 3}) as stream:
        lines = stream.iter_lines()  # kept: without it the connection would close
        next(lines)
        assert chat_server.stats().busy_slots == 3
    wait_until(lambda: is_idle(chat_server))
    assert chat_server.stats().tokens_generated - before < 3 * 4000


def test_a_client_that_does_not_wait_for_its_answer_frees_the_slot(chat_server):
    wait_until(lambda: is_idle(chat_server))
    before = chat_server.stats().tokens_generated
    body = json.dumps(ENDLESS).encode()
    with connect(chat_server) as client:
        client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        wait_until(lambda: chat_server.stats().busy_slots == 1)
    wait_until(lambda: is_idle(chat_server))
    assert chat_server.stats().tokens_generated - before < 4000


def test_a_client_that_leaves_the_queue_is_forgotten(serve):
    with serve() as server, ExitStack() as clients:
        hold_all_slots(server, clients)
        with httpx.stream("POST", f"{server.url}/v1/completions", json=ENDLESS | {"stream": True}):
            wait_until(lambda: server.stats().queued == 2)
        wait_until(lambda: server.stats().queued == 1)
        assert server.stats().busy_slots == 4


def test_a_client_that_reads_nothing_blocks_no_other(chat_server, http):
    body = ENDLESS | {"stream": True, "n": 4, "logprobs": 5, "max_tokens": 1000}
    content = json.dumps(body).encode()
    # The system would keep megabytes for the client; those who come now get less.
    chat_server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with connect(chat_server, receive_buffer=4096) as client:
        head = HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(content)
        client.sendall(head + content)
        wait_until(lambda: chat_server.stats().busy_slots == 4)
        # All is generated although nothing is read, and others are served.
        wait_until(lambda: chat_server.stats().busy_slots == 0)
        assert http.post("/v1/chat/completions", json=says()).status_code == 200
        assert len(chat_server.service.running) == 1
        answer = b"".join(iter(lambda: client.recv(1 << 20), b""))
    assert answer.count(b'"finish_reason":"length"') == 4
    assert b"data: [DONE]" in answer
    wait_until(lambda: is_idle(chat_server))


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def connect(server, receive_buffer: int = 0) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    client = socket.socket()
    if receive_buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.settimeout(60)
    client.connect((host, int(port)))
    return client


def hold_all_slots(server, clients: ExitStack) -> None:
    """A request of more samples than there are slots, so that one of its two groups waits."""
    body = ENDLESS | {"stream": True, "n": 8}
    stream = httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60)
    clients.enter_context(stream)
    wait_until(lambda: server.stats().busy_slots == 4)


# --- queues and failures --------------------------------------------------------------------------


def test_a_full_queue_says_when_to_come_back(serve):
    with serve() as server, ExitStack() as clients:
        hold_all_slots(server, clients)
        url = f"{server.url}/v1/completions"
        clients.enter_context(httpx.stream("POST", url, json=ENDLESS | {"stream": True}))
        wait_until(lambda: server.stats().queued == 2)
        for body in (ENDLESS, ENDLESS | {"stream": True}):
            refused = httpx.post(url, json=body)
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "queue_full"
            assert 1 <= int(refused.headers["retry-after"]) <= 60


def test_several_prompts_are_queued_together_or_not_at_all(serve):
    with serve() as server:
        refused = httpx.post(f"{server.url}/v1/completions", json=ENDLESS | {"prompt": ["x"] * 9})
        assert refused.status_code == 429
        wait_until(lambda: is_idle(server))


def test_a_failure_of_the_engine_fails_its_requests_only(serve, spare_scheduler, monkeypatch):
    decode, failures = spare_scheduler.engine.decode, [RuntimeError("secret detail")]

    def fails_once(*args, **kwargs):
        if failures:
            raise failures.pop()
        return decode(*args, **kwargs)

    with serve() as server:
        monkeypatch.setattr(spare_scheduler.engine, "decode", fails_once)
        failed = httpx.post(f"{server.url}/v1/chat/completions", json=says())
        assert failed.status_code == 500
        assert failed.json()["error"]["type"] == "api_error"
        assert "secret detail" not in failed.text
        failures.append(RuntimeError("secret detail"))
        with httpx.stream(
            "POST", f"{server.url}/v1/chat/completions", json=says(stream=True)
        ) as stream:
            *_, last = events(stream)
        assert last["error"]["code"] == "internal"
        again = httpx.post(f"{server.url}/v1/chat/completions", json=says(temperature=0))
        assert again.json()["choices"][0]["message"]["content"] == scripted.ANSWER_TEXT


def test_a_mistake_of_ours_is_logged_and_not_shown(serve, monkeypatch, caplog):
    def fails():
        raise KeyError("secret detail")

    with serve() as server:
        monkeypatch.setattr(server.service.metrics, "text", fails)
        answer = httpx.get(f"{server.url}/metrics")
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal"
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] in caplog.text
    assert "secret detail" in caplog.text


# --- beginning and end ----------------------------------------------------------------------------


def test_not_ready_until_all_programs_are_compiled(serve, spare_scheduler, monkeypatch):
    proceed = threading.Event()
    warm_up = spare_scheduler.engine.warm_up

    def waits(progress):
        proceed.wait()
        warm_up(progress)

    monkeypatch.setattr(spare_scheduler.engine, "warm_up", waits)
    with serve(wait=False) as server, httpx.Client(base_url=server.url) as http:
        warming = http.get("/ready")
        assert (warming.status_code, warming.json()) == (503, {"status": "warming up"})
        assert http.get("/health").status_code == 200
        proceed.set()
        # Who comes early only waits.
        early = http.post("/v1/chat/completions", json=says(temperature=0))
        assert early.json()["choices"][0]["message"]["content"] == scripted.ANSWER_TEXT
        assert http.get("/ready").json() == {"status": "ready"}


def test_a_base_model_is_served_as_what_it_is(serve):
    with serve(stage="pretrain") as server, httpx.Client(base_url=server.url) as http:
        assert http.get("/v1/models").json()["data"][0]["stage"] == "base"
        body = says("it goes x", temperature=0, max_tokens=5)
        answer = http.post("/v1/chat/completions", json=body).json()
        assert answer["choices"][0]["message"]["content"] == "yzxyz"
        assert answer["usage"]["prompt_tokens"] == len("it goes x") + 1


def test_metrics(serve):
    with serve() as server, httpx.Client(base_url=server.url) as http:
        assert http.post("/v1/chat/completions", json=says(max_tokens=5)).status_code == 200
        assert http.post("/v1/chat/completions", json={}).status_code == 400
        assert http.get("/no/such/thing").status_code == 404
        response = http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    numbers = dict(
        line.rsplit(" ", 1) for line in response.text.splitlines() if not line.startswith("#")
    )
    assert numbers["nanochat_slots"] == "4.0"
    assert numbers["nanochat_busy_slots"] == numbers["nanochat_queued_requests"] == "0.0"
    assert numbers["nanochat_time_to_first_token_seconds_count"] == "1.0"
    assert numbers["nanochat_time_per_output_token_seconds_count"] == "1.0"
    assert float(numbers["nanochat_generated_tokens_total"]) >= 5
    assert float(numbers["nanochat_tokens_per_second"]) == 0.5
    requests = {
        name: n for name, n in numbers.items() if name.startswith("nanochat_requests_total")
    }
    assert requests == {
        'nanochat_requests_total{route="/v1/chat/completions",status="200"}': "1.0",
        'nanochat_requests_total{route="/v1/chat/completions",status="400"}': "1.0",
        'nanochat_requests_total{route="none",status="404"}': "1.0",
    }


def test_at_the_end_running_answers_are_finished_and_no_new_ones_begun(serve):
    body = ENDLESS | {"stream": True, "max_tokens": 1000}
    with serve() as server, httpx.Client(base_url=server.url) as http:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.server.drain()
            refused = http.post("/v1/completions", json=ENDLESS)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "shutting_down"
            assert "retry-after" in refused.headers
            assert http.get("/ready").json() == {"status": "draining"}
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in rest[-2]
        wait_until(lambda: server.service.worker.phase == "stopped")


def test_answers_that_take_too_long_are_cut_short_at_the_end(serve):
    with (
        serve(drain_seconds=0) as server,
        httpx.stream(
            "POST", f"{server.url}/v1/completions", json=ENDLESS | {"stream": True, "n": 8}
        ) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        server.server.drain()
        *_, last = [line for line in lines if line]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
        wait_until(lambda: server.service.worker.phase == "stopped")


def test_the_script_serves_the_newest_run_and_ends_well(run_folder):
    """scripts/serve.py as people start it; SIGTERM in the middle of an answer."""
    process = subprocess.Popen(
        [sys.executable, ROOT / "scripts" / "serve.py", "--port", "0", "--slots", "4"],
        env=script_environment(run_folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    said: list[str] = []
    for line in process.stdout:
        said.append(line.strip())
        if line.strip() == "ready":
            break
    url = next(line.split()[-1] for line in said if line.startswith("listening on http://"))
    assert any("scripted, step 7: a chat model" in line for line in said)
    with httpx.stream(
        "POST", f"{url}/v1/completions", json=ENDLESS | {"stream": True, "max_tokens": 1000}
    ) as stream:
        lines = stream.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    assert "shutting down" in out
    log = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [(line["path"], line["status"]) for line in log] == [("/v1/completions", 200)]
    assert log[0]["completion_tokens"] == 1000
