"""Questions asked to a model, its answers drawn by the engine, and what they are worth.

Different questions share the engine's rows; the calculator answers in the middle of a sample. What
is drawn for a question depends on the weights, the seed and the question's place in the run alone,
so a run that goes on after an interruption draws the same again.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple, Self

import numpy as np

from nanochat_jax.distributed import share_out
from nanochat_jax.engine.engine import Engine
from nanochat_jax.engine.requests import Request, Sample
from nanochat_jax.engine.sampling import SamplingParams
from nanochat_jax.engine.scheduler import Scheduler
from nanochat_jax.evals.generation import pass_at_k
from nanochat_jax.evals.scoring import ProgressCallback
from nanochat_jax.stages.policy import Rollout
from nanochat_jax.tasks.task import Conversation, Task
from nanochat_jax.tokenizer import Tokenizer

TRAINING, EVALUATION = range(2)  # kinds of random numbers

type Judge = Callable[[Conversation, str], float]


class Question(NamedTuple):
    """A question of a task, and the seed for its answers."""

    example: int
    seed: int


class Answered(NamedTuple):
    question: Question
    conversation: Conversation
    rollouts: list[Rollout]


def seed_of(*numbers: int) -> int:
    """64 bits that differ whenever the numbers, none negative, do."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


@dataclass(frozen=True)
class Interview:
    """How questions are asked."""

    engine: Engine
    tokenizer: Tokenizer
    max_new_tokens: int
    temperature: float
    top_k: int

    def __post_init__(self):
        room = self.engine.capacity - self.max_new_tokens
        if room < 16:
            raise ValueError(
                f"answers of {self.max_new_tokens} tokens leave {room} of the model's context of "
                f"{self.engine.capacity} for the question; lower max_new_tokens"
            )

    def ask(self, task: Task, questions: Iterable[Question], n: int, judge: Judge):
        """`n` answers to each question, with what the judge gives for them: a list of Answered.

        The processes of a cluster run divide the questions; each gets all of the answers.
        """
        asked = [(question, task[question.example]) for question in questions]
        answers = share_out(asked, partial(self._answer, n, judge))
        return [
            Answered(question, talk, [Rollout(**told) for told in samples])
            for (question, talk), samples in zip(asked, answers, strict=True)
        ]

    def _answer(self, n: int, judge: Judge, asked: Sequence[tuple[Question, Conversation]]):
        """The samples of each question as JSON."""
        requests = [self._request(question, talk, n) for question, talk in asked]
        # A new scheduler: an old one would go on from rows that other weights have filled.
        drawn = Scheduler(self.engine, self.tokenizer).generate(requests)
        return [
            [asdict(self._rollout(request, s, talk, judge)) for s in samples]
            for (_, talk), request, samples in zip(asked, requests, drawn, strict=True)
        ]

    def _request(self, question: Question, conversation: Conversation, n: int) -> Request:
        room = self.engine.capacity - self.max_new_tokens
        return Request(
            self.tokenizer.render_for_completion(conversation, max_tokens=room),
            self.max_new_tokens,
            SamplingParams(self.temperature, self.top_k, seed=question.seed),
            n=n,
            stop_ids=(self.tokenizer.special_id("<|assistant_end|>"), self.tokenizer.bos_id),
            use_tools=True,
        )

    def _rollout(self, request: Request, sample: Sample, conversation, judge: Judge) -> Rollout:
        reward = float(judge(conversation, self.tokenizer.decode(sample.tokens)))
        return Rollout(
            request.prompt, sample.tokens, sample.forced, sample.logprobs, reward, sample.reason
        )


class Questions:
    """The questions of each step, in the task's order, again and again; used in a `with`."""

    def __init__(self, size: int, per_step: int, seed: int, position: int = 0):
        if size < 1:
            raise ValueError("the task has no question to learn from")
        self._size, self._per_step, self._seed = size, per_step, seed
        self._position = position

    def __next__(self) -> list[Question]:
        start, self._position = self._position, self._position + self._per_step
        return [
            Question(place % self._size, seed_of(self._seed, TRAINING, place))
            for place in range(start, self._position)
        ]

    def get_state(self) -> dict[str, Any]:
        return {"position": self._position}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


# --- what they tell -------------------------------------------------------------------------------


def rewards_of(answered: Sequence[Answered]) -> np.ndarray:
    """(questions, samples) float64."""
    return np.array([[rollout.reward for rollout in a.rollouts] for a in answered])


def summary(answered: Sequence[Answered]) -> dict[str, float]:
    """The numbers of a step's answers. Right, for pass@k, is a reward of 1 or more."""
    rewards = rewards_of(answered)
    rollouts = [rollout for a in answered for rollout in a.rollouts]
    lengths = [len(rollout.tokens) for rollout in rollouts]
    n = rewards.shape[1]
    return {
        "reward": float(rewards.mean()),
        f"pass@{n}": float(pass_at_k(rewards >= 1, n).mean()),
        # Only questions whose answers are not all worth the same teach anything.
        "telling_questions": float(np.mean(rewards.max(axis=1) > rewards.min(axis=1))),
        "length": float(np.mean(lengths)),
        "max_length": float(np.max(lengths)),
        "cut_off": float(np.mean([rollout.reason == "length" for rollout in rollouts])),
        "tool_calls": float(np.mean([any(rollout.forced) for rollout in rollouts])),
        "tokens": float(sum(lengths)),
    }


def transcripts(
    answered: Sequence[Answered], tokenizer: Tokenizer, count: int
) -> list[dict[str, Any]]:
    """The best and the worst answer to each of the first `count` questions, as records."""
    records = []
    for a in answered[:count]:
        ranked = sorted(a.rollouts, key=lambda rollout: -rollout.reward)
        for rollout in [ranked[0], ranked[-1]][: len(ranked)]:
            records.append(
                {
                    "question": a.question.example,
                    "reward": rollout.reward,
                    "reason": rollout.reason,
                    "prompt": tokenizer.decode(rollout.prompt),
                    "completion": tokenizer.decode(rollout.tokens),
                }
            )
    return records


def measure(
    interview: Interview,
    task: Task,
    seed: int,
    n: int,
    at_once: int,
    stopped: Callable[[], bool],
    progress: ProgressCallback = lambda done, total: None,
) -> dict[str, float] | None:
    """pass@k of all questions of a task for k = 1 … n, and the mean length; None when stopped.

    The seeds are always the same: two measurements differ by their weights alone.
    """
    answered: list[Answered] = []
    for start in range(0, len(task), at_once):
        if stopped():
            return None
        questions = [
            Question(i, seed_of(seed, EVALUATION, i))
            for i in range(start, min(start + at_once, len(task)))
        ]
        answered += interview.ask(task, questions, n, task.evaluate)
        progress(len(answered), len(task))
    right = rewards_of(answered) > 0
    lengths = [len(rollout.tokens) for a in answered for rollout in a.rollouts]
    told = {f"pass@{k}": float(pass_at_k(right, k).mean()) for k in range(1, n + 1)}
    return {**told, "length": float(np.mean(lengths))}
