"""What the tests of the page talk to: the real server with a small model whose words are known.

As in scripted.py the logits depend on the last token alone. Some tokens are whole words here, so
that an answer may contain a letter twice, and HTML.
"""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from fastapi import FastAPI

from nanochat_jax.checkpoint import Checkpoints, model_meta
from nanochat_jax.engine.scheduler import Scheduler
from nanochat_jax.gpt import GPTConfig, parameter_table
from nanochat_jax.runs import TOKENIZER_FOLDER
from nanochat_jax.serve.app import create_app
from nanochat_jax.serve.server import Server, bind, url_of
from nanochat_jax.serve.settings import ServeConfig
from nanochat_jax.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat_jax.train import TrainState

# What every chat says: one of two words, equally likely, and then the rest. The 36 between the two
# is the calculator's.
FIRST_WORDS = ("Good", "Nice")
HOSTILE = "<img src=x onerror=alert(1)>"
BEFORE = (" day ", HOSTILE, "\n", "<|python_start|>", "12*3", "<|python_end|>")
AFTER = (" is it", b" \xf0\x9f", b"\x98\x80:\n", "```py\n", "print(36)", "\n```\n", "Bye.")
ANSWER_TEXT = f" day {HOSTILE}\n is it 😀:\n```py\nprint(36)\n```\nBye."
SHOWN = f" day {HOSTILE}\nCalculator: 12*3=Result: 36 is it 😀:\nprint(36)\nBye."
# A base model goes on with a text that ends in "o" until the context is full.
ENDLESS = (" on", " and", " on")

WORDS = dict.fromkeys(
    word if isinstance(word, bytes) else word.encode()
    for word in (*FIRST_WORDS, *BEFORE, *AFTER, *ENDLESS)
    if len(word) > 1 and word not in SPECIAL_TOKENS
)
TOKENIZER = Tokenizer([*(bytes([b]) for b in range(256)), *WORDS])
CONFIG = GPTConfig(
    sequence_len=4096,
    vocab_size=TOKENIZER.vocab_size,
    n_layer=1,
    n_head=2,
    n_kv_head=1,
    n_embd=288,
    window_pattern="L",
)


def token_of(word: str | bytes) -> int:
    if word in SPECIAL_TOKENS:
        return TOKENIZER.special_id(word)
    return TOKENIZER.ranks.index(word if isinstance(word, bytes) else word.encode())


def followers() -> dict[int, list[int]]:
    """token -> those that may follow it, equally likely; after all others comes <|bos|>."""
    chains = [
        *(("<|assistant_start|>", word, *BEFORE) for word in FIRST_WORDS),
        ("<|output_end|>", *AFTER, "<|assistant_end|>"),
        ("o", *ENDLESS),
    ]
    after: dict[int, list[int]] = {}
    for chain in chains:
        for word, following in pairwise(chain):
            after.setdefault(token_of(word), []).append(token_of(following))
    return after


def parameters() -> dict[str, np.ndarray]:
    params = {
        name: np.zeros(shape, np.float32) for name, (shape, _) in parameter_table(CONFIG).items()
    }
    params["resid_lambdas"][:] = 1
    after = followers()
    for token in range(CONFIG.vocab_size):
        params["wte"][token, token] = 1
        for follower in after.get(token, [TOKENIZER.bos_id]):
            params["lm_head"][follower, token] = 2
    return params


def write_run(folder: Path) -> None:
    """The run of this model, with a checkpoint."""
    TOKENIZER.save(folder / TOKENIZER_FOLDER)
    state = TrainState(jnp.int32(7), jax.device_put(parameters()), {"none": jnp.zeros(1)})
    with Checkpoints(folder) as checkpoints:
        meta = model_meta(CONFIG) | {"stage": "sft", "step": 7, "val_bpb": 1.25}
        checkpoints.save(state, meta, None)


@contextmanager
def page_server(scheduler: Scheduler, meta: dict, stage: str, **settings) -> Iterator[FastAPI]:
    """Serves until the block is left, which gets the application; `app.state.url` is where."""
    config = ServeConfig(**({"port": 0, "run": "toy", "access_log": False} | settings))
    ready = threading.Event()
    app = create_app(
        scheduler,
        TOKENIZER,
        meta | {"stage": stage},
        config,
        progress=lambda text: ready.set() if text == "ready" else None,
    )
    bound = bind(config)
    server = Server(app)
    thread = threading.Thread(target=asyncio.run, args=[server.serve(sockets=[bound])])
    thread.start()
    try:
        assert ready.wait(120)
        app.state.url = url_of(bound)
        yield app
    finally:
        server.should_exit = True
        thread.join()
