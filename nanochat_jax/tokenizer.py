"""Text to token ids and back: training, saving, encoding, and conversations with their masks.

Byte-level BPE with a regex split. The merges are learned in Rust (rustbpe/); tiktoken encodes. On
disk a tokenizer is a folder of two text files: tokenizer.tiktoken, the rank file that tiktoken
reads, and tokenizer.json with the split pattern, the special tokens, what it was trained on, and
the checksums by which `load` notices that one of the two has changed.
"""

import base64
import binascii
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tiktoken

from nanochat_jax import _rustbpe
from nanochat_jax.config import named_folder, write_atomically

# They take the last ids, in this order. All but the first occur only in conversations.
SPECIAL_TOKENS: tuple[str, ...] = (
    "<|bos|>",  # at the beginning of every document
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",  # around the assistant's call of the calculator
    "<|python_end|>",
    "<|output_start|>",  # around the calculator's output
    "<|output_end|>",
)

# GPT-4's pattern except for {1,2}: a small vocabulary should spend fewer tokens on numbers.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

RANK_FILE = "tokenizer.tiktoken"
DESCRIPTION_FILE = "tokenizer.json"

# tiktoken's regex engine panics on a run of a million spaces.
MAX_SPACE = 50_000
LONG_SPACE = re.compile(rf"(?<!\s)\s{{{MAX_SPACE},}}+")


class ConversationError(ValueError):
    """A conversation that has no form in the chat format."""


log = logging.getLogger(__name__)

type TrainProgress = Callable[[str, int, int], object]


def tokenizer_folder(name: str | Path) -> Path:
    """The folder of a tokenizer: a name stands for tokenizer/<name> in the base directory."""
    return named_folder("tokenizer", name)


class Tokenizer:
    """A vocabulary: `ranks[i]` are the bytes of token i; the special tokens follow.

    Raises ValueError unless all 256 bytes are among the ranks and none is repeated.
    """

    def __init__(
        self,
        ranks: Sequence[bytes],
        pattern: str = SPLIT_PATTERN,
        special_tokens: Sequence[str] = SPECIAL_TOKENS,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        self.ranks = list(ranks)
        self.pattern = pattern
        self.provenance = dict(provenance or {})
        self._special = {name: len(ranks) + i for i, name in enumerate(special_tokens)}
        by_bytes = {token: rank for rank, token in enumerate(self.ranks)}
        if len(by_bytes) != len(ranks) or any(bytes([byte]) not in by_bytes for byte in range(256)):
            raise ValueError("a rank list needs all 256 bytes and no token twice")
        self._encoding = tiktoken.Encoding(
            "nanochat_jax",
            pat_str=pattern,
            mergeable_ranks=by_bytes,
            special_tokens=self._special,
        )

    # --- training and saving ----------------------------------------------------------------------

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        *,
        vocab_size: int,
        pattern: str = SPLIT_PATTERN,
        doc_cap: int | None = 10_000,
        max_chars: int | None = None,
        threads: int | None = None,
        progress: TrainProgress | None = None,
        files: Sequence[str] = (),
    ) -> "Tokenizer":
        """Learns the merges from `texts`; `files` names where they are from, for the description.

        `vocab_size` includes the special tokens; a corpus too small for it gives fewer. Documents
        are cut to `doc_cap` characters; reading ends after the one that passes `max_chars`.
        `progress` is called about ten times a second with ("count", characters, max_chars or 0),
        then ("merge", done, total). Raises ValueError for input that cannot be trained on.
        """
        if isinstance(texts, str):
            raise ValueError("texts must yield documents, but it is one string")
        _check_limits(vocab_size, doc_cap=doc_cap, max_chars=max_chars, threads=threads)
        trained = _rustbpe.train(
            texts,
            [],
            column="text",
            pattern=pattern,
            vocab_size=vocab_size - len(SPECIAL_TOKENS),
            doc_cap=doc_cap,
            max_chars=max_chars,
            threads=threads,
            progress=progress,
        )
        provenance = {
            "requested_vocab_size": vocab_size,
            "doc_cap": doc_cap,
            "max_chars": max_chars,
            "files": list(files),
            "documents": trained["documents"],
            "chars": trained["chars"],
            "bytes": trained["bytes"],
            "distinct_chunks": trained["chunks"],
        }
        return cls(trained["ranks"], pattern, provenance=provenance)

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Reads what `save` wrote; ValueError names the file that is missing or damaged.

        A folder from before there were checksums is read, and a warning says that it is not
        verified.
        """
        folder = Path(folder)
        description = _read_description(folder / DESCRIPTION_FILE)
        ranks = _read_ranks(folder / RANK_FILE)
        if description["mergeable_tokens"] != len(ranks):
            raise ValueError(
                f"{folder / RANK_FILE} has {len(ranks)} tokens, but {DESCRIPTION_FILE} says "
                f"{description['mergeable_tokens']}: they are not of the same tokenizer"
            )
        _verify(folder, description)
        return cls(
            ranks,
            description["pattern"],
            description["special_tokens"],
            description.get("provenance"),
        )

    def save(self, folder: str | Path) -> None:
        """Writes the two files; the description last, so that a folder that has it is complete."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lines = [
            f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(self.ranks)
        ]
        rank_text = "".join(lines)
        description = {
            "pattern": self.pattern,
            "mergeable_tokens": len(self.ranks),
            "special_tokens": list(self._special),
            "provenance": self.provenance,
            "rank_file_sha256": hashlib.sha256(rank_text.encode()).hexdigest(),
        }
        description["sha256"] = _sha256_of(description)
        write_atomically(folder / RANK_FILE, rank_text)
        write_atomically(folder / DESCRIPTION_FILE, json.dumps(description, indent=2) + "\n")

    # --- encoding ---------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the special ones included."""
        return self._encoding.n_vocab

    @property
    def bos_id(self) -> int:
        return self.special_id("<|bos|>")

    def special_id(self, name: str) -> int:
        """The id of a special token; ValueError names the known ones."""
        try:
            return self._special[name]
        except KeyError:
            known = ", ".join(self._special)
            raise ValueError(f"no special token {name!r}; there are {known}") from None

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text; what looks like a special token is encoded as text, too."""
        return list(chain.from_iterable(map(self._encoding.encode_ordinary, _safe_parts(text))))

    def encode_batch(
        self, texts: Sequence[str], *, prepend_bos: bool = False, threads: int = 8
    ) -> list[list[int]]:
        """`encode` for many texts on several threads, optionally with <|bos|> before each."""
        parts = [_safe_parts(text) for text in texts]
        encoded = iter(
            self._encoding.encode_ordinary_batch(
                [part for text in parts for part in text], num_threads=threads
            )
        )
        opening = [self.bos_id] if prepend_bos else []
        return [[*opening, *chain.from_iterable(islice(encoded, len(text)))] for text in parts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of any ids, special ones as their names; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Raw bytes of any ids; ValueError for an id outside the vocabulary."""
        ids = [int(i) for i in ids]
        outside = [i for i in ids if not 0 <= i < self.vocab_size]
        if outside:
            raise ValueError(
                f"token id {outside[0]} is outside the vocabulary of {self.vocab_size}"
            )
        return self._encoding.decode_bytes(ids)

    def token_bytes(self) -> np.ndarray:
        """The length of each token in bytes, int32 (vocab_size,); 0 for special tokens."""
        lengths = [len(token) for token in self.ranks] + [0] * len(self._special)
        return np.array(lengths, dtype=np.int32)

    # --- conversations ----------------------------------------------------------------------------

    def render_conversation(
        self, conversation: Mapping[str, Any], max_tokens: int = 2048
    ) -> tuple[list[int], list[int]]:
        """Ids of {"messages": […]} and a mask of equal length, 1 where tokens are supervised.

        These are the assistant's text, its calls of Python with their markers, and
        <|assistant_end|>, but not Python's output, and nothing of a message with "weight": 0. Both
        are cut to `max_tokens`. ConversationError
        names the message at fault.
        """
        ids, mask = [self.bos_id], [0]
        for message in _merge_system(*split_system(conversation)):
            is_learned = message.get("weight", 1)
            for piece in self._pieces(message):
                ids += piece.ids
                mask += [piece.is_supervised * is_learned] * len(piece.ids)
        return ids[:max_tokens], mask[:max_tokens]

    def render_for_completion(
        self, conversation: Mapping[str, Any], max_tokens: int = 2048
    ) -> list[int]:
        """The prompt for the last message, which must be the assistant's and is left out."""
        messages = _messages(conversation)
        if not messages or messages[-1]["role"] != "assistant":
            raise ValueError(
                "the last message must be the assistant's, which a completion replaces; "
                "render_prompt is for a conversation that ends with the user"
            )
        return self.render_prompt({**conversation, "messages": messages[:-1]}, max_tokens)

    def render_prompt(self, conversation: Mapping[str, Any], max_tokens: int = 2048) -> list[int]:
        """Ids of a conversation that ends with the user, and <|assistant_start|>.

        If they would be more than `max_tokens`, the oldest turns are left out, question and answer
        together; a system message moves to the oldest question kept. A last question that is too
        long by itself loses its beginning, but not its markers.
        """
        system, messages = split_system(conversation)
        if messages[-1]["role"] != "user":
            raise ValueError("a prompt must end with a message of the user")
        turns = [self._message_ids(message) for message in messages]
        room = max_tokens - 2  # <|bos|> and <|assistant_start|>
        for first in range(0, len(turns), 2):
            if sum(map(len, turns[first:])) > room:
                continue
            opening = self._message_ids(_merge_system(system, messages[first:])[0])
            ids = opening + [i for turn in turns[first + 1 :] for i in turn]
            if len(ids) <= room:
                break
        else:
            ids = self._shortened(_merge_system(system, messages[-1:])[0], room)
        return [self.bos_id, *ids, self.special_id("<|assistant_start|>")]

    def _shortened(self, message: Mapping[str, Any], room: int) -> list[int]:
        start, *text, end = self._message_ids(message)
        if room < 2:
            raise ValueError(f"a prompt of {room + 2} tokens has no room for its markers; allow 4")
        return [start, *text[len(text) - (room - 2) :], end]

    def _message_ids(self, message: Mapping[str, Any]) -> list[int]:
        return [i for piece in self._pieces(message) for i in piece.ids]

    def _pieces(self, message: Mapping[str, Any]) -> list["_Segment"]:
        """A message with its markers, piece by piece."""
        start, end = (self.special_id(f"<|{message['role']}_{side}|>") for side in ("start", "end"))
        if message["role"] == "user":
            return [_Segment([start, *self.encode(message["content"]), end], 0)]
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        return [_Segment([start], 0), *map(self._part, parts), _Segment([end], 1)]

    def _part(self, part: Mapping[str, str]) -> "_Segment":
        ids = self.encode(part["text"])
        if part["type"] == "text":
            return _Segment(ids, 1)
        name, is_supervised = _MARKED_PARTS[part["type"]]
        start, end = (self.special_id(f"<|{name}_{side}|>") for side in ("start", "end"))
        return _Segment([start, *ids, end], is_supervised)


class _Segment(NamedTuple):
    ids: list[int]
    is_supervised: int


# Parts of an assistant's message: the name of their markers, and whether they are supervised.
_MARKED_PARTS = {"python": ("python", 1), "python_output": ("output", 0)}


def _check_limits(vocab_size: int, **limits: int | None) -> None:
    least = 256 + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} "
            f"special tokens already make {least}"
        )
    for name, limit in limits.items():
        if limit is not None and limit < 1:
            raise ValueError(f"{name}={limit} must be positive")


def _safe_parts(text: str) -> list[str]:
    """The text, cut within very long runs of white space: parts that tiktoken can encode."""
    if len(text) < MAX_SPACE:
        return [text]
    runs = LONG_SPACE.finditer(text)
    cuts = [cut for run in runs for cut in range(run.start() + MAX_SPACE, run.end(), MAX_SPACE)]
    return [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]


def split_system(conversation: Mapping[str, Any]) -> tuple[str | None, list[Mapping[str, Any]]]:
    """A leading system message, and the rest, checked to alternate between user and assistant.

    An empty system message is none.
    """
    messages = _messages(conversation)
    system, first = None, 0
    if messages and messages[0]["role"] == "system":
        system, first = messages.pop(0).get("content"), 1
        if not isinstance(system, str):
            raise ConversationError("the content of a system message must be a string")
        system = system if system.strip() else None
    if not messages:
        found = "only a system message" if first else "no message"
        raise ConversationError(f"the conversation has {found}; it needs a message of the user")
    for index, message in enumerate(messages):
        _check_message(message, index % 2 == 0, f"message {index + first}")
    return system, messages


def _messages(conversation: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A copy of the list of messages, each checked to have a role."""
    messages = conversation.get("messages")
    if not isinstance(messages, list | tuple):
        raise ConversationError(
            'a conversation has a list of messages: {"messages": [{"role": "user", …'
        )
    for index, message in enumerate(messages):
        if not (isinstance(message, Mapping) and "role" in message):
            raise ConversationError(f"message {index} has no role")
    return list(messages)


def _check_message(message: Mapping[str, Any], is_users_turn: bool, where: str) -> None:
    expected = "user" if is_users_turn else "assistant"
    role, content = message["role"], message.get("content")
    if role != expected:
        raise ConversationError(f"{where} is the {role}'s where the {expected}'s turn is")
    if message.get("weight", 1) not in (0, 1):
        raise ConversationError(f"{where} has the weight {message['weight']!r}, not 0 or 1")
    if isinstance(content, str):
        return
    if is_users_turn:
        raise ConversationError(f"the content of {where}, the user's, must be a string")
    if not isinstance(content, list):
        kind = type(content).__name__
        raise ConversationError(
            f"the content of {where} must be a string or a list of parts, not {kind}"
        )
    for part in content:
        _check_part(part, where)


def _check_part(part: Any, where: str) -> None:
    if not (isinstance(part, Mapping) and isinstance(part.get("text"), str)):
        raise ConversationError(f"{where} has a part without a text")
    known = ("text", *_MARKED_PARTS)
    if part.get("type") not in known:
        kind = part.get("type")
        raise ConversationError(
            f"{where} has a part of type {kind!r}; known are {', '.join(known)}"
        )


def _merge_system(
    system: str | None, messages: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Puts the system message before the text of the first question, a blank line between."""
    if system is None:
        return list(messages)
    question = {**messages[0], "content": f"{system}\n\n{messages[0]['content']}"}
    return [question, *messages[1:]]


DESCRIBED = {"pattern": str, "mergeable_tokens": int, "special_tokens": list}
ALSO_DESCRIBED = {"provenance": dict, "rank_file_sha256": str, "sha256": str}


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"there is no tokenizer at {path.parent}; train one with scripts/tok_train.py"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    missing = [key for key in DESCRIBED if key not in description]
    if missing:
        raise ValueError(
            f"{path} does not describe a nanochat_jax tokenizer: it lacks {', '.join(missing)}"
        )
    known = DESCRIBED | ALSO_DESCRIBED
    for key, value in description.items():
        if key not in known or not isinstance(value, known[key]):
            raise ValueError(f"{path} is damaged: {key!r} is not what it should be")
    return description


def _sha256_of(description: Mapping[str, Any]) -> str:
    """The checksum of a description, all but the checksum itself."""
    content = {key: value for key, value in description.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _verify(folder: Path, description: Mapping[str, Any]) -> None:
    """Compares the two files of a folder with their checksums, ValueError if one is another."""
    if "sha256" not in description and "rank_file_sha256" not in description:
        log.warning("%s is not verified: it is from before there were checksums", folder)
        return
    found = hashlib.sha256((folder / RANK_FILE).read_bytes()).hexdigest()
    if description.get("sha256") != _sha256_of(description):
        path = folder / DESCRIPTION_FILE
    elif description.get("rank_file_sha256") != found:
        path = folder / RANK_FILE
    else:
        return
    raise ValueError(
        f"{path} is damaged: its checksum is not the one in {DESCRIPTION_FILE}; copy the tokenizer "
        "again, or train it again with scripts/tok_train.py"
    )


def _read_ranks(path: Path) -> list[bytes]:
    """The tokens of a tiktoken rank file, a line `base64 rank` each, ranks 0, 1, 2, …"""
    if not path.is_file():
        raise ValueError(f"the rank file {path} is missing; train the tokenizer again")
    ranks: list[bytes] = []
    text = path.read_text(encoding="utf-8", errors="replace")  # no base64, so refused below
    for number, line in enumerate(text.splitlines()):
        try:
            token, rank = line.split(" ")
            ranks.append(base64.b64decode(token, validate=True))
        except (ValueError, binascii.Error):
            raise ValueError(f"{path} is damaged in line {number + 1}: {line!r}") from None
        if rank != str(number):
            raise ValueError(f"{path} is damaged: line {number + 1} should have rank {number}")
    return ranks
