"""Log-probabilities of a text: against the model's own losses, its arg-max, and across pieces."""

from functools import partial

import jax
import numpy as np
import pytest
from random_params import random_params

from nanochat_jax.evals.bits_per_byte import token_logprobs
from nanochat_jax.gpt import GPT, GPTConfig
from nanochat_jax.tokenizer import Tokenizer

LENGTH = 32
TEXT = "Größe: one and two make three. " * 4


@pytest.fixture(scope="module", params=["2025", "2026"])
def loaded(request):
    tokenizer = Tokenizer.train(["one and two make three."] * 3, vocab_size=280)
    config = GPTConfig(
        recipe=request.param, sequence_len=LENGTH, vocab_size=tokenizer.vocab_size, n_layer=1,
        n_head=2, n_kv_head=1, n_embd=32,
    )  # fmt: skip
    return GPT(config), random_params(config), tokenizer


def losses(model, params, tokens) -> np.ndarray:
    rows = np.array([tokens[:-1]]), np.array([tokens[1:]])
    run = jax.jit(partial(model.apply, method="losses"))
    return np.asarray(run({"params": params}, *rows))[0]


def test_a_long_text_is_cut_into_pieces(loaded):
    model, params, tokenizer = loaded
    tokens = [tokenizer.bos_id, *tokenizer.encode(TEXT)]
    assert 2 * LENGTH < len(tokens) < 4 * LENGTH
    pieces = [tokens[i : i + LENGTH + 1] for i in range(0, len(tokens) - 1, LENGTH)]
    wanted = np.concatenate([losses(model, params, piece) for piece in pieces])
    found = token_logprobs(*loaded, TEXT)
    assert found.tokens_T.tolist() == tokens[1:]
    np.testing.assert_allclose(-found.logprobs_T, wanted, rtol=1e-5, atol=1e-5)
    bits = wanted.sum() / np.log(2) / len(TEXT.encode())
    assert found.bits_per_byte == pytest.approx(bits, rel=1e-5)


def test_a_text_that_fills_its_pieces_exactly(loaded):
    model, params, tokenizer = loaded
    text = tokenizer.decode(tokenizer.encode(TEXT)[:LENGTH])
    assert len(tokenizer.encode(text)) == LENGTH
    wanted = losses(model, params, [tokenizer.bos_id, *tokenizer.encode(text)])
    np.testing.assert_allclose(
        -token_logprobs(*loaded, text).logprobs_T, wanted, rtol=1e-5, atol=1e-5
    )


def test_the_most_likely_tokens(loaded):
    model, params, tokenizer = loaded
    found = token_logprobs(*loaded, "one and two", 4)
    tokens = np.array([[tokenizer.bos_id, *found.tokens_T[:-1]]])
    logits = np.asarray(jax.jit(model.apply)({"params": params}, tokens))[0]
    order = np.argsort(-logits, axis=-1)[:, :4]
    assert found.top_TK.tolist() == order.tolist()
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    wanted = np.take_along_axis(p, order, -1)
    np.testing.assert_allclose(np.exp(found.top_logprobs_TK), wanted, rtol=1e-4)


def test_one_letter_is_enough_and_nothing_is_not(loaded):
    assert len(token_logprobs(*loaded, "o").tokens_T) == 1
    with pytest.raises(ValueError, match="empty text"):
        token_logprobs(*loaded, "")
