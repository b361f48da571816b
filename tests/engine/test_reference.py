"""Generation by the whole forward pass: the original's greedy tokens, sampling, stopping, crops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.gpt import GPT, GPTConfig, parameter_table
from nanochat_jax.interop.names import params_from_torch
from tests.engine.reference import generate, next_logits, sample

CONFIG = GPTConfig(
    sequence_len=64, vocab_size=100, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, window_pattern="L"
)


ROWS = 4  # every call pads to as many prompts: one program to compile


@pytest.fixture(scope="module")
def tiny():
    rng = np.random.default_rng(0)
    shapes = {name: shape for name, (shape, _) in parameter_table(CONFIG).items()}
    return GPT(CONFIG), {n: rng.normal(0, 0.3, s).astype(np.float32) for n, s in shapes.items()}


def draw(tiny, prompts, n, key=7, **how):
    padded = [*prompts, *[[0]] * (ROWS - len(prompts))]
    return generate(*tiny, padded, n, key=jax.random.key(key), **how)[: len(prompts)]


@pytest.mark.golden
def test_greedy_tokens_of_the_original(golden):
    meta, arrays = golden.json("engine2026"), golden.npz("engine2026")
    model = GPT(GPTConfig(**meta["config"]))
    weights = golden.npz("gpt2026_forward")
    params = params_from_torch(
        model.config, {n[6:]: w for n, w in weights.items() if n.startswith("param/")}
    )
    cases = sorted({name.split("/")[0] for name in arrays if name.endswith("/prompt")})
    prompts = [arrays[f"{case}/prompt"].tolist() for case in cases]
    wanted = [arrays[f"{case}/tokens"].tolist() for case in cases]
    new, whole = max(map(len, wanted)), max(map(len, prompts)) + max(map(len, wanted))
    # The original never crops; its long windows end at sequence_len.
    how = {"key": jax.random.key(0), "temperature": 0.0, "context": whole}
    got = generate(model, params, prompts, new, **how)
    for case, tokens, want in zip(cases, got, wanted, strict=True):
        assert tokens[: len(want)] == want, case

    rows = np.zeros((len(cases), whole), np.int32)
    for row, prompt, want in zip(rows, prompts, wanted, strict=True):
        row[: len(prompt) + len(want)] = prompt + want
    lengths = np.array(
        [len(prompt) + len(want) - 1 for prompt, want in zip(prompts, wanted, strict=True)]
    )
    logits = jax.jit(next_logits, static_argnums=(0, 4))(model, params, rows, lengths, whole)
    for case, row in zip(cases, logits, strict=True):
        np.testing.assert_allclose(row, arrays[f"{case}/logits"][-1], atol=3e-5)


def test_greedy_follows_the_forward_pass(tiny):
    model, params = tiny
    prompts = [[5], [1, 2, 3, 4, 5, 6, 7]]
    results = draw(tiny, prompts, 20, temperature=0.0)
    for prompt, new in zip(prompts, results, strict=True):
        assert len(new) == 20
        tokens = np.zeros((1, 32), np.int32)
        tokens[0, : len(prompt) + 20] = prompt + new
        logits = jax.jit(model.apply)({"params": params}, tokens)[0]
        assert new == np.argmax(logits, -1)[len(prompt) - 1 :][:20].tolist()


def test_a_row_does_not_depend_on_its_neighbours(tiny):
    alone = draw(tiny, [[3, 4]], 12)
    beside = draw(tiny, [[3, 4], [9] * 30, [1]], 12)
    assert beside[0] == alone[0]
    assert len({tuple(row) for row in draw(tiny, [[3, 4]] * ROWS, 12)}) > 1


def test_the_same_key_gives_the_same_tokens_and_another_gives_others(tiny):
    first = draw(tiny, [[3]], 20)
    assert first == draw(tiny, [[3]], 20)
    assert first != draw(tiny, [[3]], 20, key=8)


def test_stop_tokens_end_a_row_and_are_left_out(tiny):
    free = draw(tiny, [[3], [4]], 30, temperature=0.0)
    stop = free[0][10]
    stopped = draw(tiny, [[3], [4]], 30, temperature=0.0, stop_ids=[stop])
    for ended, whole in zip(stopped, free, strict=True):
        assert ended == (whole[: whole.index(stop)] if stop in whole else whole)


def test_beyond_the_context_only_the_last_tokens_count(tiny):
    tail = [(7 * i) % 100 for i in range(CONFIG.sequence_len)]
    rows = draw(tiny, [[1, 2, 3, *tail], [90, 91, 92, *tail], tail], 1, temperature=0.0)
    assert rows[0] == rows[1] == rows[2]
    assert len(draw(tiny, [[1, 2, 3, *tail]], 40)[0]) == 40


def test_no_new_tokens_asked_for(tiny):
    assert draw(tiny, [[3], [4, 5]], 0) == [[], []]


def test_sampling_follows_the_distribution():
    logits = jnp.tile(jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05])), (20_000, 1))
    keys = jax.random.split(jax.random.key(0), 20_000)

    def shares(temperature, top_k):
        tokens = sample(logits, keys, jnp.float32(temperature), top_k)
        return np.bincount(tokens, minlength=4) / len(tokens)

    np.testing.assert_allclose(shares(1.0, None), [0.5, 0.3, 0.15, 0.05], atol=0.02)
    np.testing.assert_allclose(shares(1.0, 2), [0.625, 0.375, 0, 0], atol=0.02)
    p = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
    np.testing.assert_allclose(shares(0.5, 100), p / p.sum(), atol=0.02)
    assert shares(0.0, None).tolist() == [1, 0, 0, 0]
    assert shares(1.0, 1).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("prompts", "how", "message"),
    [
        ([[]], {}, "at least one token"),
        ([], {}, "at least one token"),
        ([[100]], {}, "vocabulary of 100"),
        ([[-1]], {}, "vocabulary of 100"),
        ([[1]], {"temperature": -1.0}, "temperature"),
        ([[1]], {"top_k": 0}, "top_k"),
    ],
)
def test_bad_input_is_refused(tiny, prompts, how, message):
    with pytest.raises(ValueError, match=message):
        generate(*tiny, prompts, 3, key=jax.random.key(0), **how)
