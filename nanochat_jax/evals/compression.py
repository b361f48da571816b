"""Bytes of text per token, compared with the tokenizers of GPT-2 and GPT-4.

More bytes per token make shorter rows of the same text. The sample texts in tokenizer_texts/ were
written for this; training and validation text comes from a data set.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from importlib.resources import files
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import tiktoken

from nanochat_jax.data.shards import DocumentBlocks, Shards
from nanochat_jax.tokenizer import Tokenizer

SAMPLES = {
    "news": "news.txt",
    "Korean": "korean.txt",
    "code": "code.txt",
    "LaTeX maths": "maths.txt",
    "science": "science.txt",
}
GPT_ENCODINGS = {"GPT-2": ("gpt2", 50_257), "GPT-4": ("cl100k_base", 100_277)}
CORPUS_CHARS = 1_000_000  # of training and of validation text
TITLE = "Bytes per token, and our number of tokens compared with the others'"
NOT_AVAILABLE = "not available"

type Encode = Callable[[str], list[int]]


class TokenCounts(NamedTuple):
    """A text's size in bytes and its number of tokens, ours and by each available tokenizer."""

    name: str
    n_bytes: int
    tokens: int
    others: dict[str, int]

    def bytes_per_token(self, other: str | None = None) -> float:
        return self.n_bytes / (self.tokens if other is None else self.others[other])

    def difference(self, other: str) -> float:
        """By how much our tokens are more than the other's: -0.1 means a tenth fewer."""
        return self.tokens / self.others[other] - 1


def sample_texts() -> dict[str, str]:
    """The texts that come with the package, by kind."""
    folder = files("nanochat_jax.evals") / "tokenizer_texts"
    return {kind: (folder / name).read_text(encoding="utf-8") for kind, name in SAMPLES.items()}


def corpus_texts(shards: Shards, chars: int = CORPUS_CHARS) -> dict[str, str]:
    """The first documents of the training and of the validation shards, `chars` of each."""
    return {
        "training text": _beginning(shards.train, chars),
        "validation text": _beginning(shards.val, chars),
    }


def _beginning(paths: Sequence[Path], chars: int) -> str:
    blocks = DocumentBlocks(paths[:1])
    documents = (text for index in range(len(blocks)) for text in blocks[index])
    taken: list[str] = []
    room = chars
    for document in documents:
        taken.append(document[:room])
        room -= len(taken[-1])
        if room <= 0:
            break
    return "\n".join(taken)


def gpt_encoders(timeout_s: float = 10.0) -> dict[str, Encode | None]:
    """GPT-2's and GPT-4's tokenizers from tiktoken: its cache (TIKTOKEN_CACHE_DIR) or the network.

    None for one that does not load within `timeout_s` seconds.
    """
    loading = {name: _load_in_thread(encoding) for name, (encoding, _) in GPT_ENCODINGS.items()}
    encoders: dict[str, Encode | None] = {}
    for name, future in loading.items():
        try:
            encoders[name] = future.result(timeout_s).encode_ordinary
        except Exception:  # tiktoken lets through whatever its downloader and parsers raise
            encoders[name] = None
            timeout_s = min(timeout_s, 1.0)
    return encoders


def _load_in_thread(encoding: str) -> Future[tiktoken.Encoding]:
    """Loads in a daemon thread: a download may hang for minutes."""
    future: Future[tiktoken.Encoding] = Future()

    def load() -> None:
        try:
            future.set_result(tiktoken.get_encoding(encoding))
        except Exception as error:
            future.set_exception(error)

    Thread(target=load, daemon=True).start()
    return future


def compare(
    texts: Mapping[str, str], encode: Encode, others: Mapping[str, Encode | None]
) -> list[TokenCounts]:
    """Counts bytes and tokens of every text; empty texts are left out."""
    return [
        TokenCounts(
            name,
            len(text.encode()),
            len(encode(text)),
            {other: len(count(text)) for other, count in others.items() if count is not None},
        )
        for name, text in texts.items()
        if text
    ]


def report(rows: Sequence[TokenCounts], tokenizer: Tokenizer, about: str) -> str:
    """A section of Markdown: `about`, then the table, its columns aligned for a terminal, too."""
    heads = ["text", "bytes", "tokens", f"ours ({tokenizer.vocab_size:,})"]
    for other, (_, vocab_size) in GPT_ENCODINGS.items():
        heads += [f"{other} ({vocab_size:,})", f"tokens vs {other}"]
    lines = [heads]
    for row in rows:
        line = [row.name, f"{row.n_bytes:,}", f"{row.tokens:,}", f"{row.bytes_per_token():.2f}"]
        for other in GPT_ENCODINGS:
            if other in row.others:
                line += [f"{row.bytes_per_token(other):.2f}", f"{row.difference(other):+.1%}"]
            else:
                line += [NOT_AVAILABLE, ""]
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    table = [
        f"| {first.ljust(widths[0])} | {' | '.join(map(str.rjust, cells, widths[1:]))} |"
        for first, *cells in (heads, rule, *lines[1:])
    ]
    return "\n".join(["## Tokenizer", "", f"{about} {TITLE}.", "", *table, ""])
