"""A small model whose words are known (scripted.py), behind the real application (running.py)."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import jax
import pytest
import scripted
from running import ENGINE, Running, running_server

from nanochat_jax.checkpoint import load_model
from nanochat_jax.engine.scheduler import Scheduler, make_scheduler


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory) -> Path:
    """The run of a model that chats."""
    base = tmp_path_factory.mktemp("base")
    folder = base / "runs" / "scripted"
    scripted.write_run(folder, stage="sft")
    # Programs that scripts compiled in an earlier run of the tests are used again.
    compiled = Path(jax.config.jax_compilation_cache_dir) / "scripts"
    compiled.mkdir(parents=True, exist_ok=True)
    (base / "jax_cache").symlink_to(compiled)
    return folder


@pytest.fixture(scope="session")
def loaded(run_folder):
    return load_model(run_folder)


@pytest.fixture(scope="session")
def chat_server(loaded) -> Iterator[Running]:
    """A server with the usual settings, shared by all tests that change nothing."""
    with running_server(
        make_scheduler(loaded.model, loaded.params, loaded.tokenizer, **ENGINE), loaded.meta
    ) as server:
        yield server


@pytest.fixture(scope="session")
def spare_scheduler(loaded) -> Scheduler:
    return make_scheduler(loaded.model, loaded.params, loaded.tokenizer, **ENGINE, max_queue=2)


@pytest.fixture
def serve(spare_scheduler, loaded):
    """`with serve(rate_limit=3) as server`: a server for this test, one at a time."""

    def start(stage: str = "sft", **settings):
        return running_server(spare_scheduler, loaded.meta | {"stage": stage}, **settings)

    return start


@pytest.fixture(scope="session")
def http(chat_server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=chat_server.url, timeout=60) as client:
        yield client
