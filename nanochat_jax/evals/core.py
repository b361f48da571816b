"""CORE: how well a base model answers 22 tasks from a few examples (DCLM, arXiv 2406.11794).

A choice is right when the option with the lowest mean loss is the right one; a continuation when
each of its tokens is the most likely (argmax) there. Accuracy is centred between guessing (0) and
perfect (1), and CORE is the mean over the tasks. All tasks are scored together, in shared batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanochat_jax.evals.bootstrap import centred, interval, mean_of_centred, resampled_means
from nanochat_jax.evals.core_tasks import (
    Bundle,
    CoreTask,
    PromptEncoder,
    Published,
    clip,
    examples_for,
    find_scored,
)
from nanochat_jax.evals.scoring import ProgressCallback, Scorer
from nanochat_jax.evals.scoring_batches import Span, SpanScore
from nanochat_jax.tokenizer import Tokenizer


@dataclass(frozen=True)
class PreparedQuestion:
    """A question as it is scored; `gold` is the right option, None for a continuation."""

    spans: list[Span]
    gold: int | None


@dataclass(frozen=True)
class TaskResult:
    """`correct` has one bool for each question, in the order they were asked."""

    label: str
    baseline: float
    correct: np.ndarray

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())

    @property
    def centred(self) -> float:
        return float(centred(self.accuracy, self.baseline))

    def as_json(self) -> dict[str, Any]:
        low, high = interval(resampled_means(self.correct))
        return {
            "accuracy": self.accuracy,
            "accuracy_interval": [low, high],
            "centred": self.centred,
            "questions": len(self.correct),
        }


def prepare_questions(
    task: CoreTask, tokenizer: Tokenizer, max_per_task: int = -1, max_length: int | None = None
) -> list[PreparedQuestion]:
    """The questions of a task, ready to be scored.

    `max_per_task` (negative: all) takes the first ones; examples come from among them. Prompts are
    cut on the left to `max_length` tokens, for models that cannot read longer ones.
    """
    questions = task.questions(max_per_task)
    encoder = PromptEncoder(tokenizer, questions, task.kind, task.delimiter)
    prepared = []
    for index, question in enumerate(questions):
        examples = examples_for(index, len(questions), task.num_fewshot)
        try:
            spans = find_scored(encoder.prompts(index, examples), task.kind)
        except ValueError as error:
            raise ValueError(f"CORE task {task.label}, question {index}: {error}") from None
        clipped = [clip(span, max_length) for span in spans]
        prepared.append(PreparedQuestion(clipped, question.get("gold")))
    return prepared


def is_correct(question: PreparedQuestion, scores: Sequence[SpanScore]) -> bool:
    if question.gold is None:
        return bool(scores[0].is_argmax.all())
    losses = [score.mean_loss for score in scores]
    return losses.index(min(losses)) == question.gold


def evaluate_core(
    scorer: Scorer,
    tokenizer: Tokenizer,
    bundle: Bundle,
    *,
    max_per_task: int = -1,
    max_length: int | None = None,
    progress: ProgressCallback = lambda done, total: None,
) -> list[TaskResult]:
    """The result of every task; see `prepare_questions` for the limits, Scorer for `progress`."""
    questions = [
        prepare_questions(task, tokenizer, max_per_task, max_length) for task in bundle.tasks
    ]
    scores = iter(scorer.score([each.spans for of_task in questions for each in of_task], progress))
    results = []
    for task, of_task in zip(bundle.tasks, questions, strict=True):
        correct = np.array([is_correct(each, next(scores)) for each in of_task], bool)
        results.append(TaskResult(task.label, task.baseline, correct))
    return results


# --- the report -----------------------------------------------------------------------------------


def core_json(results: Sequence[TaskResult]) -> dict[str, Any]:
    """CORE and all tasks with their intervals of 95 % confidence."""
    core, bounds = mean_of_centred(
        [result.correct for result in results], [result.baseline for result in results]
    )
    return {
        "core": core,
        "core_interval": list(bounds),
        "core_tasks": {result.label: result.as_json() for result in results},
    }


def core_csv(results: Sequence[TaskResult]) -> str:
    """The table in the format of the original and of the bundle's published ones."""
    core = float(np.mean([result.centred for result in results]))
    lines = [f"{'Task':<35}, {'Accuracy':<10}, {'Centered':<10}"]
    lines += [f"{r.label:<35}, {r.accuracy:<10.6f}, {r.centred:<10.6f}" for r in results]
    lines.append(f"{'CORE':<35}, {'':<10}, {core:<10.6f}")
    return "".join(line + "\n" for line in lines)


def comparison(found: dict[str, Any], published: Sequence[Published]) -> str:
    """A table of `core_json`'s result beside the published centred scores, for people."""
    heads = ["task", "accuracy", "95 % interval", "centred", *(each.model for each in published)]
    lines = [heads]
    for label, task in found["core_tasks"].items():
        low, high = task["accuracy_interval"]
        ours = [f"{task['accuracy']:.4f}", f"{low:.4f}–{high:.4f}", f"{task['centred']:.4f}"]
        theirs = [each.scores.get(label) for each in published]
        lines.append([label, *ours, *(f"{score[1]:.4f}" if score else "–" for score in theirs)])
    low, high = found["core_interval"]
    ours = ["", f"{low:.4f}–{high:.4f}", f"{found['core']:.4f}"]
    lines.append(["CORE", *ours, *(f"{each.core:.4f}" for each in published)])
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join(
        "  ".join([label.ljust(first), *map(str.rjust, cells, others)]) for label, *cells in lines
    )
