"""Who is let in: API keys, rates, names of the host, other origins, and bodies of any size."""

import json
import socket

import httpx
import openai
import pytest
from running import says

from nanochat_jax.serve.middleware import KEYS_VARIABLE, RateLimit, read_keys
from nanochat_jax.serve.settings import ServeConfig

KEY = "nc-schlüssel-1"


@pytest.fixture
def keys_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"# for the tests\n{KEY}\n\nanother\n", encoding="utf-8")
    return str(path)


def test_without_a_key_there_is_only_the_page_and_the_health(serve, keys_file):
    with serve(api_keys_file=keys_file) as server, httpx.Client(base_url=server.url) as http:
        for path in ("/", "/health", "/ready", "/openapi.json"):
            assert http.get(path).status_code == 200, path
        for path in ("/v1/models", "/metrics", "/v1/nothing", "/v1/chat/completions"):
            assert http.get(path).status_code == 401, path
        for wrong in ("", "Bearer", "Bearer x", f"Basic {KEY}", KEY, f"Bearer {KEY}x"):
            headers = {"Authorization": wrong.encode()}
            response = http.post("/v1/chat/completions", json=says(), headers=headers)
            assert response.status_code == 401, wrong
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["type"] == "authentication_error"
            assert KEY not in response.text
        for right in (KEY, "another"):
            headers = {"Authorization": f"Bearer {right}".encode()}
            assert http.get("/v1/models", headers=headers).status_code == 200
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="another") as client:
            assert client.models.list().data
            with pytest.raises(openai.AuthenticationError):
                client.with_options(api_key="other").models.list()


def test_where_keys_come_from(tmp_path, keys_file, monkeypatch):
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    assert read_keys("") == ()
    assert read_keys(keys_file) == (KEY, "another")
    monkeypatch.setenv(KEYS_VARIABLE, "a, b,,another")
    assert read_keys(keys_file) == ("a", "b", "another", KEY)
    empty = tmp_path / "empty"
    empty.write_text("# nothing yet\n")
    with pytest.raises(ValueError, match="holds no API key"):
        read_keys(str(empty))


def test_the_log_tells_keys_apart_and_does_not_tell_them(serve, keys_file, capfd):
    with serve(api_keys_file=keys_file, access_log=True) as server:
        for key in (KEY, "another", KEY):
            headers = {"Authorization": f"Bearer {key}".encode()}
            httpx.post(
                f"{server.url}/v1/chat/completions", json=says(max_tokens=3), headers=headers
            )
        httpx.get(f"{server.url}/health?token=secret")
    out, err = capfd.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    first, second, third, without = (line["key"] for line in lines)
    assert first == third != second
    assert without is None
    for line in lines[:3]:
        assert (line["method"], line["path"]) == ("POST", "/v1/chat/completions")
        assert (line["status"], line["prompt_tokens"], line["completion_tokens"]) == (200, 9, 3)
        assert line["ms"] > 0
        assert line["time"] < lines[-1]["time"]
    assert lines[3]["path"] == "/health"
    assert not any(secret in out for secret in (KEY, "another", "secret"))
    assert err == ""


# --- rates ----------------------------------------------------------------------------------------


def test_too_many_requests_of_one_key(serve, keys_file):
    with serve(api_keys_file=keys_file, rate_limit=2) as server:

        def ask(key):
            headers = {"Authorization": f"Bearer {key}".encode()}
            body = says(max_tokens=1)
            return httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers)

        assert [ask("another").status_code for _ in range(3)] == [200, 200, 429]
        refused = ask("another")
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        assert ask(KEY).status_code == 200
        headers = {"Authorization": "Bearer another"}
        assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 200


def test_a_bucket_fills_again():
    rate = RateLimit(60)
    assert [rate.wait_for("a", 1000) for _ in range(61)] == [0] * 60 + [1]
    assert rate.wait_for("b", 1000) == 0
    assert [rate.wait_for("a", 1002.5) for _ in range(3)] == [0, 0, 1]
    assert [rate.wait_for("a", 1e6) for _ in range(61)] == [0] * 60 + [1]


# --- names and origins ----------------------------------------------------------------------------


def test_only_names_of_this_machine_reach_a_local_server(chat_server, serve):
    port = chat_server.url.rpartition(":")[2]

    def get(url, host):
        return httpx.get(f"{url}/v1/models", headers={"Host": host}).status_code

    for host in ("localhost", f"LocalHost:{port}", "127.0.0.1", f"127.0.0.1:{port}", "[::1]:8000"):
        assert get(chat_server.url, host) == 200, host
    others = ("evil.example", f"evil.example:{port}", "localhost.evil.example", "127.0.0.1.evil")
    for host in others:
        assert get(chat_server.url, host) == 403, host
    with serve(allowed_hosts=("chat.example",)) as server:
        assert get(server.url, "chat.example:443") == 200
        assert get(server.url, "localhost") == 200
        assert get(server.url, "other.example") == 403


def test_a_server_for_others_takes_any_name(serve):
    with serve(host="0.0.0.0") as server:
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        response = httpx.get(f"{url}/v1/models", headers={"Host": "box.example"})
        assert response.status_code == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.53"])
def test_what_is_local(host):
    assert ServeConfig(host=host).is_local


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "box"])
def test_what_is_not_local(host):
    assert not ServeConfig(host=host).is_local


PREFLIGHT = {
    "Origin": "https://page.example",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


def test_pages_of_other_origins_may_not_ask(http):
    for headers in (PREFLIGHT, {"Origin": "null"}):
        for response in (
            http.options("/v1/chat/completions", headers=headers),
            http.get("/v1/models", headers=headers),
        ):
            assert not [name for name in response.headers if name.startswith("access-control")]


def test_pages_of_allowed_origins_may(serve, keys_file):
    with serve(cors_origins=("https://page.example",), api_keys_file=keys_file) as server:
        url = f"{server.url}/v1/chat/completions"
        allowed = httpx.options(url, headers=PREFLIGHT)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://page.example"
        assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
        other = httpx.options(url, headers=PREFLIGHT | {"Origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers
        # Also an error can be read.
        refused = httpx.post(url, json=says(), headers={"Origin": "https://page.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://page.example"


def test_the_page_may_load_nothing_from_elsewhere(http):
    for path in ("/", "/static/api.js"):
        response = http.get(path)
        assert response.status_code == 200
        assert (
            "default-src 'none'; script-src 'self'" in response.headers["content-security-policy"]
        )
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"


# --- bodies ---------------------------------------------------------------------------------------


def test_a_body_of_ten_megabytes(http):
    body = json.dumps(says("x" * 10_000_000)).encode()
    response = http.post("/v1/chat/completions", content=body)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"


def test_a_body_that_does_not_say_how_large_it_is(http):
    def pieces(n):
        yield b'{"prompt": "x", "max_tokens": 1, "user": "'
        for _ in range(n):
            yield b"x" * 100_000
        yield b'"}'

    headers = {"Content-Type": "application/json"}
    small = http.post("/v1/completions", content=pieces(3), headers=headers)
    assert small.status_code == 200
    large = http.post("/v1/completions", content=pieces(100), headers=headers)
    assert large.status_code == 413


def exchange(server, request: bytes) -> bytes:
    """What the server answers to these bytes, until it closes the connection."""
    host, port = server.url.removeprefix("http://").split(":")
    answer = b""
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(request)
        while chunk := connection.recv(65536):
            answer += chunk
    return answer


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def test_who_expects_100_continue_is_refused_before_sending(chat_server):
    asked = HEAD + b"Expect: 100-continue\r\nContent-Length: 99999999\r\n\r\n"
    answer = exchange(chat_server, asked)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"100 Continue" not in answer


def test_what_is_no_http_is_refused(chat_server):
    assert exchange(chat_server, b"\x16\x03\x01\x00 hello\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert exchange(chat_server, HEAD + b"Content-Length: -1\r\n\r\n").startswith(b"HTTP/1.1 400")


def test_a_body_that_never_comes(serve):
    with serve(body_seconds=1) as server:
        answer = exchange(server, HEAD + b'Content-Length: 9\r\n\r\n{"a"')
        assert answer.startswith(b"HTTP/1.1 408")
