"""Reinforcement learning's mathematics: the original's numbers, and what each option must mean."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_optim import arrays, model_config

from nanochat_jax.evals.generation import Rollout
from nanochat_jax.gpt import GPT, GPTConfig, init_params
from nanochat_jax.interop.names import params_from_torch, params_to_torch
from nanochat_jax.sharding import from_logical, make_mesh
from nanochat_jax.stages import policy
from nanochat_jax.stages.settings import Objective
from nanochat_jax.train import TrainState, init_state, make_train_step

# Plain descent with rate 1: what a step takes off the parameters is their gradient.
DESCENT = optax.sgd(1.0)


def rollout(prompt, tokens, forced=None, reward=0.0) -> Rollout:
    forced = forced or [False] * len(tokens)
    logprobs = [float("nan") if f else -1.0 for f in forced]
    return Rollout(prompt, tokens, forced, logprobs, reward, "stop")


def step_of(model, params, rows, rewards, objective, n_devices=1, size=4, reference=None):
    """Loss, and gradient by parameter name, of one real training step."""
    mesh = make_mesh(n_devices)
    batch = policy.make_batch(rows, rewards, objective, size)
    if reference is not None:
        batch = batch._replace(reference_logprobs_ABT=reference.reshape(batch.targets_ABT.shape))
    loss = partial(policy.policy_loss, objective)
    step = make_train_step(model, DESCENT, mesh, loss=loss)
    shapes = init_state(model, DESCENT, mesh, jax.random.key(0))
    start = from_logical(TrainState(shapes.step, params, shapes.opt_state), mesh)
    before = {name: np.asarray(p) for name, p in start.params.items()}
    state, metrics = step(start, policy.put_rollouts(batch, mesh))
    whole = {n: p.shape for n, p in params.items()}
    gradient = {
        n: (before[n] - np.asarray(state.params[n]))[tuple(map(slice, shape))]
        for n, shape in whole.items()
    }
    return float(metrics["loss"]), gradient


# --- the original's numbers -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def original(golden):
    """(model, params, cases, arrays) of golden rl."""
    meta, archive = golden.json("rl"), golden.npz("rl")
    config = model_config(golden.json("gpt2026_forward"), "2026")
    params = params_from_torch(config, arrays(golden.npz("gpt2026_forward"), "param/"))
    return GPT(config), jax.tree.map(jnp.asarray, params), meta["cases"], archive


def rows_of(case) -> policy.RolloutRows:
    start = case["prefix_len"]
    rollouts = [
        rollout(ids[:start], ids[start:], [m == 0 for m in mask[start:]])
        for ids, mask in zip(case["sequences"], case["masks"], strict=True)
    ]
    return policy.make_rows(rollouts, case["pad_token"])


@pytest.mark.golden
@pytest.mark.parametrize("index", [0, 1])
def test_rows_advantages_and_probabilities_are_the_originals(original, index):
    model, params, cases, archive = original
    case, rows = cases[index], rows_of(cases[index])
    np.testing.assert_array_equal(rows.inputs_RT, archive[f"case{index}/inputs"])
    np.testing.assert_array_equal(rows.targets_RT, archive[f"case{index}/targets"])
    assert (rows.targets_RT >= 0).sum() == case["num_valid"]
    rewards = np.array([case["rewards"]])
    expected = archive[f"case{index}/advantages"]
    np.testing.assert_allclose(policy.advantages(rewards)[0], expected, atol=1e-7)
    mesh = make_mesh(1)
    batch = policy.put_rollouts(policy.make_batch(rows, rewards, Objective(), 2), mesh)
    found = np.asarray(policy.make_logprobs(model, mesh)(params, batch)).reshape(
        rows.inputs_RT.shape
    )
    np.testing.assert_allclose(found, archive[f"case{index}/logp"], atol=2e-5)


@pytest.mark.golden
@pytest.mark.parametrize(("passes", "n_devices"), [(1, 1), (2, 1), (1, 2)])
def test_loss_and_gradients_are_the_originals(original, passes, n_devices):
    """However the rows are cut into micro-batches and over devices."""
    model, params, cases, archive = original
    case = cases[0]
    n = len(case["rewards"])
    objective = Objective(samples_per_pass=n // passes)
    loss, gradient = step_of(
        model,
        params,
        rows_of(case),
        np.array([case["rewards"]]),
        objective,
        n_devices,
        size=2,
    )
    key = "loss_one_pass" if passes == 1 else f"losses_two_passes_of_{n // 2}"
    assert loss == pytest.approx(sum(case[key]), abs=2e-6)
    named = params_to_torch(model.config, gradient)
    norms = case["grad_norms_one_pass" if passes == 1 else "grad_norms_two_passes"]
    largest = max(norms.values())
    for name, norm in norms.items():
        # A descent of 1 on weights of size 1 rounds the gradient to 1e-7 an element.
        found = np.linalg.norm(np.asarray(named[name], np.float64))
        assert found == pytest.approx(norm, rel=1e-4, abs=1e-5 * largest), name
    if passes == 1:
        for name, values in arrays(archive, "case0/grad/").items():
            atol = 2e-4 * np.abs(values).max() + 2e-6
            np.testing.assert_allclose(named[name], values, atol=atol, err_msg=name)


@pytest.mark.golden
def test_more_questions_share_the_loss(original):
    """The original's 16 questions a rank: here one question and fifteen that are all right."""
    model, params, cases, _ = original
    case, rows = cases[0], rows_of(cases[0])
    n, questions = len(case["rewards"]), 16
    nothing = policy.RolloutRows(
        rows.inputs_RT, np.full_like(rows.targets_RT, -1), rows.logprobs_RT * 0
    )
    together = policy.RolloutRows(
        *(np.concatenate([a, *[b] * 15]) for a, b in zip(rows, nothing, strict=True))
    )
    rewards = np.ones((questions, n))
    rewards[0] = case["rewards"]
    loss, _ = step_of(model, params, together, rewards, Objective(samples_per_pass=n), size=16)
    assert loss == pytest.approx(case["loss_one_pass_examples_per_rank_16"][0], abs=1e-6)


@pytest.mark.golden
def test_equal_rewards_teach_nothing(original):
    model, params, cases, _ = original
    loss, gradient = step_of(
        model, params, rows_of(cases[1]), np.array([cases[1]["rewards"]]), Objective()
    )
    assert loss == 0
    assert all(np.all(g == 0) for g in gradient.values())


# --- what the options mean ------------------------------------------------------------------------

PROMPT, ANSWERS = [1, 2, 3], [[4, 5], [6, 7, 8, 9], [10, 11, 12], [13]]
REWARDS = np.array([[1.0, 0.0], [0.0, 1.0]])
LENGTHS = np.array([[2, 4], [3, 1]])


@pytest.fixture(scope="module")
def small():
    config = GPTConfig(
        recipe="2025", sequence_len=16, vocab_size=32, n_layer=1, n_head=1, n_kv_head=1, n_embd=16
    )
    model = GPT(config)
    params = init_params(model, jax.random.key(0))
    noise = {n: 0.1 * jax.random.normal(jax.random.key(1), p.shape) for n, p in params.items()}
    return model, {n: p + noise[n] for n, p in params.items()}


@pytest.fixture(scope="module")
def sampled(small):
    """Rows whose sampler's log-probabilities are the model's own."""
    model, params = small
    rows = policy.make_rows([rollout(PROMPT, answer) for answer in ANSWERS], pad_id=0)
    logprobs = -model.apply({"params": params}, rows.inputs_RT, rows.targets_RT, method="losses")
    return rows._replace(logprobs_RT=np.asarray(logprobs))


def test_prompt_forced_tokens_and_padding_are_not_trained_on():
    rows = policy.make_rows(
        [rollout([1, 2], [3, 4, 5], [False, True, False]), rollout([1], [6])], 9, widths=(2, 8)
    )
    assert rows.inputs_RT.tolist() == [[1, 2, 3, 4, 5, 9, 9, 9], [1, 6, 9, 9, 9, 9, 9, 9]]
    assert rows.targets_RT.tolist() == [[-1, 3, -1, 5, -1, -1, -1, -1], [6] + [-1] * 7]
    assert rows.logprobs_RT.tolist() == [[0, -1, 0, -1, 0, 0, 0, 0], [-1] + [0] * 7]
    lengths = {
        n: policy.make_rows([rollout([1], [2] * n)], 0, (4, 16)).inputs_RT.shape[1]
        for n in range(1, 40)
    }
    assert lengths == {n: 4 if n <= 4 else 16 * -(-n // 16) for n in lengths}


def test_advantages_compare_the_samples_of_one_question():
    rewards = np.array([[1.0, 0, 0, 1], [5, 5, 5, 5], [0, 0, 0, 4]])
    plain, scaled = policy.advantages(rewards), policy.advantages(rewards, "std")
    np.testing.assert_allclose(plain.sum(axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(plain[2], [-1, -1, -1, 3])
    np.testing.assert_allclose(scaled[[0, 2]].std(axis=1, ddof=1), 1, rtol=1e-4)
    assert not scaled[1].any()
    assert not policy.advantages(
        np.ones((2, 1)), "std"
    ).any()  # one sample has none to compare with


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        # 2 questions; passes of 1 sample each, or of both
        (Objective(samples_per_pass=1), [[1 / 8, 1 / 16], [1 / 12, 1 / 4]]),
        (Objective(samples_per_pass=2), [[1 / 12, 1 / 12], [1 / 8, 1 / 8]]),
        (Objective(samples_per_pass=8), [[1 / 12, 1 / 12], [1 / 8, 1 / 8]]),
        (Objective(normalisation="sequence"), [[1 / 8, 1 / 16], [1 / 12, 1 / 4]]),
        (Objective(normalisation="token"), [[0.1, 0.1], [0.1, 0.1]]),
        (Objective(normalisation="constant", max_new_tokens=5), [[0.05, 0.05], [0.05, 0.05]]),
    ],
)
def test_what_a_token_counts(objective, expected):
    np.testing.assert_allclose(policy.row_weights(LENGTHS, objective), expected, rtol=1e-6)
    empty = policy.row_weights(LENGTHS * 0, objective)  # every sample is empty
    assert np.isfinite(empty).all()


def gradient_of(small, rows, objective, **how):
    return step_of(*small, rows, REWARDS, objective, **how)[1]


def assert_same(ours: dict, theirs: dict, factor: float = 1.0):
    for name, expected in theirs.items():
        np.testing.assert_allclose(ours[name], factor * expected, atol=1e-6, err_msg=name)


def test_a_ratio_of_one_has_the_plain_gradient(small, sampled):
    """The first of several updates from the same samples is the recipe's."""
    plain = gradient_of(small, sampled, Objective())
    assert max(np.abs(g).max() for g in plain.values()) > 1e-3
    assert_same(gradient_of(small, sampled, Objective(clip=0.2)), plain)
    assert_same(gradient_of(small, sampled, Objective(), n_devices=2, size=2), plain)


def test_clipping_ends_what_has_gone_far_enough(small, sampled):
    """Of samples now twice as likely, good ones gain nothing more and bad ones are still pushed
    down; of samples half as likely, the other way round."""
    objective = Objective(clip=0.2, clip_high=0.3)
    clipped = {}
    for name, shift in (("rarer", -np.log(2)), ("more likely", np.log(2))):
        moved = sampled._replace(logprobs_RT=sampled.logprobs_RT + np.float32(shift))
        clipped[name] = gradient_of(small, moved, objective)
    for kept, factor, name in ((-1, 2.0, "rarer"), (1, 0.5, "more likely")):
        advantage = policy.advantages(REWARDS).reshape(-1)
        left = np.where(advantage * kept > 0, 1, 0)
        targets = np.where(left[:, None] > 0, sampled.targets_RT, -1)
        batch = policy.make_batch(sampled, REWARDS, Objective(), 4)
        model, params = small
        micro = jax.tree.map(lambda x: x[0], batch)._replace(targets_ABT=targets)
        loss = partial(
            policy.policy_loss, Objective(), model, micro=micro, supervised=jnp.float32(1)
        )
        assert_same(clipped[name], jax.grad(loss)(params), factor)


def test_the_divergence_pulls_towards_the_reference(small, sampled):
    """At the reference itself it neither counts nor pulls; away from it, it does both."""
    same = sampled.logprobs_RT
    plain = gradient_of(small, sampled, Objective())
    assert_same(gradient_of(small, sampled, Objective(kl=0.5), reference=same), plain)
    there = {"reference": same + np.float32(0.5)}
    pulled = step_of(*small, sampled, REWARDS * 0, Objective(kl=0.5), **there)
    expected = 0.5 * (np.exp(0.5) - 0.5 - 1)  # every token alike, and their weights add up to one
    assert pulled[0] == pytest.approx(expected, rel=1e-4)
    assert max(np.abs(g).max() for g in pulled[1].values()) > 1e-3


def test_comparing_measures_mismatch_and_divergence(sampled):
    batch = policy.make_batch(sampled, REWARDS, Objective(), 4)
    batch = batch._replace(reference_logprobs_ABT=batch.rollout_logprobs_ABT)
    moved = batch.rollout_logprobs_ABT.copy()
    assert policy.compare(moved, batch) == {"mismatch": 0, "max_mismatch": 0, "kl": 0}
    moved[0, 1, 2] += 0.3  # one of ten trained tokens
    moved[0, 0, -1] += 100  # padding
    metrics = policy.compare(moved, batch)
    assert metrics["mismatch"] == pytest.approx(0.03, rel=1e-4)
    assert metrics["max_mismatch"] == pytest.approx(0.3, rel=1e-4)
    assert metrics["kl"] == pytest.approx((np.exp(-0.3) + 0.3 - 1) / 10, rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip": -0.1}, "clip must not be negative"),
        ({"kl": float("nan")}, "kl must not be negative"),
        ({"clip_high": 0.3}, "give clip, too"),
        ({"samples_per_pass": 0}, "at least 1"),
    ],
)
def test_an_objective_that_means_nothing_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Objective(**settings)
