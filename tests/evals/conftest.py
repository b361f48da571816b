"""A small random model and its tokenizer."""

import numpy as np
import pytest

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
