"""The settings of the server: one flat frozen dataclass, filled by scripts/serve.py."""

import ipaddress
from dataclasses import dataclass, fields

MAY_BE_ZERO = ("port", "rate_limit", "drain_seconds", "max_temperature", "max_top_k")


@dataclass(frozen=True)
class ServeConfig:
    """What to serve, to whom, and the limits of a request."""

    run: str = ""
    """Name of the run, or its folder (the newest run)."""
    step: str = "last"
    """Which checkpoint: a step, last or best."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every network this machine is in."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""

    # the engine
    n_devices: int | None = None
    """Devices to use (all): each holds its share of the slots, and the whole model."""
    slots: int = 8
    """Samples that are generated at the same time."""
    chunk: int = 16
    """Tokens between two looks at who came and who left; fewer stream more smoothly."""
    max_queue: int = 64
    """Requests that may wait for a slot; others are asked to come back later (429)."""

    # who may ask
    api_keys_file: str = ""
    """File of accepted API keys, one a line; NANOCHAT_API_KEYS (commas between) works too."""
    rate_limit: int = 0
    """Requests a minute that one key, or one address without keys, may make; 0: any number."""
    cors_origins: tuple[str, ...] = ()
    """Web pages of these origins may use the server from a browser, like https://example.org."""
    allowed_hosts: tuple[str, ...] = ()
    """Names this server is known by; on a loopback address others than localhost are refused."""

    # the limits of a request
    max_messages: int = 500
    """Messages of a conversation."""
    max_message_chars: int = 8_000
    """Characters of one message."""
    max_chars: int = 32_000
    """Characters of all messages, or of all prompts."""
    max_temperature: float = 2.0
    """Highest temperature."""
    max_top_k: int = 200
    """Highest top_k."""
    max_new_tokens: int = 4096
    """Highest max_tokens."""
    max_n: int = 8
    """Most answers to one prompt."""
    max_prompts: int = 16
    """Most prompts of one request to /v1/completions."""
    max_body_bytes: int = 1 << 20
    """Largest body of a request."""
    body_seconds: int = 30
    """Longest time in which it must have arrived."""

    # running it
    drain_seconds: int = 30
    """How long running requests may take to finish after SIGTERM or Ctrl-C."""
    access_log: bool = True
    """Print a line of JSON for every request."""

    def __post_init__(self) -> None:
        for name in ("cors_origins", "allowed_hosts"):  # TOML has lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for setting in fields(self):
            value, least = getattr(self, setting.name), 0 if setting.name in MAY_BE_ZERO else 1
            if setting.type in (int, float) and value < least:
                flag = setting.name.replace("_", "-")
                raise ValueError(f"--{flag} must be at least {least}, not {value}")
        if self.port > 65_535:
            raise ValueError(f"--port must be at most 65535, not {self.port}")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
