"""Decoding equals the forward pass: the original's logits, and any lengths, chunks and windows."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_model import random_model

from nanochat_jax.engine.cache import can_rewind, empty_cache, ring_sizes
from nanochat_jax.engine.decode import decode_weights, forward_chunk
from nanochat_jax.gpt import GPT, GPTConfig
from nanochat_jax.interop.names import params_from_torch

CHUNKS = (1, 2, 7, 40)  # few shapes to compile
LENGTH = 170  # tokens of a row: beyond the short window, which is 128, and the ring of the long one


@cache
def model_and_programs(recipe: str, capacity: int):
    """The long window is 150, so that its ring wraps too."""
    model, params = random_model(recipe, sequence_len=150 if recipe == "2026" else LENGTH)
    extend = jax.jit(partial(forward_chunk, model.config, jnp.float32))
    return model, params, extend, decode_weights(model, params)


@cache
def full_logits(recipe: str, capacity: int):
    model, params, _, _ = model_and_programs(recipe, capacity)
    tokens = np.random.default_rng(3).integers(0, 100, (2, LENGTH)).astype(np.int32)
    return tokens, np.asarray(jax.jit(model.apply)({"params": params}, tokens))


@settings(max_examples=12, deadline=None)
@given(data=st.data(), recipe=st.sampled_from(["2025", "2026"]))
def test_any_chunking_gives_the_logits_of_the_forward_pass(data, recipe):
    """Two rows that advance by different counts in the same calls, padding included."""
    model, _, extend, weights = model_and_programs(recipe, LENGTH)
    tokens, wanted = full_logits(recipe, LENGTH)
    rows = empty_cache(model.config, 2, LENGTH, jnp.float32)
    at = np.zeros(2, np.int32)
    while at.max() < LENGTH:
        width = data.draw(st.sampled_from(CHUNKS[1:] if data.draw(st.integers(0, 9)) else CHUNKS))
        counts = np.array([data.draw(st.integers(0, min(width, LENGTH - a))) for a in at], np.int32)
        counts = counts if counts.any() else np.minimum(width, LENGTH - at).astype(np.int32)
        chunk = np.full((2, width), 99, np.int32)
        for row, (start, count) in enumerate(zip(at, counts, strict=True)):
            chunk[row, :count] = tokens[row, start : start + count]
        logits, rows = extend(weights, rows, chunk, counts)
        at += counts
        for row in np.flatnonzero(counts):
            np.testing.assert_allclose(logits[row], wanted[row, at[row] - 1], atol=2e-4)
    assert rows.lengths_R.tolist() == at.tolist()


@pytest.mark.parametrize("recipe", ["2025", "2026"])
def test_one_token_at_a_time_gives_the_logits_of_the_forward_pass(recipe):
    model, _, extend, weights = model_and_programs(recipe, LENGTH)
    tokens, wanted = full_logits(recipe, LENGTH)
    rows = empty_cache(model.config, 2, LENGTH, jnp.float32)
    for i in range(LENGTH):
        logits, rows = extend(weights, rows, tokens[:, i : i + 1], np.ones(2, np.int32))
        np.testing.assert_allclose(logits, wanted[:, i], atol=2e-4, err_msg=str(i))


def test_a_ring_holds_the_window_and_the_token_itself():
    config = GPTConfig(sequence_len=2048, n_layer=4, window_pattern="SSSL")
    assert ring_sizes(config, 2048) == (513, 513, 513, 2048)
    assert ring_sizes(config, 300) == (300,) * 4
    assert ring_sizes(GPTConfig(recipe="2025", n_layer=2), 700) == (700, 700)


@settings(max_examples=15, deadline=None)
@given(length=st.integers(1, LENGTH), start=st.integers(0, LENGTH - 1))
def test_a_row_continues_from_any_start_that_it_can_be_rewound_to(length, start):
    """And the rule is not too strict: a row that never wrapped can always be rewound."""
    start = min(start, length - 1)
    model, _, extend, weights = model_and_programs("2026", LENGTH)
    config = model.config
    assert can_rewind(config, LENGTH, min(length, 129), min(start, 128))
    if not can_rewind(config, LENGTH, length, start):
        return
    tokens, _ = full_logits("2026", LENGTH)
    other = (tokens + 1) % 100  # what follows the start, and is to be forgotten

    def append(rows, part):
        chunk = np.zeros((2, LENGTH), np.int32)
        chunk[:, : part.shape[1]] = part
        return extend(weights, rows, chunk, np.full(2, part.shape[1], np.int32))

    _, rows = append(empty_cache(config, 2, LENGTH, jnp.float32), tokens[:, :start])
    _, rows = append(rows, other[:, start:length])
    last = tokens[:, max(start - 1, 0)]
    rows = rows.replace(lengths_R=jnp.full(2, start), last_R=jnp.asarray(last))
    logits, _ = append(rows, tokens[:, start : start + 30])
    _, wanted = full_logits("2026", LENGTH)
    end = min(start + 30, LENGTH) - 1
    np.testing.assert_allclose(logits, wanted[:, end], atol=2e-4)


# --- the original ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original(golden):
    meta, arrays = golden.json("engine2026"), golden.npz("engine2026")
    model = GPT(GPTConfig(**meta["config"]))
    named = {
        name.removeprefix("param/"): array
        for name, array in golden.npz("gpt2026_forward").items()
        if name.startswith("param/")
    }
    params = params_from_torch(model.config, named)
    extend = jax.jit(partial(forward_chunk, model.config, jnp.float32))
    return model, params, meta, arrays, extend, decode_weights(model, params)


@pytest.mark.golden
def test_greedy_tokens_and_their_logits(original):
    """Prompts that cross the short window and the training length, and a prompt of one token."""
    model, _, meta, arrays, extend, weights = original
    one = meta["one_token_prompt"]
    cases = [
        (c["prompt"], c["tokens"], arrays[f"case{i}/logits"]) for i, c in enumerate(meta["cases"])
    ]
    cases.append((one["prompt"], one["tokens"], arrays.get("one_token/logits")))
    longest = max(len(prompt) + len(tokens) for prompt, tokens, _ in cases)
    for prompt, tokens, wanted in cases:
        rows = empty_cache(model.config, 1, longest, jnp.float32)
        chunk = np.zeros((1, longest), np.int32)
        chunk[0, : len(prompt)] = prompt
        logits, rows = extend(weights, rows, chunk, np.array([len(prompt)], np.int32))
        for i, token in enumerate(tokens):
            assert int(np.argmax(logits)) == token
            if wanted is not None:
                np.testing.assert_allclose(logits[0], wanted[i], atol=3e-5)
            logits, rows = extend(weights, rows, np.array([[token]]), np.ones(1, np.int32))


@pytest.mark.golden
def test_a_second_chunk_does_not_forget_the_smear(original):
    """Where the original's differs from its own full forward pass by 0.67 (recipe section 12)."""
    model, params, meta, arrays, extend, weights = original
    first, second = (meta["chunked_second_prefill"][key] for key in ("first", "second"))
    tokens = np.resize(arrays["case2/prompt"], first + second)[None].astype(np.int32)
    wanted = jax.jit(model.apply)({"params": params}, tokens)
    rows = empty_cache(model.config, 1, first + second, jnp.float32)
    _, rows = extend(weights, rows, tokens[:, :first], np.array([first], np.int32))
    for count in range(1, second + 1):
        chunk = tokens[:, first:]
        logits, _ = extend(weights, rows, chunk, np.array([count], np.int32))
        np.testing.assert_allclose(logits[0], wanted[0, first + count - 1], atol=3e-5)
