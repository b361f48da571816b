"""Our checkpoints under EleutherAI's lm-evaluation-harness (pip install lm_eval).

    import lm_eval
    from nanochat_jax.evals.lm_eval import harness_model

    results = lm_eval.simple_evaluate(harness_model("d12"), tasks=["hellaswag", "gsm8k"])

With apply_chat_template=True a chat model is asked in its chat format. lm_eval is imported only
when a model is made.
"""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
        self._max_length = loaded.model.config.sequence_len if max_length is None else max_length
        if self._max_length < 1:
            raise ValueError(f"max_length must be at least 1, not {max_length}")
        self._slots, self._use_tools = slots, use_tools
        self._chats: dict[str, list[int]] = {}
        self._ignored: set[str] = set()  # options that a warning has named
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
        """The continuation of each (context, settings); see `generation_options`."""
        asked = [self._options(*request.args) for request in requests]
        scheduler = make_scheduler(
            self._model,
            self._params,
            self._tokenizer,
            capacity=self._max_length + max((each.max_new_tokens for _, each in asked), default=0),
            n_slots=self._slots,
            mesh=self._mesh,
            max_queue=len(asked),
        )
        repeats: Counter[Any] = Counter()
        answers = []
        for i, (prompt, options) in enumerate(asked):
            # Without a seed each request has its own; with one, each repetition of a request.
            same = (*prompt, options)
            seed = i if options.seed is None else options.seed + repeats[same]
            repeats[same] += 1
            request = Request(
                prompt,
                options.max_new_tokens,
                replace(options.sampling, seed=seed),
                stop_ids=stop_ids(self._tokenizer, chat=True),
                use_tools=self._use_tools,
            )
            answers.append(Answer(scheduler, self._tokenizer, request, options.until))
        while scheduler.step():
            pass
        return [answer.text() for answer in answers]

    def _options(
        self, context: str, settings: Mapping[str, Any]
    ) -> tuple[list[int], "GenerationOptions"]:
        prompt = self._encode(context)[-self._max_length :]
        new = sorted(set(ignored_options(settings)) - self._ignored)
        if new:
            self._ignored.update(new)
            print(
                f"warning: generation options that this model ignores: {', '.join(new)}",
                file=sys.stderr,
            )
        return prompt, generation_options(settings, len(prompt))

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


# --- the harness's options ------------------------------------------------------------------------

# Names of the same thing, the first that is given counts; as in the harness's own models.
MAX_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
STOPS = ("until", "stop", "stop_sequences", "stop_strings")  # together
NUMBERS = {"top_k": int, "top_p": float, "min_p": float, "repetition_penalty": float}
KNOWN = {*MAX_NEW_TOKENS, "max_length", *STOPS, *NUMBERS, "temperature", "do_sample", "seed"}
# Options of other models, with the values at which they change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "n": (1,),
    "best_of": (1,),
    "use_cache": (True, False),
    "early_stopping": (True, False),
    "length_penalty": (1,),
    "typical_p": (1,),
    "no_repeat_ngram_size": (0,),
    "min_new_tokens": (0,),
    "min_length": (0,),
    "min_tokens": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
}


@dataclass(frozen=True)
class GenerationOptions:
    """A task's generation_kwargs, as the engine takes them."""

    max_new_tokens: int
    sampling: SamplingParams
    until: tuple[str, ...]
    seed: int | None


def generation_options(settings: Mapping[str, Any], prompt_tokens: int) -> GenerationOptions:
    """What a request's settings ask for; None stands for an option that is not given.

    Greedy unless do_sample or a temperature above 0 asks for sampling; do_sample false is greedy
    whatever the temperature. max_length counts the prompt too, and a top_k below 0 means all
    tokens. ValueError names an option with a value that cannot be used.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    is_random = _converted(given, "do_sample", _flag, None)
    temperature = _converted(given, "temperature", float, 1.0 if is_random else 0.0)
    sampling = {name: _converted(given, name, kind, None) for name, kind in NUMBERS.items()}
    if sampling["top_k"] is not None:
        sampling["top_k"] = max(0, sampling["top_k"])
    return GenerationOptions(
        _max_new_tokens(given, prompt_tokens),
        SamplingParams(
            temperature=0.0 if is_random is False else temperature,
            **{name: value for name, value in sampling.items() if value is not None},
        ),
        tuple(stop for name in STOPS for stop in _texts(name, given.get(name, ())) if stop),
        _converted(given, "seed", int, None),
    )


def ignored_options(settings: Mapping[str, Any]) -> list[str]:
    """The names of options that ask for what this model does not do."""
    return [
        name
        for name, value in settings.items()
        if name not in KNOWN and value is not None and value not in NEUTRAL.get(name, ())
    ]


def _max_new_tokens(given: Mapping[str, Any], prompt_tokens: int) -> int:
    name = next((name for name in MAX_NEW_TOKENS if name in given), None)
    if name is None:
        whole = _converted(given, "max_length", int, None)
        return MAX_GEN_TOKENS if whole is None else max(0, whole - prompt_tokens)
    new = _converted(given, name, int, None)
    if new < 0:
        raise ValueError(f"the generation option {name} must not be negative, not {new}")
    return new


def _converted(given: Mapping[str, Any], name: str, kind: Any, default: Any) -> Any:
    """The option as a number or flag; on a command line and in YAML some are texts."""
    if name not in given:
        return default
    try:
        return kind(given[name])
    except (TypeError, ValueError, KeyError):
        raise ValueError(f"the generation option {name} cannot be {given[name]!r}") from None


def _flag(value: Any) -> bool:
    if not isinstance(value, str):
        return bool(value)
    return {"true": True, "1": True, "false": False, "0": False}[value.strip().lower()]


def _texts(name: str, value: Any) -> Sequence[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"the generation option {name} must be a text or texts, not {value!r}")
    return texts


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
