"""Reinforcement learning as pure functions: samples with rewards -> rows -> a policy-gradient loss.

The original's recipe is REINFORCE with the mean reward of a question's samples as the baseline
(GRPO, arXiv 2402.03300, without its ratio, clipping, KL and division by the standard deviation).
`Objective` holds the choices in which the field's variants differ:

    recipe                  Objective()
    GRPO                    advantage="std", normalisation="sequence", clip=0.2, kl=0.04
    Dr. GRPO (2503.20783)   normalisation="constant", clip=0.2
    DAPO (2503.14476)       advantage="std", normalisation="token", clip=0.2, clip_high=0.28

Prompts, forced calculator answers and padding are not trained on, nor is the token that ends a
sample.

Shapes: A micro-batches, B rows, R rows of a step, T time.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from nanochat_jax.evals.generation import Rollout
from nanochat_jax.gpt import GPT, Params, init_params
from nanochat_jax.sharding import AXIS, BATCH_SPEC, REPLICATED, shard_map, specs
from nanochat_jax.stages.settings import Advantage, Objective
from nanochat_jax.train import gather_weights

STD_EPSILON = 1e-6  # of "std": where all samples have the same reward, the advantages are 0


class RolloutRows(NamedTuple):
    """A step's samples, padded to one width (NumPy arrays)."""

    inputs_RT: np.ndarray  # int32
    targets_RT: np.ndarray  # int32, −1 where not trained on
    logprobs_RT: np.ndarray  # float32: the sampler's, of each target trained on; else 0


def make_rows(
    rollouts: Sequence[Rollout], pad_id: int, widths: Sequence[int] = (1,)
) -> RolloutRows:
    """Rows of T inputs: T is the first of `widths` that holds the longest sample, or a multiple of
    the last. Fewer widths mean fewer compiled programs, more mean less padding."""
    longest = max(len(r.prompt) + len(r.tokens) for r in rollouts) - 1
    unit = next((width for width in widths if width >= longest), widths[-1])
    T = -(-longest // unit) * unit
    ids = np.full((len(rollouts), T + 1), pad_id, np.int32)
    is_trained = np.zeros((len(rollouts), T + 1), bool)
    logprobs = np.zeros((len(rollouts), T + 1), np.float32)
    for row, rollout in enumerate(rollouts):
        start, end = len(rollout.prompt), len(rollout.prompt) + len(rollout.tokens)
        ids[row, :start], ids[row, start:end] = rollout.prompt, rollout.tokens
        is_trained[row, start:end] = ~np.asarray(rollout.forced, bool)
        logprobs[row, start:end] = rollout.logprobs
    return RolloutRows(
        ids[:, :-1],
        np.where(is_trained, ids, -1)[:, 1:],
        np.where(is_trained, logprobs, 0)[:, 1:],
    )


def advantages(rewards_QN: np.ndarray, kind: Advantage = "mean") -> np.ndarray:
    """Each of N samples compared with the mean of its question; (Q, N) float32."""
    rewards = np.asarray(rewards_QN, np.float64)
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    if kind == "std":
        ddof = min(1, rewards.shape[1] - 1)
        centred /= rewards.std(axis=1, ddof=ddof, keepdims=True) + STD_EPSILON
    return centred.astype(np.float32)


def row_weights(lengths_QN: np.ndarray, objective: Objective) -> np.ndarray:
    """The weight of each trained token of a sample, (Q, N) float32, from the samples' lengths.

    pass      1 / (tokens of the pass · passes · questions); the passes are a question's samples in
              groups of `samples_per_pass`, into which the original divided them to save memory
    sequence  1 / (tokens of the sample · samples): every sample counts the same
    token     1 / tokens of the step: every token counts the same
    constant  1 / (max_new_tokens · samples): a token's weight does not depend on any length
    """
    lengths = np.asarray(lengths_QN, np.float64)
    Q, N = lengths.shape
    match objective.normalisation:
        case "sequence":
            weights = 1 / (np.maximum(lengths, 1) * Q * N)
        case "token":
            weights = np.full((Q, N), 1 / max(lengths.sum(), 1))
        case "constant":
            weights = np.full((Q, N), 1 / (objective.max_new_tokens * Q * N))
        case "pass":
            starts = np.arange(0, N, objective.samples_per_pass)
            totals = np.maximum(np.add.reduceat(lengths, starts, axis=1), 1)
            sizes = np.diff([*starts, N])
            weights = 1 / (np.repeat(totals, sizes, axis=1) * len(starts) * Q)
    return weights.astype(np.float32)


class RolloutBatch(NamedTuple):
    """The input of a training step: A micro-batches of B rows."""

    inputs_ABT: Any
    targets_ABT: Any
    advantages_AB: Any
    weights_AB: Any
    rollout_logprobs_ABT: Any  # of the policy that sampled
    reference_logprobs_ABT: Any = None  # of the policy to stay close to; None without KL


def make_batch(
    rows: RolloutRows, rewards_QN: np.ndarray, objective: Objective, micro_batch_size: int
) -> RolloutBatch:
    """NumPy arrays, in micro-batches of `micro_batch_size` rows; the last is padded with rows that
    have no targets."""
    lengths_QN = (rows.targets_RT >= 0).sum(axis=1).reshape(np.shape(rewards_QN))

    def micro(array: np.ndarray, fill: float) -> np.ndarray:
        missing = -len(array) % micro_batch_size
        widths = [(0, missing), *[(0, 0)] * (array.ndim - 1)]
        filled = np.pad(array, widths, constant_values=fill)
        return filled.reshape(-1, micro_batch_size, *array.shape[1:])

    return RolloutBatch(
        micro(rows.inputs_RT, rows.inputs_RT[0, 0]),
        micro(rows.targets_RT, -1),
        micro(advantages(rewards_QN, objective.advantage).reshape(-1), 0),
        micro(row_weights(lengths_QN, objective).reshape(-1), 0),
        micro(rows.logprobs_RT, 0),
    )


def put_rollouts[T](batch: T, mesh: Mesh) -> T:
    """A batch, or an array of one, that every process has: on the mesh, sharded by rows."""
    sharding = NamedSharding(mesh, BATCH_SPEC)

    def put(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda at: array[at])

    return jax.tree.map(put, batch)


def policy_loss(
    objective: Objective, model, weights: Params, micro: RolloutBatch, supervised: jax.Array
) -> jax.Array:
    """A train.Loss: the negative of the objective, summed over this micro-batch.

    The objective of a token is weight · advantage · log p, of whose loss only the gradient is
    meaningful; with `clip` it is PPO's clipped weight · advantage · ratio (arXiv 1707.06347). The
    KL is estimated by e^d − d − 1 with d = log p_ref − log p ("k3",
    joschu.net/blog/kl-approx.html).
    """
    del supervised  # the weights divide
    targets, advantage = micro.targets_ABT, micro.advantages_AB[:, None]
    logprobs = -model.apply({"params": weights}, micro.inputs_ABT, targets, method="losses")
    if objective.clip > 0:
        high = objective.clip if objective.clip_high is None else objective.clip_high
        ratio = jnp.exp(logprobs - micro.rollout_logprobs_ABT)
        bounded = jnp.clip(ratio, 1 - objective.clip, 1 + high)
        gain = jnp.minimum(ratio * advantage, bounded * advantage)
    else:
        gain = advantage * logprobs
    if objective.kl > 0:
        distance = micro.reference_logprobs_ABT - logprobs
        gain -= objective.kl * (jnp.exp(distance) - distance - 1)
    return -jnp.sum(jnp.where(targets >= 0, micro.weights_AB[:, None] * gain, 0.0))


def make_logprobs(model: GPT, mesh: Mesh) -> Callable[[Params, RolloutBatch], np.ndarray]:
    """The function (params, batch) -> log-probability of every target, (A, B, T); 0 without one.

    The batch is on the mesh; every process gets the whole result.
    """
    param_specs = specs(jax.eval_shape(partial(init_params, model), jax.random.key(0)))

    def local(params, inputs_ABT, targets_ABT):
        weights = gather_weights(model, params)

        def losses(micro):
            return model.apply({"params": weights}, *micro, method="losses")

        logprobs_ABT = -jax.lax.map(losses, (inputs_ABT, targets_ABT))
        return jax.lax.all_gather(logprobs_ABT, AXIS, axis=1, tiled=True)

    in_specs = (param_specs, BATCH_SPEC, BATCH_SPEC)
    mapped = jax.jit(shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=REPLICATED))
    return lambda params, batch: np.asarray(mapped(params, batch.inputs_ABT, batch.targets_ABT))


def compare(logprobs_ABT: np.ndarray, batch: RolloutBatch) -> dict[str, float]:
    """How far the policy being trained is from the one that sampled, and from the reference.

    Means over the trained tokens of a `make_batch` batch. Before the first update of a step the
    mismatch is that of two programs with the same weights: it should be round-off.
    """
    is_trained = batch.targets_ABT >= 0
    ours, sampled = logprobs_ABT[is_trained], batch.rollout_logprobs_ABT[is_trained]
    change = np.abs(ours - sampled)
    metrics = {
        "mismatch": float(change.mean()) if len(change) else 0.0,
        "max_mismatch": float(change.max(initial=0.0)),
    }
    if batch.reference_logprobs_ABT is not None and len(ours):
        distance = batch.reference_logprobs_ABT[is_trained] - ours
        metrics["kl"] = float(np.mean(np.exp(distance) - distance - 1))
    return metrics
