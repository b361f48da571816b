"""Text that a base model writes, to look at."""

from collections.abc import Sequence
from dataclasses import replace

from nanochat_jax.engine.engine import Engine, make_engine
from nanochat_jax.engine.requests import Request
from nanochat_jax.engine.sampling import Sampling
from nanochat_jax.engine.scheduler import Scheduler
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

SAMPLING = Sampling(temperature=0.8, top_k=50, seed=42)
MAX_ROWS = 16  # prompts at once
CHUNK = 64  # nobody watches the tokens come


def completion_engine(
    model: GPT, params: Params, tokenizer: Tokenizer, prompts: Sequence[str], max_new_tokens: int
) -> Engine:
    """An engine with room for `complete`; rows may become longer than those of the training."""
    longest = max(map(len, tokenizer.encode_batch(list(prompts), prepend_bos=True)))
    slots = min(len(prompts), MAX_ROWS)
    return make_engine(model, params, capacity=longest + max_new_tokens, slots=slots, chunk=CHUNK)


def complete(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    sampling: Sampling = SAMPLING,
) -> list[str]:
    """How each prompt goes on, until <|bos|> (the next document) or `max_new_tokens`.

    An empty prompt begins a document. Each prompt draws with random numbers of its own.
    """
    requests = [
        Request(
            row,
            max_new_tokens,
            replace(sampling, seed=sampling.seed + i),
            stop_ids=(tokenizer.bos_id,),
        )
        for i, row in enumerate(tokenizer.encode_batch(list(prompts), prepend_bos=True))
    ]
    samples = Scheduler(engine).generate(requests)
    return [tokenizer.decode(sample[0].tokens) for sample in samples]
