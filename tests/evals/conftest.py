"""A small random model, and scripts called without the cost of another Python process."""

import runpy
import sys

import numpy as np
import pytest
from tiny_run import ROOT

from nanochat_jax.gpt import GPT, GPTConfig, parameter_table
from nanochat_jax.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["who are you? one and two make three. A B C D"] * 3, vocab_size=280)


@pytest.fixture(scope="session")
def model_and_params(tokenizer):
    config = GPTConfig(
        sequence_len=128, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_kv_head=1,
        n_embd=32,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    table = parameter_table(config)
    params = {n: rng.normal(0, 0.3, shape).astype(np.float32) for n, (shape, _) in table.items()}
    return GPT(config), params


@pytest.fixture
def call(monkeypatch, capsys):
    """call("script.py", "--flag=1"): what it prints, or the sentence it ends with."""

    def run(script: str, *args: str) -> str:
        monkeypatch.setattr(sys, "argv", [script, *args])
        try:
            runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
        except SystemExit as end:
            return str(end.code)
        return capsys.readouterr().out

    return run
