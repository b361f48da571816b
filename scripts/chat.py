"""Talks with a model in the terminal.

    python scripts/chat.py                                  the newest run
    python scripts/chat.py --run d24 -p "Why is the sky blue?"      one answer, then the end
    cat question.txt | python scripts/chat.py -p -

While it writes, Ctrl-C stops the answer; otherwise Ctrl-C, Ctrl-D or /quit leave. /help lists what
else can be typed. A model that has only been pretrained continues what you write.
"""

import contextlib
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from nanochat_jax.checkpoint import load_model
from nanochat_jax.cli import run_script
from nanochat_jax.config import parse
from nanochat_jax.distributed import start
from nanochat_jax.engine.scheduler import make_scheduler
from nanochat_jax.runs import default_run, run_folder
from nanochat_jax.serve.terminal import Settings, Terminal, talk


@dataclass(frozen=True)
class ChatConfig(Settings):
    """Which model to talk with, and how it samples its answers."""

    run: str = ""
    """Name of the run, or its folder (the newest run)."""
    step: str = "last"
    """Which checkpoint: a step, last or best."""
    prompt: Annotated[str | None, tyro.conf.arg(aliases=["-p"])] = None
    """Answer this and end; - reads it from standard input."""


def main() -> None:
    config = parse(ChatConfig, "chat", description=__doc__)
    prompt = sys.stdin.read() if config.prompt == "-" else config.prompt
    start()
    run = config.run or default_run()
    loaded = load_model(run_folder(run), config.step)
    terminal = Terminal(
        make_scheduler(loaded.model, loaded.params, loaded.tokenizer, n_slots=1, chunk=8),
        loaded,
        run,
        config,
    )
    with terminal, contextlib.suppress(KeyboardInterrupt):
        if prompt is None:
            talk(terminal)
        else:
            terminal.ask(prompt)


if __name__ == "__main__":
    run_script(main)
