"""Trains a tokenizer: byte-level BPE, learned in Rust from the training shards of a data set.

    python scripts/tok_train.py                                  # 2026: climbmix, 32,768 tokens
    python scripts/tok_train.py --dataset fineweb-edu --vocab-size 65536         # 2025
    python scripts/tok_train.py --dataset ~/my/shards --name mine --max-chars 100000000

Writes tokenizer/NAME below the base directory (a rank file and a description). The validation shard
is never trained on. Get the data first, with scripts/download.py.
"""

import sys
import time
from dataclasses import dataclass

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from nanochat_jax.config import parse
from nanochat_jax.data.shards import DocumentBlocks, Shards, list_shards
from nanochat_jax.tokenizer import Tokenizer, tokenizer_folder


@dataclass(frozen=True)
class TokTrainConfig:
    """Tokenizer training."""

    dataset: str = "climbmix"
    """climbmix, fineweb-edu, local, or a folder of Parquet shards."""
    vocab_size: int = 32768
    """Tokens, the nine special ones included."""
    max_chars: int = 2_000_000_000
    """Characters to train on, at most (one document may pass this)."""
    doc_cap: int = 10_000
    """Characters of a document to train on; the rest is ignored."""
    name: str = "default"
    """Where to write: tokenizer/NAME, or a folder."""
    threads: int | None = None
    """Threads that count (one per core)."""


class Bars:
    """The two phases as progress bars; called by the trainer."""

    def __init__(self) -> None:
        self.shown = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
        )
        tasks = {"count": "counting chunks", "merge": "merging pairs"}
        self._tasks = {
            stage: self.shown.add_task(words, total=None, start=False, figures="")
            for stage, words in tasks.items()
        }

    def __call__(self, stage: str, done: int, total: int) -> None:
        task = self._tasks[stage]
        if stage == "merge":  # the counting is over, wherever it ended
            self.shown.update(self._tasks["count"], total=1, completed=1)
        self.shown.start_task(task)
        figures = f"{done / 1e6:,.0f} M chars" if stage == "count" else f"{done:,} merges"
        self.shown.update(task, completed=done, total=total, figures=figures)


def train(config: TokTrainConfig, shards: Shards) -> tuple[Tokenizer, float]:
    bars = Bars()
    start = time.perf_counter()
    with bars.shown:
        tokenizer = Tokenizer.train(
            parquet=shards.train,
            vocab_size=config.vocab_size,
            doc_cap=config.doc_cap,
            max_chars=config.max_chars,
            threads=config.threads,
            progress=bars,
        )
    return tokenizer, time.perf_counter() - start


def chars_per_token(tokenizer: Tokenizer, shards: Shards) -> float:
    """On the first block of validation text."""
    documents = DocumentBlocks(shards.val)[0]
    tokens = sum(map(len, tokenizer.encode_batch(documents)))
    return sum(map(len, documents)) / max(tokens, 1)


def main(config: TokTrainConfig) -> None:
    shards = list_shards(config.dataset)
    tokenizer, seconds = train(config, shards)
    if tokenizer.vocab_size < config.vocab_size:
        raise ValueError(
            f"this text is enough for {tokenizer.vocab_size} tokens, not {config.vocab_size}; "
            "use a smaller --vocab-size or more text"
        )
    folder = tokenizer_folder(config.name)
    tokenizer.save(folder)
    made = tokenizer.provenance
    print(
        f"{folder}: {tokenizer.vocab_size:,} tokens from {made['chars']:,} characters "
        f"({made['documents']:,} documents, {made['distinct_chunks']:,} distinct chunks) "
        f"in {seconds:.1f} s; {chars_per_token(tokenizer, shards):.2f} characters per token "
        "of validation text"
    )


if __name__ == "__main__":
    try:
        main(parse(TokTrainConfig, "tok_train", description=__doc__))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing was written")
