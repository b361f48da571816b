"""A conversation in the terminal; the scheduler runs in its own thread."""

import queue
import secrets
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any, Self

from nanochat_jax.checkpoint import LoadedModel
from nanochat_jax.engine.requests import Event, Finished
from nanochat_jax.engine.sampling import SamplingParams
from nanochat_jax.engine.scheduler import Scheduler
from nanochat_jax.serve.text import AnswerReader, TextPiece, chat_request, parts_of, prompt_format

GREETING = {
    "chat": "{run}, step {step}. Ask something; /help lists commands, Ctrl-D leaves.",
    "base": "{run}, step {step}: a model that has only been pretrained. It does not answer, it "
    "continues what you write. /help lists commands, Ctrl-D leaves.",
}
HELP = """\
/temperature X   how surprising answers may be; 0 takes the most likely token
/topk K          sample among the K most likely tokens; 0: all
/tokens N        tokens of an answer at most
/clear           forget the conversation
/quit            leave (so do Ctrl-D and Ctrl-C; while an answer is written, Ctrl-C stops it)"""

# What a model writes must not move the cursor or recolour the screen.
_SHOWN = dict.fromkeys((*range(32), *range(127, 160)), "\N{REPLACEMENT CHARACTER}")
_SHOWN |= {ord("\n"): "\n", ord("\t"): "\t"}
_OPENING = {"text": "", "python": "⟨", "python_output": " = "}
_CLOSING = {"text": "", "python": "⟩", "python_output": " "}


@dataclass(frozen=True)
class Settings:
    """How answers are sampled. ValueError for a setting outside its range."""

    temperature: float = 0.6
    """0 takes the most likely token; more is more surprising."""
    top_k: int = 50
    """Tokens to choose among; 0: all."""
    max_tokens: int = 512
    """Tokens of an answer at most."""
    seed: int | None = None
    """The same seed, the same answers (another every time)."""

    def __post_init__(self) -> None:
        self.sampling()
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {self.max_tokens}")

    def sampling(self) -> SamplingParams:
        seed = secrets.randbits(63) if self.seed is None else self.seed
        return SamplingParams(temperature=self.temperature, top_k=self.top_k, seed=seed)


@dataclass
class Terminal:
    """One model, the conversation with it so far, and the thread that the scheduler runs in."""

    scheduler: Scheduler
    model: LoadedModel
    run: str
    settings: Settings
    messages: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt_format = prompt_format(self.model.meta)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self.scheduler.run, args=[self._stop], daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)

    def ask(self, text: str) -> None:
        """Prints the answer and remembers both; says what no longer fits and is forgotten.

        Ctrl-C ends the answer and keeps what there is of it. ValueError for a text too long.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        request, dropped = chat_request(
            self.model.tokenizer,
            self.prompt_format,
            messages,
            context=self.scheduler.engine.capacity,
            max_tokens=self.settings.max_tokens,
            sampling=self.settings.sampling(),
        )
        if dropped:
            print(f"(The oldest {dropped} messages no longer fit and are forgotten.)")
        events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
        ticket = self.scheduler.submit(request, events.put)
        with on_interrupt(lambda: self.scheduler.cancel(ticket)):
            pieces = print_answer(events, AnswerReader(self.model.tokenizer))
        answer = {"role": "assistant", "content": parts_of(pieces)}
        self.messages = [*messages[dropped:], answer]


def print_answer(events: queue.SimpleQueue[list[Event]], reader: AnswerReader) -> list[TextPiece]:
    """Prints an answer as it comes, tool calls in brackets, and returns it."""
    pieces: list[TextPiece] = []
    part = "text"
    while True:
        for event in events.get():
            found = reader.finish() if isinstance(event, Finished) else reader.add(event)
            for piece in found:
                if piece.text:
                    if piece.type != part:
                        print(_CLOSING[part] + _OPENING[piece.type], end="")
                        part = piece.type
                    print(piece.text.translate(_SHOWN), end="", flush=True)
            pieces += found
            if isinstance(event, Finished):
                print(_CLOSING[part] + _REMARKS.get(event.reason, ""), flush=True)
                return pieces


_REMARKS = {"cancelled": " [stopped]", "error": " [failed]"}


@contextmanager
def on_interrupt(action: Callable[[], object]) -> Iterator[None]:
    """The first Ctrl-C within the block does this instead; the next one is as ever."""

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        action()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# --- talking --------------------------------------------------------------------------------------


def talk(terminal: Terminal) -> None:
    """Reads lines until the user leaves; a mistake is said and nothing is lost."""
    step = terminal.model.meta.get("step")
    print(GREETING[terminal.prompt_format].format(run=terminal.run, step=step))
    while True:
        try:
            line = input("\n> ")
        except EOFError:
            print()
            return
        if line.strip().lower() in ("/quit", "/exit"):
            return
        try:
            if line.startswith("/"):
                print(command(terminal, line))
            elif line.strip():
                terminal.ask(line)
        except ValueError as error:
            print(error)


def command(terminal: Terminal, line: str) -> str:
    """Carries out a slash command and says what it did; ValueError where it could not."""
    name, _, argument = line.strip().partition(" ")
    match name.lower():
        case "/help":
            return HELP
        case "/clear":
            terminal.messages.clear()
            return "a new conversation"
        case "/temperature":
            return _change(terminal, "temperature", float, argument.strip())
        case "/topk":
            return _change(terminal, "top_k", int, argument.strip())
        case "/tokens":
            return _change(terminal, "max_tokens", int, argument.strip())
    raise ValueError(
        f"there is no command {name}; /help lists them (to say it, put a space before it)"
    )


def _change(terminal: Terminal, name: str, kind: type[int] | type[float], argument: str) -> str:
    if argument:
        try:
            changed: dict[str, Any] = {name: kind(argument)}
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise ValueError(f"{argument} is not {what}; nothing was changed") from None
        terminal.settings = replace(terminal.settings, **changed)
    return f"{name} is {getattr(terminal.settings, name)}"
