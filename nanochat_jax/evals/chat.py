"""How well a chat model answers tasks: multiple choice by its logits, the rest by what it writes.

A categorical task is answered by the most likely of its letters where the answer begins; all
questions are scored in batches. A generative one is answered by the engine, with the calculator,
and judged by the task itself (generation.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from nanochat_jax.evals.bootstrap import centred, interval, mean_of_centred, resampled_means
from nanochat_jax.evals.generation import (
    MAX_PROMPT,
    RolloutGroup,
    RolloutSampler,
    is_right,
    pass_at_k,
    rewards_of,
    sample_task,
)
from nanochat_jax.evals.scoring import ProgressCallback, Scorer
from nanochat_jax.evals.scoring_batches import Span
from nanochat_jax.tasks.task import Conversation, Task
from nanochat_jax.tokenizer import Tokenizer

# The tasks of ChatCORE and the accuracy of guessing.
CHAT_CORE = {"arc-easy": 0.25, "arc-challenge": 0.25, "mmlu": 0.25, "gsm8k": 0.0, "humaneval": 0.0}
ROUNDS = 16  # questions per slot of the engine between two reports of progress
TRANSCRIPTS = 3  # answers that a result keeps as examples


@dataclass(frozen=True)
class ChatResult:
    """`correct_QN` has a row for each question Q, with a bool for each of its N samples."""

    name: str
    kind: str
    correct_QN: np.ndarray
    baseline: float  # accuracy of guessing
    transcripts: list[dict[str, Any]] = field(default_factory=list)
    sampling: dict[str, Any] | None = None  # the settings of a generative task

    @property
    def accuracies_Q(self) -> np.ndarray:
        """The share of right samples by question: pass@1."""
        return pass_at_k(self.correct_QN, 1)

    def as_json(self) -> dict[str, Any]:
        accuracy = float(self.accuracies_Q.mean())
        n = self.correct_QN.shape[1]
        ks = [2**i for i in range(1, n) if 2**i < n] + [n] if n > 1 else []  # 2, 4, 8, … and n
        passes = {f"pass@{k}": pass_at_k(self.correct_QN, k) for k in ks}
        return {
            "kind": self.kind,
            "accuracy": accuracy,
            "accuracy_interval": list(interval(resampled_means(self.accuracies_Q))),
            "baseline": self.baseline,
            "centred": float(centred(accuracy, self.baseline)),
            "questions": len(self.correct_QN),
            **{k: [float(v.mean()), *interval(resampled_means(v))] for k, v in passes.items()},
            "transcripts": self.transcripts,
            **({"drawing": self.sampling} if self.sampling else {}),
        }


def evaluate_categorical(
    scorer: Scorer,
    tokenizer: Tokenizer,
    task: Task,
    progress: ProgressCallback = lambda done, total: None,
) -> ChatResult:
    """The argmax over the letters of each question, judged by the task."""
    conversations = [task[i] for i in range(len(task))]
    spans = [letter_spans(tokenizer, conversation) for conversation in conversations]
    rewards = []
    for conversation, scores in zip(conversations, scorer.score(spans, progress), strict=True):
        best = int(np.argmin([score.losses[0] for score in scores]))
        rewards.append(task.reward(conversation, conversation["letters"][best]))
    guessing = np.mean([1 / len(conversation["letters"]) for conversation in conversations])
    baseline = CHAT_CORE.get(task.name, float(guessing))
    return ChatResult(task.name, task.kind, is_right(np.array(rewards))[:, None], baseline)


def letter_spans(tokenizer: Tokenizer, conversation: Conversation) -> list[Span]:
    """Each letter as the answer's first token."""
    prompt = tokenizer.render_for_completion(conversation, MAX_PROMPT)
    found = []
    for letter in conversation["letters"]:
        tokens = tokenizer.encode(letter)
        if len(tokens) != 1:
            raise ValueError(f"the letter {letter!r} of a question is not one token but {tokens}")
        found.append(Span(np.array(prompt + tokens, np.int32), len(prompt)))
    return found


def evaluate_generative(
    sampler: RolloutSampler,
    task: Task,
    n: int = 1,
    seed: int = 42,
    progress: ProgressCallback = lambda done, total: None,
) -> ChatResult:
    """`n` answers to every question, judged by the task.

    The processes of a cluster divide the questions, each with its own engine; all get all results.
    """
    batch_size = ROUNDS * sampler.engine.n_slots * jax.process_count()
    groups: list[RolloutGroup] = []
    for batch in sample_task(sampler, task, n, seed, batch_size):
        groups += batch
        progress(len(groups), len(task))
    correct_QN = is_right(rewards_of(groups))
    transcripts = [
        {
            "question": group.conversation["messages"][-2]["content"],
            "answer": sampler.tokenizer.decode(group.rollouts[0].tokens),
            "right": bool(correct_QN[i, 0]),
        }
        for i, group in enumerate(groups[:TRANSCRIPTS])
    ]
    names = ("max_new_tokens", "temperature", "top_k")
    sampling = {"n_samples": n, **{name: getattr(sampler, name) for name in names}, "seed": seed}
    baseline = CHAT_CORE.get(task.name, 0.0)
    return ChatResult(task.name, task.kind, correct_QN, baseline, transcripts, sampling)


def chat_json(results: Sequence[ChatResult]) -> dict[str, Any]:
    """All tasks, the mean of their centred scores, and ChatCORE where its five tasks are there."""
    found: dict[str, Any] = {"chat_tasks": {result.name: result.as_json() for result in results}}
    found["mean_centred"], found["mean_centred_interval"] = _mean_centred(results)
    of_core = [result for result in results if result.name in CHAT_CORE]
    if len(of_core) == len(CHAT_CORE):
        found["chatcore"], found["chatcore_interval"] = _mean_centred(of_core)
    return found


def _mean_centred(results: Sequence[ChatResult]) -> tuple[float, list[float]]:
    values = [result.accuracies_Q for result in results]
    mean, bounds = mean_of_centred(values, [result.baseline for result in results])
    return mean, list(bounds)


def chat_table(found: dict[str, Any]) -> str:
    """`chat_json`'s result as a table."""
    lines = [f"{'task':<16}{'questions':>10}{'accuracy':>10}{'95 % interval':>17}{'centred':>10}"]
    for name, task in found["chat_tasks"].items():
        low, high = task["accuracy_interval"]
        line = f"{name:<16}{task['questions']:>10,}{task['accuracy']:>10.4f}"
        passes = ", ".join(f"{k} {v[0]:.4f}" for k, v in task.items() if k.startswith("pass@"))
        bounds = f"{low:.4f}–{high:.4f}"
        lines.append(f"{line}{bounds:>17}{task['centred']:>10.4f}  {passes}".rstrip())
    for key, name in (("chatcore", "ChatCORE"), ("mean_centred", "mean centred")):
        if key in found:
            low, high = found[f"{key}_interval"]
            bounds = f"{low:.4f}–{high:.4f}"
            lines.append(f"{name:<36}{bounds:>17}{found[key]:>10.4f}")
    return "\n".join(lines)
