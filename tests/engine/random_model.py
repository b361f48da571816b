"""A small model of both recipes for the engine's tests, every parameter random and not zero."""

import numpy as np

from nanochat_jax.gpt import GPT, GPTConfig, parameter_table


def random_model(recipe: str = "2026", seed: int = 0, **changes):
    """(model, params), with grouped queries and a short window (always 128 tokens or more)."""
    settings = {
        "sequence_len": 64,
        "vocab_size": 100,
        "n_layer": 3,
        "n_head": 4,
        "n_kv_head": 2,
        "n_embd": 32,
        "window_pattern": "SL",
    }
    config = GPTConfig(recipe=recipe, **(settings | changes))
    rng = np.random.default_rng(seed)
    table = parameter_table(config)
    params = {n: rng.normal(0, 0.3, shape).astype(np.float32) for n, (shape, _) in table.items()}
    return GPT(config), params
