"""How many bytes of text a token holds, beside the tokenizers of GPT-2 and GPT-4.

More bytes a token means shorter rows for the same text. The sample texts in tokenizer_texts/ were
written for this; training and validation text comes from a data set.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from importlib.resources import files
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import tiktoken
from rich.table import Table

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
TITLE = "Bytes per token, and our number of tokens beside the others'"
NOT_AVAILABLE = "not available"

type Encode = Callable[[str], list[int]]


class TokenCounts(NamedTuple):
    """One text: its size, our tokens, and those of each other tokenizer that is there."""

    name: str
    n_bytes: int
    tokens: int
    others: dict[str, int]

    def bytes_per_token(self, other: str | None = None) -> float:
        return self.n_bytes / (self.tokens if other is None else self.others[other])

    def difference(self, other: str) -> float:
        """Our tokens beside the other's, as a share of those: -0.1 is a tenth fewer."""
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
    """GPT-2's and GPT-4's tokenizers by tiktoken: from its cache, else from the network.

    None for one that has not come within `timeout_s` seconds; TIKTOKEN_CACHE_DIR names the cache.
    """
    loading = {name: _load_aside(encoding) for name, (encoding, _) in GPT_ENCODINGS.items()}
    encoders: dict[str, Encode | None] = {}
    for name, future in loading.items():
        try:
            encoders[name] = future.result(timeout_s).encode_ordinary
        except Exception:  # tiktoken lets through whatever its downloader and parsers raise
            encoders[name] = None
            timeout_s = min(timeout_s, 1.0)
    return encoders


def _load_aside(encoding: str) -> Future[tiktoken.Encoding]:
    """Loads in a thread that nobody waits for at the end: a download may hang for minutes."""
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


def report_cells(
    rows: Sequence[TokenCounts], tokenizer: Tokenizer
) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the report, the same for the terminal and for Markdown."""
    heads = ["text", "bytes", "tokens", f"ours ({tokenizer.vocab_size:,})"]
    for other, (_, vocab_size) in GPT_ENCODINGS.items():
        heads += [f"{other} ({vocab_size:,})", f"tokens vs {other}"]
    lines = []
    for row in rows:
        line = [row.name, f"{row.n_bytes:,}", f"{row.tokens:,}", f"{row.bytes_per_token():.2f}"]
        for other in GPT_ENCODINGS:
            if other in row.others:
                line += [f"{row.bytes_per_token(other):.2f}", f"{row.difference(other):+.1%}"]
            else:
                line += [NOT_AVAILABLE, ""]
        lines.append(line)
    return heads, lines


def terminal_table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    table = Table(title=TITLE)
    for index, head in enumerate(heads):
        table.add_column(head, justify="right" if index else "left")
    for line in lines:
        table.add_row(*line)
    return table


def markdown_section(heads: Sequence[str], lines: Sequence[Sequence[str]], about: str) -> str:
    """A section of the report: `about`, then the table."""
    rule = ["---", *("---:" for _ in islice(heads, 1, None))]
    rows = [f"| {' | '.join(cells)} |" for cells in (heads, rule, *lines)]
    return "\n".join(["## Tokenizer", "", f"{about} {TITLE}.", "", *rows, ""])
