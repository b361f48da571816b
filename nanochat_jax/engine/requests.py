"""Requests and what the engine answers: the types between scheduler.py and its users."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from nanochat_jax.engine.decode import MAX_STOP_IDS, MAX_TOP_LOGPROBS
from nanochat_jax.engine.sampling import SamplingParams
from nanochat_jax.tokenizer import Tokenizer


@dataclass(frozen=True)
class Request:
    """What to generate: `n` samples that continue one prompt."""

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    n: int = 1
    stop_ids: tuple[int, ...] = ()  # each ends a sample and is not part of it
    top_logprobs: int = 0  # most likely tokens to report with each sampled one
    use_tools: bool = False  # the calculator answers python blocks


class Token(NamedTuple):
    """One token of a sample."""

    sample: int
    id: int
    forced: bool  # inserted by the calculator, not sampled
    logprob: float  # of the model alone; nan when forced
    top_logprobs: tuple[tuple[int, float], ...]  # (id, logprob), the most likely first


class Finished(NamedTuple):
    """The last event of a sample."""

    sample: int
    reason: str  # stop, length, cancelled, error
    cached_tokens: int  # of the prompt, reused from an earlier request


type Event = Token | Finished


class Full(Exception):
    """Too many requests are waiting."""


class Stats(NamedTuple):
    queued: int
    slots: int
    busy_slots: int
    tokens_generated: int
    prompt_tokens: int
    cached_prompt_tokens: int


@dataclass
class Sample:
    """A whole sample, as `Scheduler.generate` returns it; the lists are of equal length."""

    tokens: list[int] = field(default_factory=list)
    forced: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reason: str = ""


def stop_ids(tokenizer: Tokenizer, *, chat: bool) -> tuple[int, ...]:
    """The tokens that end a text: <|bos|> begins the next document; in a chat, also the end of the
    assistant's answer."""
    names = ("<|assistant_end|>", "<|bos|>") if chat else ("<|bos|>",)
    return tuple(map(tokenizer.special_id, names))


def check(request: Request, vocab_size: int, capacity: int) -> None:
    """ValueError for a request that could never run in slots of `capacity` tokens."""
    tokens = np.asarray(request.prompt)
    if len(tokens) == 0:
        raise ValueError("a prompt needs at least one token; <|bos|> alone will do")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise ValueError(
            f"the prompt has token {tokens.max()} for a vocabulary of {vocab_size}; "
            "was it encoded with another tokenizer?"
        )
    if request.max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must not be negative, not {request.max_new_tokens}")
    if len(tokens) + request.max_new_tokens > capacity:
        raise ValueError(
            f"a prompt of {len(tokens)} tokens and {request.max_new_tokens} new ones are more "
            f"than the context of {capacity}"
        )
    for name, value, low, high in (
        ("n", request.n, 1, 4096),
        ("the number of stop_ids", len(request.stop_ids), 0, MAX_STOP_IDS),
        ("top_logprobs", request.top_logprobs, 0, MAX_TOP_LOGPROBS),
    ):
        if not low <= value <= high:
            raise ValueError(f"{name} must be from {low} to {high}, not {value}")
