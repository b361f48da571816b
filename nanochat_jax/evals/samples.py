"""Text that a base model writes, to look at."""

from collections.abc import Sequence

import jax

from nanochat_jax.engine.naive import generate
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


def complete(
    model: GPT,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_k: int | None = 50,
    key: jax.Array,
) -> list[str]:
    """How each prompt goes on, until <|bos|> (the next document) or `max_new_tokens`.

    An empty prompt begins a document. `params` are whole, as engine.naive wants them.
    """
    new = generate(
        model,
        params,
        tokenizer.encode_batch(list(prompts), prepend_bos=True),
        max_new_tokens,
        key=key,
        temperature=temperature,
        top_k=top_k,
        stop_ids=[tokenizer.bos_id],
    )
    return [tokenizer.decode(tokens) for tokens in new]
