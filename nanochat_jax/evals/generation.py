"""Text that a model writes, to look at: how a prompt goes on, or how the assistant answers it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from nanochat_jax.engine.engine import Engine, make_engine
from nanochat_jax.engine.requests import Request, Sample
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
MAX_ROWS = 16  # prompts at once
CHUNK = 64  # nobody watches the tokens come


def completion_engine(
    model: GPT,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    *,
    chat: bool = False,
) -> Engine:
    """An engine with room for `complete`; rows may become longer than those of the training."""
    longest = max(map(len, _prompt_ids(tokenizer, prompts, chat)))
    slots = min(len(prompts), MAX_ROWS)
    return make_engine(model, params, capacity=longest + max_new_tokens, n_slots=slots, chunk=CHUNK)


def complete(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    sampling: SamplingParams = SAMPLING,
    chat: bool = False,
) -> list[str]:
    """How each prompt goes on, until <|bos|> (the next document) or `max_new_tokens`.

    An empty prompt begins a document. Each prompt draws with random numbers of its own. With `chat`
    the prompts are questions: the assistant's answers, to which the calculator adds its own.
    """
    names = ("<|bos|>", "<|assistant_end|>") if chat else ("<|bos|>",)
    stop_ids = tuple(map(tokenizer.special_id, names))
    requests = [
        Request(
            row,
            max_new_tokens,
            replace(sampling, seed=sampling.seed + i),
            stop_ids=stop_ids,
            use_tools=chat,
        )
        for i, row in enumerate(_prompt_ids(tokenizer, prompts, chat))
    ]
    samples = Scheduler(engine, tokenizer).generate(requests)
    return [tokenizer.decode(sample[0].tokens) for sample in samples]


def _prompt_ids(tokenizer: Tokenizer, prompts: Sequence[str], chat: bool) -> list[list[int]]:
    if not chat:
        return tokenizer.encode_batch(list(prompts), prepend_bos=True)
    messages = ([{"role": "user", "content": prompt}] for prompt in prompts)
    return [tokenizer.render_prompt({"messages": asked}) for asked in messages]


MAX_PROMPT = 2048  # tokens; of longer conversations the oldest turns are left out


@dataclass(frozen=True)
class Drawing:
    """How answers are drawn."""

    n_samples: int = 1
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 50
    seed: int = 42

    def __post_init__(self):
        if self.n_samples < 1 or self.max_new_tokens < 1:
            raise ValueError("an answer needs at least one sample of one token")
        if self.n_samples > 1 and self.temperature == 0:
            raise ValueError(
                f"at temperature 0 all {self.n_samples} samples are the same; set --temperature"
            )


def pass_at_k(correct_QN: np.ndarray, k: int) -> np.ndarray:
    """Of each question the chance that one of k samples is right, (Q,), from N ≥ k samples.

    Unbiased: 1 − C(N−c, k) / C(N, k) with c right ones (arXiv 2107.03374).
    """
    N = correct_QN.shape[1]
    if not 1 <= k <= N:
        raise ValueError(f"pass@{k} needs at least {max(k, 1)} samples of a question, not {N}")
    wrong_Q = N - correct_QN.sum(axis=1)
    missed_Q = np.ones(len(correct_QN))
    for i in range(k):  # the factors of the quotient of the binomials
        missed_Q *= np.maximum(wrong_Q - i, 0) / (N - i)
    return 1 - missed_Q


def _answer(
    scheduler: Scheduler, tokenizer: Tokenizer, task: Task, drawing: Drawing, numbers: Sequence[int]
) -> list[list[tuple[str, bool]]]:
    """Of each question the samples, and whether they are right."""
    conversations = [task[i] for i in numbers]
    requests = [
        _request(tokenizer, conversation, drawing, i)
        for i, conversation in zip(numbers, conversations, strict=True)
    ]
    return [
        [_judge(tokenizer, task, conversation, sample) for sample in samples]
        for conversation, samples in zip(conversations, scheduler.generate(requests), strict=True)
    ]


def _request(
    tokenizer: Tokenizer, conversation: Conversation, drawing: Drawing, number: int
) -> Request:
    sampling = SamplingParams(drawing.temperature, drawing.top_k, seed=drawing.seed + number)
    return Request(
        tokenizer.render_for_completion(conversation, MAX_PROMPT),
        drawing.max_new_tokens,
        sampling,
        n=drawing.n_samples,
        stop_ids=(tokenizer.special_id("<|assistant_end|>"), tokenizer.bos_id),
        use_tools=True,
    )


def _judge(tokenizer, task: Task, conversation: Conversation, sample: Sample) -> tuple[str, bool]:
    text = tokenizer.decode(sample.tokens)
    return text, bool(task.evaluate(conversation, text))


def capacity_for(tokenizer: Tokenizer, tasks: Sequence[Task], drawing: Drawing) -> int:
    """The tokens that an engine's rows need to answer all questions of the tasks."""
    lengths = (
        len(tokenizer.render_for_completion(task[i], MAX_PROMPT))
        for task in tasks
        for i in range(len(task))
    )
    return max(lengths, default=0) + drawing.max_new_tokens
