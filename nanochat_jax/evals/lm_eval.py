"""Our checkpoints under EleutherAI's lm-evaluation-harness (pip install lm_eval).

    import lm_eval
    from nanochat_jax.evals.lm_eval import harness_model

    results = lm_eval.simple_evaluate(harness_model("d12"), tasks=["hellaswag", "gsm8k"])

With apply_chat_template=True a chat model is asked in its chat format. lm_eval is imported only
when a model is made.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from itertools import groupby
from typing import Any

import jax
import numpy as np

from nanochat_jax.checkpoint import LoadedModel, load_model
from nanochat_jax.engine.requests import Event, Finished, Request, Token, stop_ids
from nanochat_jax.engine.sampling import SamplingParams
from nanochat_jax.engine.scheduler import Scheduler, make_scheduler
from nanochat_jax.evals.scoring import Scorer
from nanochat_jax.evals.scoring_batches import Span, SpanScore
from nanochat_jax.runs import run_folder
from nanochat_jax.sharding import from_logical, make_mesh
from nanochat_jax.tokenizer import Tokenizer

MAX_GEN_TOKENS = 256  # the harness's own default


def harness_model(run: str, step: str = "last", *, n_devices: int | None = None, **how: Any) -> Any:
    """An lm_eval LM of a run (its name or folder); `how`: see `Harness`."""
    LM = import_module("lm_eval.api.model").LM
    harness = type("NanochatHarness", (Harness, LM), {})
    return harness(load_model(run_folder(run), step), n_devices=n_devices, **how)


class Harness:
    """The harness's three request types, under its own names; each request has `args`.

    Texts begin with <|bos|>, and the model sees at most `max_length` tokens (default: the length it
    was trained on): of longer contexts the end. `tokens_per_device` limits a batch of scored texts,
    `slots` are the answers written side by side.
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

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """Of each (context, continuation): log p in nats, and whether each token is the argmax.

        Neighbours with the same context, as the choices of a question, are scored together.
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
        if context in self._chats:
            before = self._chats[context]
            whole = before + self._tokenizer.encode(continuation)
        else:
            before = self._encode(context.rstrip())  # a space belongs to the word that follows
            whole = self._encode(context + continuation)
        start = min(len(before), len(whole) - 1)  # the context's last token may now be longer
        surplus = min(max(0, len(whole) - self._max_length - 1), start - 1)
        return Span(np.array(whole[surplus:], np.int32), start - surplus)

    def _windows(self, text: str) -> list[Span]:
        """The text in windows of `max_length` tokens; the last one reaches back to be as long."""
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

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """The continuation of each (context, settings), up to the first of settings["until"]."""
        pairs = [request.args for request in requests]
        new = [int(settings.get("max_gen_toks", MAX_GEN_TOKENS)) for _, settings in pairs]
        scheduler = make_scheduler(
            self._model,
            self._params,
            self._tokenizer,
            capacity=self._max_length + max(new, default=0),
            n_slots=self._slots,
            mesh=self._mesh,
            max_queue=len(pairs),
        )
        answers = []
        for i, ((context, settings), max_new_tokens) in enumerate(zip(pairs, new, strict=True)):
            is_random = settings.get("do_sample")  # greedy unless the task asks for sampling
            temperature = float(settings.get("temperature", 1.0 if is_random else 0.0))
            request = Request(
                self._encode(context)[-self._max_length :],
                max_new_tokens,
                SamplingParams(
                    0.0 if is_random is False else temperature,
                    int(settings.get("top_k") or 0),
                    float(settings.get("top_p") or 1.0),
                    seed=i,
                ),
                stop_ids=stop_ids(self._tokenizer, chat=True),
                use_tools=self._use_tools,
            )
            until = settings.get("until") or []
            until = [until] if isinstance(until, str) else until
            answers.append(Answer(scheduler, self._tokenizer, request, until))
        while scheduler.step():
            pass
        return [answer.text() for answer in answers]

    @property
    def tokenizer_name(self) -> str:
        return "nanochat_jax"

    def chat_template(self, chat_template: bool | str = False) -> str:
        return "nanochat_jax" if chat_template else ""

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a chat, which stands for its tokens when it comes back as a context.

        So a marker in a user's text stays text, as it could not if the text were encoded again.
        """
        if not add_generation_prompt:
            raise ValueError("a begun answer cannot be continued: drop assistant_prefix")
        ids = self._tokenizer.render_prompt({"messages": list(chat_history)}, self._max_length)
        text = self._tokenizer.decode(ids)
        self._chats[text] = ids
        return text


class Answer:
    """Collects one answer and ends it at the first stop string."""

    def __init__(
        self, scheduler: Scheduler, tokenizer: Tokenizer, request: Request, until: Sequence[str]
    ):
        self._scheduler, self._tokenizer, self._until = scheduler, tokenizer, until
        self._tokens: list[int] = []
        self._state = scheduler.submit(request, self._listen)

    def _listen(self, events: list[Event]) -> None:
        self._tokens += [event.id for event in events if isinstance(event, Token)]
        is_finished = any(isinstance(event, Finished) for event in events)
        if not is_finished and self.text() != self._tokenizer.decode(self._tokens):
            self._scheduler.cancel(self._state)

    def text(self) -> str:
        """The answer so far, without the first stop string and what follows it."""
        text = self._tokenizer.decode(self._tokens)
        found = [text.find(stop) for stop in self._until if stop]
        return text[: min((at for at in found if at >= 0), default=None)]


def _log_p(scores: Sequence[SpanScore]) -> float:
    return -float(sum(score.losses.sum(dtype=np.float64) for score in scores))
