"""Compares a tokenizer with those of GPT-2 and GPT-4: bytes per token on several kinds of text.

    python scripts/tok_eval.py
    python scripts/tok_eval.py --name mine --dataset ~/my/shards

Prints a table and writes it as tok_eval.md beside the tokenizer. The GPT tokenizers come from
tiktoken's cache (TIKTOKEN_CACHE_DIR) or the network; columns of one that does not load say so.
"""

from dataclasses import dataclass

from nanochat_jax.cli import run_script
from nanochat_jax.config import parse
from nanochat_jax.data.shards import list_shards
from nanochat_jax.evals.compression import (
    compare,
    corpus_texts,
    gpt_encoders,
    report,
    sample_texts,
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


def main() -> None:
    config = parse(TokEvalConfig, "tok_eval", description=__doc__)
    folder = tokenizer_folder(config.name)
    tokenizer = Tokenizer.load(folder)
    texts = sample_texts() | corpus_texts(list_shards(config.dataset))
    others = gpt_encoders(config.timeout)
    about = (
        f"{tokenizer.vocab_size:,} tokens, trained on {tokenizer.provenance.get('chars', 0):,} "
        f"characters; corpus text of {config.dataset}."
    )
    section = report(compare(texts, tokenizer.encode, others), tokenizer, about)
    print(section)
    path = folder / "tok_eval.md"
    path.write_text(section, encoding="utf-8")
    missing = [name for name, encode in others.items() if encode is None]
    if missing:
        print(
            f"not available: {', '.join(missing)}; tiktoken downloads them once, or finds them in"
        )
        print("the folder that TIKTOKEN_CACHE_DIR names")
    print(f"written to {path}")


if __name__ == "__main__":
    run_script(main)
