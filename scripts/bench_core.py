"""Measures how fast CORE is scored, beside one question at a time.

    python scripts/bench_core.py --run cpu --bundle eval_bundle.zip --max-per-task 4

"one at a time" is what the original does: the whole prompt of every option goes through the model,
and each question is a batch. It has every advantage that does not change that: compiled, padded to
few lengths, logits kept on the device. Both run twice and the second time counts, so neither pays
for compiling. Their answers must be the same; the last line is one JSON object.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.checkpoint import LoadedModel, load_model
from nanochat_jax.cli import run_script
from nanochat_jax.config import parse
from nanochat_jax.distributed import provenance, say, start
from nanochat_jax.evals.core import is_correct, prepare_questions
from nanochat_jax.evals.core_tasks import find_bundle, how_to_get, read_bundle
from nanochat_jax.evals.scoring import MIN_PREFIX, Scorer
from nanochat_jax.evals.scoring_batches import Span, SpanScore, bucket
from nanochat_jax.gpt import GPT, Params
from nanochat_jax.runs import run_folder
from nanochat_jax.sharding import from_logical, make_mesh


@dataclass(frozen=True)
class BenchCoreConfig:
    """What to measure."""

    run: str = "d20"
    """Name of the run, or its folder."""
    bundle: str | None = None
    """Folder or zip file of the CORE tasks (eval_bundle, .zip or not, in the base directory)."""
    tasks: str = ""
    """Labels of the tasks, with commas between (all)."""
    max_per_task: int = 20
    """Questions of each task."""
    tokens_per_device: int = 16384
    """Tokens of a batch, padding included."""


def main() -> None:
    config = parse(BenchCoreConfig, "bench_core", description=__doc__)
    path = find_bundle(config.bundle)
    if path is None:
        raise ValueError(f"there is no CORE bundle; {how_to_get()}")
    start()
    loaded = load_model(run_folder(config.run))
    wanted = {name.strip() for name in config.tasks.split(",") if name.strip()}
    tasks = [task for task in read_bundle(path).tasks if not wanted or task.label in wanted]
    questions = [
        question
        for task in tasks
        for question in prepare_questions(task, loaded.tokenizer, config.max_per_task)
    ]
    mesh = make_mesh(1)
    params = from_logical(loaded.params, mesh)
    scorer = Scorer(loaded.model, mesh, params, tokens_per_device=config.tokens_per_device)
    fast, fast_s = second_time(lambda: scorer.score([each.spans for each in questions]))
    slow, slow_s = second_time(lambda: [score_alone(loaded, each.spans) for each in questions])
    answers = zip(questions, fast, slow, strict=True)
    same = sum(is_correct(q, a) == is_correct(q, b) for q, a, b in answers)
    n = len(questions)
    say(f"batched        {fast_s:8.2f} s, {n / fast_s:8.2f} questions a second")
    say(f"one at a time  {slow_s:8.2f} s, {n / slow_s:8.2f} questions a second")
    say(f"{slow_s / fast_s:.1f} times as fast; {same} of {n} answers are the same")
    result = {
        "questions": n,
        "batched_s": fast_s,
        "one_at_a_time_s": slow_s,
        "times": slow_s / fast_s,
        "same_answers": same,
        "programs": scorer.compiled_programs(),
        "provenance": provenance(),
    }
    say(json.dumps(result))


def second_time[T](run: Callable[[], T]) -> tuple[T, float]:
    run()
    began = time.perf_counter()
    return run(), time.perf_counter() - began


def score_alone(loaded: LoadedModel, spans: list[Span]) -> list[SpanScore]:
    """The scores of one question, as a batch of whole prompts."""
    width = bucket(max(len(span.tokens) for span in spans), MIN_PREFIX[loaded.model.attention])
    tokens = np.zeros((len(spans), width), np.int32)
    for row, span in zip(tokens, spans, strict=True):
        row[: len(span.tokens)] = span.tokens
    losses, argmax = jax.device_get(_forward(loaded.model, loaded.params, tokens))
    scores = []
    for i, span in enumerate(spans):
        part = slice(span.start - 1, len(span.tokens) - 1)
        scores.append(SpanScore(losses[i, part], argmax[i, part] == span.tokens[span.start :]))
    return scores


@partial(jax.jit, static_argnums=0)
def _forward(model: GPT, params: Params, tokens_BT):
    logits_BTV: Any = model.apply({"params": params}, tokens_BT)
    logprobs_BTV = jax.nn.log_softmax(logits_BTV[:, :-1])
    losses_BT = -jnp.take_along_axis(logprobs_BTV, tokens_BT[:, 1:, None], axis=-1)[..., 0]
    return losses_BT, jnp.argmax(logits_BTV, axis=-1)


if __name__ == "__main__":
    run_script(main)
