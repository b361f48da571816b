"""The questions of reinforcement learning, what a step's answers amount to, and held-out pass@k.

Answers are sampled and judged by evals/generation.py. They depend only on the weights, the seed and
the question's place in the run, so a resumed run samples the same again.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np

from nanochat_jax.evals.generation import (
    TRAINING,
    RolloutGroup,
    RolloutPrompt,
    RolloutSampler,
    is_right,
    pass_at_k,
    rewards_of,
    sample_task,
    seed_of,
)
from nanochat_jax.evals.scoring import ProgressCallback
from nanochat_jax.tasks.task import Task
from nanochat_jax.tokenizer import Tokenizer


class PromptLoader:
    """The prompts of each step, in the task's order, over and over; used in a `with`."""

    def __init__(self, size: int, per_step: int, seed: int, position: int = 0):
        if size < 1:
            raise ValueError("the task has no question to learn from")
        self._size, self._per_step, self._seed = size, per_step, seed
        self._position = position

    def __next__(self) -> list[RolloutPrompt]:
        start, self._position = self._position, self._position + self._per_step
        return [
            RolloutPrompt(place % self._size, seed_of(self._seed, TRAINING, place))
            for place in range(start, self._position)
        ]

    def get_state(self) -> dict[str, Any]:
        return {"position": self._position}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


def summary(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """The metrics of a step's answers."""
    rewards = rewards_of(groups)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    lengths = [len(rollout.tokens) for rollout in rollouts]
    n = rewards.shape[1]
    return {
        "reward": float(rewards.mean()),
        f"pass@{n}": float(pass_at_k(is_right(rewards), n).mean()),
        # Only questions whose answers have different rewards teach anything.
        "telling_questions": float(np.mean(rewards.max(axis=1) > rewards.min(axis=1))),
        "length": float(np.mean(lengths)),
        "max_length": float(np.max(lengths)),
        "cut_off": float(np.mean([rollout.reason == "length" for rollout in rollouts])),
        "tool_calls": float(np.mean([any(rollout.forced) for rollout in rollouts])),
        "tokens": float(sum(lengths)),
    }


def transcripts(
    groups: Sequence[RolloutGroup], tokenizer: Tokenizer, count: int
) -> list[dict[str, Any]]:
    """The best and the worst answer to each of the first `count` questions, as records."""
    records = []
    for group in groups[:count]:
        ranked = sorted(group.rollouts, key=lambda rollout: -rollout.reward)
        for rollout in [ranked[0], ranked[-1]][: len(ranked)]:
            records.append(
                {
                    "question": group.prompt.example,
                    "reward": rollout.reward,
                    "reason": rollout.reason,
                    "prompt": tokenizer.decode(rollout.prompt),
                    "completion": tokenizer.decode(rollout.tokens),
                }
            )
    return records


def measure(
    sampler: RolloutSampler,
    task: Task,
    seed: int,
    n: int,
    batch_size: int,
    stopped: Callable[[], bool],
    progress: ProgressCallback = lambda done, total: None,
) -> dict[str, float] | None:
    """pass@k over all questions of a task for k = 1 … n, and the mean length; None when stopped."""
    groups: list[RolloutGroup] = []
    batches = sample_task(sampler, task, n, seed, batch_size)
    while len(groups) < len(task):
        if stopped():
            return None
        groups += next(batches)
        progress(len(groups), len(task))
    right = is_right(rewards_of(groups))
    lengths = [len(rollout.tokens) for group in groups for rollout in group.rollouts]
    passed = {f"pass@{k}": float(pass_at_k(right, k).mean()) for k in range(1, n + 1)}
    return {**passed, "length": float(np.mean(lengths))}
