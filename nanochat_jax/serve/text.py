"""Between text and tokens: the prompt of a model, and the text of the tokens that it generates.

The server and the terminal share this. A model that has only been pretrained ("base") continues a
text; one that was trained on conversations ("chat") answers the last message.
"""

import codecs
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal, NamedTuple

from nanochat_jax.engine.requests import Request, Token, stop_ids
from nanochat_jax.engine.sampling import SamplingParams
from nanochat_jax.tokenizer import Tokenizer

type PromptFormat = Literal["base", "chat"]

# What a special token begins or ends: the type of the text that follows it.
PART_AFTER = {
    "<|python_start|>": "python",
    "<|python_end|>": "text",
    "<|output_start|>": "python_output",
    "<|output_end|>": "text",
}


def prompt_format(meta: Mapping[str, Any]) -> PromptFormat:
    """How the model of a checkpoint is prompted, which follows from the stage that trained it."""
    return "base" if meta.get("stage", "pretrain") == "pretrain" else "chat"


# --- prompts --------------------------------------------------------------------------------------


class Prompt(NamedTuple):
    """Token ids, and how many of the oldest messages found no room."""

    ids: list[int]
    dropped: int


class TooLong(ValueError):
    """The last message alone does not fit."""


def chat_request(
    tokenizer: Tokenizer,
    format: PromptFormat,
    messages: Sequence[Mapping[str, Any]],
    *,
    context: int,
    max_tokens: int,
    sampling: SamplingParams,
    n: int = 1,
    top_logprobs: int = 0,
) -> tuple[Request, int]:
    """The request for an answer to the last message, and how many of the oldest are left out.

    `messages` are as in Tokenizer.render_conversation; the prompt leaves at least a quarter of the
    context to the answer. Errors as in chat_prompt.
    """
    prompt = chat_prompt(tokenizer, format, messages, context - min(max_tokens, context // 4))
    request = Request(
        prompt.ids,
        max_new_tokens=min(max_tokens, context - len(prompt.ids)),
        sampling=sampling,
        n=n,
        stop_ids=stop_ids(tokenizer, chat=format == "chat"),
        top_logprobs=top_logprobs,
        use_tools=format == "chat",
    )
    return request, prompt.dropped


def chat_prompt(
    tokenizer: Tokenizer, format: PromptFormat, messages: Sequence[Mapping[str, Any]], room: int
) -> Prompt:
    """The prompt of at most `room` tokens that asks for an answer to the last message.

    Where the messages are too long the oldest turns are left out. In a chat, TooLong when the last
    message has no room even alone, and ValueError for messages that are no conversation.
    """
    make = _chat_ids if format == "chat" else _document_ids
    return make(tokenizer, messages, room)


def _chat_ids(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], room: int) -> Prompt:
    system = [m["content"] for m in messages[:1] if m["role"] == "system"]
    question = plain_text(messages[-1]["content"]) if messages else ""
    length = len(tokenizer.encode("\n\n".join([*system, question]))) + 4
    if length > room:
        raise TooLong(
            f"the last message is too long: with what must stand around it, it is {length} tokens, "
            f"and this model has room for {room} beside its answer"
        )
    ids = tokenizer.render_prompt({"messages": list(messages)}, room)
    starts = {tokenizer.special_id(f"<|{role}_start|>") for role in ("user", "assistant")}
    kept = sum(i in starts for i in ids) - 1  # the last one asks for the answer
    return Prompt(ids, len(messages) - len(system) - kept)


def _document_ids(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], room: int) -> Prompt:
    """All texts as one document, of which the end is kept, also of a single message.

    The assistant's messages continue what stands before them; every other one is a paragraph.
    """
    texts = [plain_text(message["content"]) for message in messages]
    for index, message in enumerate(messages):
        if index and message["role"] != "assistant":
            texts[index] = "\n\n" + texts[index]
    ids = tokenizer.encode("".join(texts))
    cut = max(len(ids) - (room - 1), 0)
    ends = accumulate(len(text.encode(errors="replace")) for text in texts)
    missing = len(tokenizer.decode_bytes(ids[:cut]))  # bytes
    begins = [0, *ends][: len(texts) - 1]  # of all but the last
    return Prompt([tokenizer.bos_id, *ids[cut:]], sum(begin < missing for begin in begins))


def plain_text(content: str | Sequence[Mapping[str, str]]) -> str:
    """The text of a message without its tool calls."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


# --- answers --------------------------------------------------------------------------------------


class PlacedToken(NamedTuple):
    """A token of an answer, and where in the answer's text it begins."""

    token: Token
    offset: int  # characters (code points) before the one that the token's first byte belongs to


class TextPiece(NamedTuple):
    """Some text of one part of an answer, and the tokens that it came from."""

    type: str
    text: str
    tokens: tuple[PlacedToken, ...]


def merge(pieces: Iterable[TextPiece]) -> list[TextPiece]:
    """Neighbours of one type as one piece."""
    merged: list[TextPiece] = []
    for piece in pieces:
        if merged and merged[-1].type == piece.type:
            last = merged.pop()
            piece = TextPiece(piece.type, last.text + piece.text, last.tokens + piece.tokens)
        merged.append(piece)
    return merged


def parts_of(pieces: Iterable[TextPiece]) -> list[dict[str, str]]:
    """The parts of the message that consists of these pieces."""
    merged = merge(piece for piece in pieces if piece.text)
    return [{"type": piece.type, "text": piece.text} for piece in merged]


class AnswerReader:
    """Turns the tokens of one sample into pieces of text, as soon as they are certain.

    Never cuts a character: bytes that do not make one yet wait, and become U+FFFD if they never do.
    Text is cut before the first of the strings in `stop`, wherever the borders of the tokens are;
    what could begin one waits. After that `stopped` is true and tokens are ignored.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._parts = {tokenizer.special_id(name): part for name, part in PART_AFTER.items()}
        self._first_special = len(tokenizer.ranks)
        self._stop = tuple(stop)
        self._type = "text"
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._waiting = ""  # decoded, not yet given out
        self._tokens: list[PlacedToken] = []  # likewise
        self._given = 0  # characters that were
        self.stopped = False

    def add(self, token: Token) -> list[TextPiece]:
        """What can be shown now that the sample has one more token."""
        if self.stopped:
            return []
        ends_part = token.id in self._parts
        data = self._tokenizer.ranks[token.id] if token.id < self._first_special else b""
        self._waiting += self._decoder.decode(data[:1], final=ends_part)
        end = self._given + len(self._waiting)
        # The first byte belongs to the last character so far, unless it waits for others.
        in_last = data and not self._decoder.getstate()[0]
        self._tokens.append(PlacedToken(token, end - 1 if in_last else end))
        self._waiting += self._decoder.decode(data[1:])
        if not ends_part:
            return self._certain()
        pieces = self.finish()
        self._type = self._parts[token.id]
        return pieces

    def finish(self) -> list[TextPiece]:
        """The rest, when the sample has ended."""
        if self.stopped:
            return []
        self._waiting += self._decoder.decode(b"", final=True)  # which also resets it
        pieces = self._certain()
        if not self.stopped and (self._waiting or self._tokens):
            pieces.append(self._give(len(self._waiting), everything=True))
        return pieces

    def _certain(self) -> list[TextPiece]:
        length = len(self._waiting)
        if self._type == "text" and self._stop:
            found = [at for at in map(self._waiting.find, self._stop) if at >= 0]
            self.stopped = bool(found)
            length = min(found) if found else length - self._could_begin_stop()
        return [self._give(length)] if length else []

    def _could_begin_stop(self) -> int:
        """Length of the longest end of the text that is the beginning of a stop string."""
        longest = max(map(len, self._stop)) - 1
        for length in range(min(longest, len(self._waiting)), 0, -1):
            if any(stop.startswith(self._waiting[-length:]) for stop in self._stop):
                return length
        return 0

    def _give(self, length: int, everything: bool = False) -> TextPiece:
        """The first `length` characters that wait, and the tokens that begin within them."""
        text, self._waiting = self._waiting[:length], self._waiting[length:]
        self._given += length
        tokens = tuple(s for s in self._tokens if everything or s.offset < self._given)
        self._tokens = self._tokens[len(tokens) :]
        return TextPiece(self._type, text, tokens)
