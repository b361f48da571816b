"""Text that a model writes, to look at: how a prompt goes on, or how the assistant answers it."""

from collections.abc import Sequence
from dataclasses import replace

from nanochat_jax.engine.engine import Engine, make_engine
from nanochat_jax.engine.requests import Request
from nanochat_jax.engine.sampling import Sampling
from nanochat_jax.engine.scheduler import Scheduler
from nanochat_jax.engine.tools import Tools
from nanochat_jax.gpt import GPT, Params
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

SAMPLING = Sampling(temperature=0.8, top_k=50, seed=42)
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
    return make_engine(model, params, capacity=longest + max_new_tokens, slots=slots, chunk=CHUNK)


def complete(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    sampling: Sampling = SAMPLING,
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
    tools = Tools(tokenizer) if chat else None
    samples = Scheduler(engine, tools=tools).generate(requests)
    return [tokenizer.decode(sample[0].tokens) for sample in samples]


def _prompt_ids(tokenizer: Tokenizer, prompts: Sequence[str], chat: bool) -> list[list[int]]:
    if not chat:
        return tokenizer.encode_batch(list(prompts), prepend_bos=True)
    messages = ([{"role": "user", "content": prompt}] for prompt in prompts)
    return [tokenizer.render_prompt({"messages": asked}) for asked in messages]
