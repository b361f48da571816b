"""A browser and the servers that the page is opened from: fixtures for test_page.py.

Chromium is found as NANOCHAT_CHROMIUM says, or on the PATH; Debian's package `chromium` will do.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import scripted
from playwright.sync_api import Browser, Page, expect, sync_playwright
from running import ENGINE, Running, running_server

from nanochat_jax.checkpoint import LoadedModel, load_model
from nanochat_jax.engine.scheduler import Scheduler, make_scheduler

SWITCHES = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


def chromium() -> str:
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("NANOCHAT_CHROMIUM") or next(filter(None, map(shutil.which, names)), "")
    if not found:
        message = "there is no Chromium; install it or set NANOCHAT_CHROMIUM to its path"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=SWITCHES)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("base") / "runs" / "toy"
    scripted.write_run(folder, chains=scripted.PAGE)
    return load_model(folder)


@pytest.fixture(scope="module")
def chat_url(toy) -> Iterator[str]:
    """A server whose model chats."""
    scheduler = make_scheduler(toy.model, toy.params, toy.tokenizer, **ENGINE)
    with running_server(scheduler, toy.meta, run="toy") as server:
        yield server.url


@pytest.fixture(scope="module")
def slow_scheduler(toy) -> Scheduler:
    """Notices after every token who has left."""
    return make_scheduler(toy.model, toy.params, toy.tokenizer, n_slots=1, chunk=1, max_queue=1)


@pytest.fixture
def start_server(slow_scheduler, toy) -> Iterator[Callable[..., Running]]:
    """`start_server(stage, rate_limit=1)` starts a server for this test only."""
    with ExitStack() as stack:

        def start(stage: str, **settings) -> Running:
            meta = toy.meta | {"stage": stage}
            server = running_server(slow_scheduler, meta, run="toy", **settings)
            return stack.enter_context(server)

        yield start


@pytest.fixture
def visit(browser) -> Iterator[Callable[..., Page]]:
    """`visit(url, **how)` opens the page as a new reader.

    Errors in its console and dialogs fail the test, but for errors that match `allow`.
    """
    contexts, wrong = [], []

    def open_page(url: str, allow: str = "^$", model: str = "toy", **how) -> Page:
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 800}} | how))
        context.set_default_timeout(10_000)
        contexts.append(context)
        page = context.new_page()
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "console",
            lambda message: (
                message.type in ("error", "warning")
                and not re.search(allow, message.text)
                and wrong.append(message.text)
            ),
        )
        page.goto(url)
        expect(page.locator("#model-name")).to_have_text(model)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture
def chat(visit, chat_url) -> Page:
    return visit(chat_url)


@pytest.fixture
def endless(visit, start_server) -> Page:
    """Talks to a base model, whose longest answers take their time."""
    url = start_server("pretrain").url
    settings = {"name": "nanochat:settings", "value": '{"maxTokens": 4096}'}
    state = {"cookies": [], "origins": [{"origin": url, "localStorage": [settings]}]}
    return visit(url, storage_state=state)
