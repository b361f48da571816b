"""Compares a tokenizer with those of GPT-2 and GPT-4: bytes per token on several kinds of text.

    python scripts/tok_eval.py
    python scripts/tok_eval.py --name mine --dataset ~/my/shards

Prints a table and writes it as tok_eval.md beside the tokenizer. The GPT tokenizers come from
tiktoken's cache (TIKTOKEN_CACHE_DIR) or the network; where they do not, their columns say so.
"""

import sys
from dataclasses import dataclass

from rich.console import Console

from nanochat_jax.config import parse
from nanochat_jax.data.shards import list_shards
from nanochat_jax.evals.compression import (
    compare,
    corpus_texts,
    gpt_encoders,
    markdown_section,
    report_cells,
    sample_texts,
    terminal_table,
)
from nanochat_jax.tokenizer import Tokenizer, tokenizer_folder


@dataclass(frozen=True)
class TokEvalConfig:
    """Tokenizer report."""

    name: str = "default"
    """Which tokenizer: tokenizer/NAME below the base directory, or a folder."""
    dataset: str = "climbmix"
    """climbmix, fineweb-edu, local, or a folder of Parquet shards: its text is measured too."""
    timeout: float = 10.0
    """Seconds to wait for the GPT tokenizers where they have to be downloaded."""


def main(config: TokEvalConfig) -> None:
    folder = tokenizer_folder(config.name)
    tokenizer = Tokenizer.load(folder)
    texts = sample_texts() | corpus_texts(list_shards(config.dataset))
    others = gpt_encoders(config.timeout)
    rows = compare(texts, tokenizer.encode, others)
    heads, lines = report_cells(rows, tokenizer)
    made = tokenizer.provenance
    about = (
        f"{tokenizer.vocab_size:,} tokens, {made.get('chars', 0):,} characters trained on; "
        f"corpus text of {config.dataset}."
    )
    Console().print(terminal_table(heads, lines))
    report = folder / "tok_eval.md"
    report.write_text(markdown_section(heads, lines, about), encoding="utf-8")
    missing = [name for name, encode in others.items() if encode is None]
    if missing:
        print(f"not available: {', '.join(missing)}; tiktoken fetches them once, or finds them in")
        print("the folder that TIKTOKEN_CACHE_DIR names")
    print(f"written to {report}")


if __name__ == "__main__":
    try:
        main(parse(TokEvalConfig, "tok_eval", description=__doc__))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
