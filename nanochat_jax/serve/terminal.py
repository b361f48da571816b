"""A conversation in the terminal: asks the scheduler in its own thread and prints as it comes."""

import queue
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any, Self

from nanochat_jax.checkpoint import LoadedModel
from nanochat_jax.engine.requests import Event, Finished, Request
from nanochat_jax.engine.sampling import Sampling
from nanochat_jax.engine.scheduler import Scheduler
from nanochat_jax.serve.text import AnswerReader, TextPiece, chat_prompt, prompt_format, stop_ids

GREETING = {
    "chat": "{run}, step {step}. Ask something; /help lists commands, Ctrl-D leaves.",
    "base": "{run}, step {step}: a model that has only been pretrained. It does not answer, it "
    "goes on with what you write. /help lists commands, Ctrl-D leaves.",
}
HELP = """\
/temperature X   how surprising answers may be; 0 takes the likeliest token
/topk K          draw among the K likeliest tokens; 0: all
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
    """How answers are drawn; a seed of None is another one every time.

    ValueError for a setting outside its range.
    """

    temperature: float = 0.6
    top_k: int = 50
    max_tokens: int = 512
    seed: int | None = None

    def __post_init__(self) -> None:
        self.sampling()
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {self.max_tokens}")

    def sampling(self) -> Sampling:
        seed = secrets.randbits(63) if self.seed is None else self.seed
        return Sampling(temperature=self.temperature, top_k=self.top_k, seed=seed)


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
        """Prints the answer and remembers both; what no longer fits is forgotten and told of.

        Ctrl-C ends the answer and keeps what there is of it. ValueError for a text too long.
        """
        context = self.scheduler.engine.capacity
        wanted = min(self.settings.max_tokens, context // 4)
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = chat_prompt(self.model.tokenizer, self.prompt_format, messages, context - wanted)
        if prompt.dropped:
            print(f"(The oldest {prompt.dropped} messages no longer fit and are forgotten.)")
        request = Request(
            prompt.ids,
            max_new_tokens=min(self.settings.max_tokens, context - len(prompt.ids)),
            sampling=self.settings.sampling(),
            stop_ids=stop_ids(self.model.tokenizer, self.prompt_format),
            use_tools=self.prompt_format == "chat",
        )
        parts = self._print_answer(request)
        self.messages = [*messages[prompt.dropped :], {"role": "assistant", "content": parts}]

    def _print_answer(self, request: Request) -> list[dict[str, str]]:
        events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
        ticket = self.scheduler.submit(request, events.put)
        reader = AnswerReader(self.model.tokenizer)
        printer = Printer()
        with on_interrupt(lambda: self.scheduler.cancel(ticket)):
            while True:
                for event in events.get():
                    if isinstance(event, Finished):
                        printer.show(reader.finish())
                        printer.end(_REMARKS.get(event.reason, ""))
                        return printer.parts
                    printer.show(reader.add(event))


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


class Printer:
    """Prints pieces as they come, tool calls in brackets, and keeps them as a message's parts."""

    def __init__(self) -> None:
        self.parts: list[dict[str, str]] = []

    def show(self, pieces: list[TextPiece]) -> None:
        for piece in pieces:
            if piece.text:
                self._begin(piece.type)
                self.parts[-1]["text"] += piece.text
                self._write(piece.text.translate(_SHOWN))

    def end(self, remark: str) -> None:
        self._close()
        print(remark, flush=True)

    def _begin(self, kind: str) -> None:
        if not self.parts or self.parts[-1]["type"] != kind:
            self._close()
            self.parts.append({"type": kind, "text": ""})
            self._write(_OPENING[kind])

    def _close(self) -> None:
        if self.parts:
            self._write(_CLOSING[self.parts[-1]["type"]])

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


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
    if name.lower() not in COMMANDS:
        raise ValueError(
            f"there is no command {name}; /help lists them (to say it, put a space before it)"
        )
    return COMMANDS[name.lower()](terminal, argument.strip())


def _setter(name: str, kind: type[int] | type[float]) -> Callable[[Terminal, str], str]:
    def change(terminal: Terminal, argument: str) -> str:
        if argument:
            changed: dict[str, Any] = {name: _number(argument, kind)}
            terminal.settings = replace(terminal.settings, **changed)
        return f"{name} is {getattr(terminal.settings, name)}"

    return change


def _number(text: str, kind: type[int] | type[float]) -> int | float:
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"{text} is not {what}; nothing was changed") from None


def _clear(terminal: Terminal, argument: str) -> str:
    terminal.messages.clear()
    return "a new conversation"


def _help(terminal: Terminal, argument: str) -> str:
    return HELP


COMMANDS: dict[str, Callable[[Terminal, str], str]] = {
    "/temperature": _setter("temperature", float),
    "/topk": _setter("top_k", int),
    "/tokens": _setter("max_tokens", int),
    "/clear": _clear,
    "/help": _help,
}
