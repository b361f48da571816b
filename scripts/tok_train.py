"""Trains a tokenizer: byte-level BPE, learned in Rust from the training shards of a data set.

    python scripts/tok_train.py                                  # 2026: climbmix, 32,768 tokens
    python scripts/tok_train.py --dataset fineweb-edu --vocab-size 65536         # 2025
    python scripts/tok_train.py --dataset ~/my/shards --name mine --max-chars 100000000

Writes tokenizer/NAME below the base directory (a rank file and a description). The validation shard
is never trained on. Get the data first, with scripts/download.py.
"""

import time
from dataclasses import dataclass

from nanochat_jax.cli import progress_bar, run_script
from nanochat_jax.config import parse
from nanochat_jax.data.reader import read_documents
from nanochat_jax.data.shards import DocumentBlocks, list_shards
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


def main() -> None:
    config = parse(TokTrainConfig, "tok_train", description=__doc__)
    shards = list_shards(config.dataset)
    start = time.perf_counter()
    with progress_bar("counting chunks, then merging pairs") as show:
        tokenizer = Tokenizer.train(
            (text for path in shards.train for text in read_documents(path) if text),
            files=[path.name for path in shards.train],
            vocab_size=config.vocab_size,
            doc_cap=config.doc_cap,
            max_chars=config.max_chars,
            threads=config.threads,
            progress=lambda phase, done, total: show(done, total),
        )
    seconds = time.perf_counter() - start
    if tokenizer.vocab_size < config.vocab_size:
        raise ValueError(
            f"this text is enough for {tokenizer.vocab_size} tokens, not {config.vocab_size}; "
            "use a smaller --vocab-size or more text"
        )
    folder = tokenizer_folder(config.name)
    tokenizer.save(folder)
    documents = DocumentBlocks(shards.val)[0]
    tokens = sum(map(len, tokenizer.encode_batch(documents)))
    made = tokenizer.provenance
    print(
        f"{folder}: {tokenizer.vocab_size:,} tokens from {made['chars']:,} characters "
        f"({made['documents']:,} documents, {made['distinct_chunks']:,} distinct chunks) "
        f"in {seconds:.1f} s; {sum(map(len, documents)) / max(tokens, 1):.2f} characters per token "
        "of validation text"
    )


if __name__ == "__main__":
    run_script(main, "interrupted; nothing was written")
