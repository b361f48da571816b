"""A small random model and its tokenizer."""

import pytest
from random_params import random_params

from nanochat_jax.gpt import GPT, GPTConfig
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
    return GPT(config), random_params(config)
