"""What can be said at the start, and what is wrong about it."""

import pytest

from nanochat_jax.config import parse
from nanochat_jax.serve.server import bind, url_of
from nanochat_jax.serve.settings import ServeConfig


def test_settings_from_a_preset_and_the_command_line(tmp_path):
    preset = tmp_path / "mine.toml"
    preset.write_text('[serve]\nslots = 3\nallowed_hosts = ["chat.example"]\n')
    origins = ("https://a.example", "https://b.example")
    args = ["--config", str(preset), "--port", "0", "--cors-origins", *origins]
    config = parse(ServeConfig, "serve", args)
    assert (config.slots, config.port, config.allowed_hosts) == (3, 0, ("chat.example",))
    assert config.cors_origins == origins


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ({"port": 70_000}, "--port must be at most 65535, not 70000"),
        ({"port": -1}, "--port must be at least 0"),
        ({"slots": 0}, "--slots must be at least 1"),
        ({"max_queue": 0}, "--max-queue must be at least 1"),
        ({"rate_limit": -1}, "--rate-limit must be at least 0"),
    ],
)
def test_settings_out_of_range(setting, complaint):
    with pytest.raises(ValueError, match=complaint):
        ServeConfig(**setting)


def test_an_address_that_cannot_be_had():
    with bind(ServeConfig(port=0)) as first:
        first.listen()
        port = first.getsockname()[1]
        assert url_of(first) == f"http://127.0.0.1:{port}"
        with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1 port {port}"):
            bind(ServeConfig(port=port))
    with pytest.raises(ValueError, match="cannot listen on 256"):
        bind(ServeConfig(host="256.0.0.1"))
