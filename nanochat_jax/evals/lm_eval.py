"""Our checkpoints under EleutherAI's lm-evaluation-harness (pip install lm_eval).

    import lm_eval
    from nanochat_jax.interop.lm_eval import harness_model

    results = lm_eval.simple_evaluate(harness_model("d12"), tasks=["hellaswag", "gsm8k"])

A chat model is asked in its chat format with apply_chat_template=True. lm_eval is imported only
when a model is made.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from itertools import groupby
from typing import Any

import jax
import numpy as np

from nanochat_jax.checkpoint import LoadedModel, load_model
from nanochat_jax.engine.engine import make_engine
from nanochat_jax.engine.requests import Event, Finished, Request, Token
from nanochat_jax.engine.sampling import SamplingParams
from nanochat_jax.engine.scheduler import Scheduler
from nanochat_jax.evals.scoring import Scorer
from nanochat_jax.evals.scoring_batches import Span, SpanScore
from nanochat_jax.runs import run_folder
from nanochat_jax.sharding import from_logical, make_mesh
from nanochat_jax.tokenizer import Tokenizer

MAX_GEN_TOKENS = 256  # the harness's own default
EVERYTHING = 2**31  # requests that may wait: the harness hands all over at once


def harness_model(run: str, step: str = "last", *, n_devices: int | None = None, **how: Any) -> Any:
    """An lm_eval LM of a run (its name or folder); `how`: see `Harness`."""
    LM = import_module("lm_eval.api.model").LM
    harness = type("NanochatHarness", (Harness, LM), {})
    return harness(load_model(run_folder(run), step), n_devices=n_devices, **how)


class Harness:
    """The three questions of the harness, by its own names; each request has `args`.

    Texts begin with <|bos|>, and the model is shown at most `max_length` tokens at once (default:
    what it was trained on): of longer contexts the end. `tokens_per_device` limits a batch of
    scored texts, `slots` are the answers written at once.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        n_devices: int | None = None,
        max_length: int | None = None,
        tokens_per_device: int = 16384,
        slots: int = 32,
        use_tools: bool = True,
    ):
        super().__init__()
        self._model, self._tokenizer = loaded.model, loaded.tokenizer
        self._params = jax.device_get(loaded.params)
        self._mesh = make_mesh(n_devices)
        self._max_length = max_length or loaded.model.config.sequence_len
        self._slots, self._use_tools = slots, use_tools
        self._chats: dict[str, list[int]] = {}
        params = from_logical(self._params, self._mesh)
        self._scorer = Scorer(self._model, self._mesh, params, tokens_per_device=tokens_per_device)

    # --- likelihoods ------------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """Of each (context, continuation): log p in nats, and whether each token is the likeliest.

        Neighbours of one context, as the choices of a question are, go through the model together.
        """
        pairs = [request.args for request in requests]
        groups = [
            [self._continuation(context, continuation) for _, continuation in same]
            for context, same in groupby(pairs, key=lambda pair: pair[0])
        ]
        scores = self._scorer.score(groups)
        return [
            (_log_p([score]), bool(score.is_argmax.all())) for group in scores for score in group
        ]

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """Of each (text,): log p of all its tokens, in windows of at most `max_length`."""
        groups = [self._windows(request.args[0]) for request in requests]
        return [_log_p(scores) for scores in self._scorer.score(groups)]

    def _continuation(self, context: str, continuation: str) -> Span:
        spaces = len(context) - len(context.rstrip())
        if context in self._chats or not spaces:
            before = self._encode(context)
        else:  # a space belongs to the word that follows
            context, continuation = context[:-spaces], context[-spaces:] + continuation
            before = self._encode(context)
        if context in self._chats:
            whole = before + self._tokenizer.encode(continuation)
        else:
            whole = self._encode(context + continuation)
        start = min(len(before), len(whole) - 1)  # the last token may have grown
        surplus = min(max(0, len(whole) - self._max_length - 1), start - 1)
        return Span(np.array(whole[surplus:], np.int32), start - surplus)

    def _windows(self, text: str) -> list[Span]:
        """The text in pieces of `max_length` tokens; the last one with as much before it."""
        tokens = np.array(self._encode(text), np.int32)
        windows = []
        for first in range(1, len(tokens), self._max_length):
            end = min(first + self._max_length, len(tokens))
            begin = max(0, end - self._max_length - 1)
            windows.append(Span(tokens[begin:end], first - begin))
        return windows

    def _encode(self, text: str) -> list[int]:
        if text in self._chats:
            return self._chats[text]
        return [self._tokenizer.bos_id, *self._tokenizer.encode(text)]

    # --- generation -------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """What follows each (context, settings), until one of the strings in settings["until"]."""
        pairs = [request.args for request in requests]
        new = [int(settings.get("max_gen_toks", MAX_GEN_TOKENS)) for _, settings in pairs]
        capacity = self._max_length + max(new, default=0)
        engine = make_engine(
            self._model, self._params, capacity=capacity, n_slots=self._slots, mesh=self._mesh
        )
        scheduler = Scheduler(engine, self._tokenizer, max_queue=EVERYTHING)
        writers = [
            Writer(scheduler, self._tokenizer, self._request(context, settings, n, i), settings)
            for i, ((context, settings), n) in enumerate(zip(pairs, new, strict=True))
        ]
        while scheduler.step():
            pass
        return [writer.text() for writer in writers]

    def _request(self, context: str, settings: Mapping[str, Any], n: int, number: int) -> Request:
        end = self._tokenizer.special_id("<|assistant_end|>")
        return Request(
            self._encode(context)[-self._max_length :],
            n,
            _sampling(settings, number),
            stop_ids=(self._tokenizer.bos_id, end),
            use_tools=self._use_tools,
        )

    # --- chats ------------------------------------------------------------------------------------

    @property
    def tokenizer_name(self) -> str:
        return "nanochat_jax"

    def chat_template(self, chat_template: bool | str = False) -> str:
        return "nanochat_jax" if chat_template else ""

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a chat, which stands for its tokens when it comes back as a context.

        So what a user writes is never taken for a marker, as it is where text alone is known.
        """
        if not add_generation_prompt:
            raise ValueError(
                "an answer that was begun cannot be gone on with: drop assistant_prefix"
            )
        ids = self._tokenizer.render_prompt({"messages": list(chat_history)}, self._max_length)
        text = self._tokenizer.decode(ids)
        self._chats[text] = ids
        return text


class Writer:
    """Collects one answer and ends it at the first stop string."""

    def __init__(
        self,
        scheduler: Scheduler,
        tokenizer: Tokenizer,
        request: Request,
        settings: Mapping[str, Any],
    ):
        until = settings.get("until") or []
        self._until = [until] if isinstance(until, str) else list(until)
        self._scheduler, self._tokenizer = scheduler, tokenizer
        self._tokens: list[int] = []
        self._ticket = scheduler.submit(request, self._hear)

    def _hear(self, events: list[Event]) -> None:
        self._tokens += [event.id for event in events if isinstance(event, Token)]
        is_finished = any(isinstance(event, Finished) for event in events)
        if not is_finished and self._end(self._whole()) is not None:
            self._scheduler.cancel(self._ticket)

    def text(self) -> str:
        whole = self._whole()
        return whole[: self._end(whole)]

    def _whole(self) -> str:
        return self._tokenizer.decode(self._tokens)

    def _end(self, text: str) -> int | None:
        """Where the first stop string begins."""
        found = [text.find(stop) for stop in self._until if stop]
        return min((at for at in found if at >= 0), default=None)


def _sampling(settings: Mapping[str, Any], seed: int) -> SamplingParams:
    """Greedy unless the task wants otherwise."""
    wanted = settings.get("do_sample")
    usual = 1.0 if wanted else 0.0
    temperature = 0.0 if wanted is False else float(settings.get("temperature", usual))
    top_k, top_p = int(settings.get("top_k") or 0), float(settings.get("top_p") or 1.0)
    return SamplingParams(temperature, top_k, top_p, seed=seed)


def _log_p(scores: Sequence[SpanScore]) -> float:
    return -float(sum(score.losses.sum(dtype=np.float64) for score in scores))
