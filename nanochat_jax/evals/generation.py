"""What a model writes: completions to look at, and answers to a task's questions with rewards.

The second half is the one place that asks a model questions and judges its answers. Reinforcement
learning samples with it, and both its held-out pass@k and that of scripts/eval_chat.py come from
it: the same number for the same checkpoint, task, seed and settings.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from nanochat_jax.distributed import share_out
from nanochat_jax.engine.engine import Engine, make_engine
from nanochat_jax.engine.requests import Request, Sample, stop_ids
from nanochat_jax.engine.sampling import SamplingParams
from nanochat_jax.engine.scheduler import Scheduler
from nanochat_jax.gpt import GPT, Params
from nanochat_jax.tasks.task import Conversation, Task
from nanochat_jax.tokenizer import Tokenizer

PROMPTS = (
    "The capital of Italy is",
    "The opposite of cold is",
    "Once upon a time",
    "The largest planet of the solar system is",
    "In the year 1850",
    "The first thing to learn about music is",
)

QUESTIONS = (
    "Who are you?",
    "What is 12 * 7?",
    "How many times does the letter e occur in engineer?",
    "Why is the sky blue?",
)

SAMPLING = SamplingParams(temperature=0.8, top_k=50, seed=42)
MAX_SLOTS = 16  # prompts completed side by side
CHUNK = 64  # tokens per call of the engine: nothing is streamed

MIN_PROMPT = 16  # tokens of the context that answers must leave to the question
MAX_PROMPT = 2048  # the original's limit, for a model whose context leaves less than that
TRAINING, EVALUATION = range(2)  # kinds of random numbers


# --- completions ----------------------------------------------------------------------------------


def completion_engine(
    model: GPT,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    *,
    chat: bool = False,
) -> Engine:
    """An engine with room for `complete`; its rows may be longer than those of training."""
    n_slots = min(len(prompts), MAX_SLOTS)
    capacity = max(map(len, _prompt_ids(tokenizer, prompts, chat))) + max_new_tokens
    return make_engine(model, params, capacity=capacity, n_slots=n_slots, chunk=CHUNK)


def complete(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    sampling: SamplingParams = SAMPLING,
    chat: bool = False,
) -> list[str]:
    """The continuation of each prompt, up to <|bos|> (the next document) or `max_new_tokens`.

    An empty prompt begins a document. Prompt i is sampled with seed + i. With `chat` the prompts
    are questions: the assistant's answers, with the calculator's results in them.
    """
    requests = [
        Request(
            ids,
            max_new_tokens,
            replace(sampling, seed=sampling.seed + i),
            stop_ids=stop_ids(tokenizer, chat=chat),
            use_tools=chat,
        )
        for i, ids in enumerate(_prompt_ids(tokenizer, prompts, chat))
    ]
    samples = Scheduler(engine, tokenizer).generate(requests)
    return [tokenizer.decode(sample[0].tokens) for sample in samples]


def _prompt_ids(tokenizer: Tokenizer, prompts: Sequence[str], chat: bool) -> list[list[int]]:
    if not chat:
        return tokenizer.encode_batch(list(prompts), prepend_bos=True)
    chats = ([{"role": "user", "content": prompt}] for prompt in prompts)
    return [tokenizer.render_prompt({"messages": messages}) for messages in chats]


# --- answers and rewards --------------------------------------------------------------------------


class RolloutPrompt(NamedTuple):
    """A question of a task, and the seed of its answers."""

    example: int
    seed: int


@dataclass(frozen=True)
class Rollout:
    """One answer to one question. `logprobs` are the sampler's; those of forced tokens are nan."""

    prompt: Sequence[int]
    tokens: Sequence[int]
    forced: Sequence[bool]
    logprobs: Sequence[float]
    reward: float
    reason: str  # why it ended: stop or length


class RolloutGroup(NamedTuple):
    """All answers to one question."""

    prompt: RolloutPrompt
    conversation: Conversation
    rollouts: list[Rollout]


def seed_of(*numbers: int) -> int:
    """64 bits that differ whenever the numbers, none negative, do."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


@dataclass(frozen=True)
class RolloutSampler:
    """Samples answers to a task's questions, with the calculator, and has the task judge them.

    Questions share the engine's slots. The answers to a question depend only on the weights, the
    settings and the prompt's seed.
    """

    engine: Engine
    tokenizer: Tokenizer
    max_new_tokens: int
    temperature: float
    top_k: int

    def __post_init__(self):
        if self.prompt_room < MIN_PROMPT:
            raise ValueError(
                f"answers of {self.max_new_tokens} tokens leave {self.prompt_room} of the model's "
                f"context of {self.engine.capacity} for the question; lower max_new_tokens"
            )

    @property
    def prompt_room(self) -> int:
        """Tokens that a prompt may have: longer conversations lose their oldest turns."""
        return self.engine.capacity - self.max_new_tokens

    def sample(self, task: Task, prompts: Sequence[RolloutPrompt], n: int) -> list[RolloutGroup]:
        """`n` answers to each prompt, with the task's rewards.

        The processes of a cluster run divide the prompts; each gets all of the answers.
        """
        asked = [(prompt, task[prompt.example]) for prompt in prompts]
        answers = share_out(asked, partial(self._sample_share, task, n))
        return [
            RolloutGroup(*pair, [Rollout(**fields) for fields in rollouts])
            for pair, rollouts in zip(asked, answers, strict=True)
        ]

    def _sample_share(
        self, task: Task, n: int, asked: Sequence[tuple[RolloutPrompt, Conversation]]
    ) -> list[list[dict[str, Any]]]:
        """The rollouts of each prompt, as JSON."""
        requests = [
            Request(
                self.tokenizer.render_for_completion(conversation, self.prompt_room),
                self.max_new_tokens,
                SamplingParams(self.temperature, self.top_k, seed=prompt.seed),
                n=n,
                stop_ids=stop_ids(self.tokenizer, chat=True),
                use_tools=True,
            )
            for prompt, conversation in asked
        ]
        # A new scheduler: an old one would reuse rows computed with other weights.
        samples = Scheduler(self.engine, self.tokenizer).generate(requests)

        def judged(request: Request, sample: Sample, conversation: Conversation) -> dict[str, Any]:
            reward = float(task.reward(conversation, self.tokenizer.decode(sample.tokens)))
            return asdict(Rollout(request.prompt, reward=reward, **vars(sample)))

        return [
            [judged(request, sample, conversation) for sample in of_prompt]
            for (_, conversation), request, of_prompt in zip(asked, requests, samples, strict=True)
        ]


def make_sampler(
    model: GPT,
    params: Params,
    tokenizer: Tokenizer,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 50,
    **engine: Any,
) -> RolloutSampler:
    """A sampler with a new engine. `params` are whole; `engine`: see `make_engine`.

    A prompt and its answer share the context that the model was trained on, as in reinforcement
    learning; only where that leaves no room for a question are the rows longer.
    """
    context = model.config.sequence_len
    if context - max_new_tokens < MIN_PROMPT:
        context = MAX_PROMPT + max_new_tokens
    built = make_engine(model, params, capacity=context, **engine)
    return RolloutSampler(built, tokenizer, max_new_tokens, temperature, top_k)


def sample_task(
    sampler: RolloutSampler, task: Task, n: int, seed: int, batch_size: int
) -> Iterator[list[RolloutGroup]]:
    """`n` answers to every question of a task, `batch_size` questions at a time.

    The seed of a question depends on `seed` and its number alone: two evaluations differ by their
    weights only.
    """
    for start in range(0, len(task), batch_size):
        numbers = range(start, min(start + batch_size, len(task)))
        prompts = [RolloutPrompt(i, seed_of(seed, EVALUATION, i)) for i in numbers]
        yield sampler.sample(task, prompts, n)


def rewards_of(groups: Sequence[RolloutGroup]) -> np.ndarray:
    """(questions, samples) float64."""
    return np.array([[rollout.reward for rollout in group.rollouts] for group in groups])


def is_right(rewards: np.ndarray) -> np.ndarray:
    """Right is a reward of 1 or more, everywhere."""
    return rewards >= 1


def pass_at_k(right_QN: np.ndarray, k: int) -> np.ndarray:
    """The probability that one of k samples is right, (Q,) by question, from N ≥ k samples.

    Unbiased: 1 − C(N−c, k) / C(N, k) with c right ones (arXiv 2107.03374).
    """
    N = right_QN.shape[1]
    if not 1 <= k <= N:
        raise ValueError(f"pass@{k} needs at least {max(k, 1)} samples of a question, not {N}")
    wrong_Q = N - right_QN.sum(axis=1)
    missed_Q = np.ones(len(right_QN))
    for i in range(k):  # the factors of the quotient of the binomials
        missed_Q *= np.maximum(wrong_Q - i, 0) / (N - i)
    return 1 - missed_Q
