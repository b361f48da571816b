"""Times tokenizer training: our rustbpe, the rustbpe of PyPI and Hugging Face tokenizers.

    python scripts/bench_tokenizer.py --dataset ~/my/shards
    python scripts/bench_tokenizer.py --contestants ours ours_iter --max-chars 10000000

Each contestant runs in a process of its own, on the same training shards, documents, pattern and
number of threads; seconds include reading the text, peak memory is that of the whole process.
`ours` reads the Parquet files itself; `ours_iter` reads the same Python iterator as the others. The
last line is one JSON object. The opponents belong to the development group; the figures of one that
is not installed are null.
"""

import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

ALONE = "--alone"
if sys.argv[1:2] != [ALONE]:  # a contestant's process must not hold the memory of other modules
    from nanochat_jax.cli import run_script
    from nanochat_jax.config import parse
    from nanochat_jax.data.shards import DocumentBlocks, Shards, list_shards
    from nanochat_jax.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

type Contestant = Literal["ours", "ours_iter", "rustbpe", "hf"]
CONTESTANTS: tuple[Contestant, ...] = ("ours", "ours_iter", "rustbpe", "hf")
TITLES = {
    "ours": "ours, Parquet",
    "ours_iter": "ours, iterator",
    "rustbpe": "rustbpe 0.1.0",
    "hf": "HF tokenizers",
}
PACKAGES = {"rustbpe": "rustbpe", "hf": "tokenizers"}  # of the development group


@dataclass(frozen=True)
class BenchTokenizerConfig:
    """Tokenizer benchmark."""

    dataset: str = "climbmix"
    """climbmix, fineweb-edu, local, or a folder of Parquet shards."""
    vocab_size: int = 32768
    """Tokens, the nine special ones included."""
    max_chars: int = 2_000_000_000
    """Characters to train on, at most."""
    doc_cap: int = 10_000
    """Characters of a document to train on."""
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    """Threads of each contestant."""
    contestants: tuple[Contestant, ...] = CONTESTANTS
    """Who takes part."""


# --- one contestant, in its own process -----------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """What a contestant trains on; `tokens` is the vocabulary without special tokens."""

    paths: list[str]
    pattern: str
    tokens: int
    doc_cap: int
    max_chars: int
    threads: int


def documents(workload: Workload) -> Iterator[str]:
    """The capped documents of the training shards, one row group in memory at a time."""
    import pyarrow.parquet as pq

    chars = 0
    for path in workload.paths:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                for text in file.read_row_group(group, columns=["text"])["text"].to_pylist():
                    yield text[: workload.doc_cap]
                    chars += min(len(text), workload.doc_cap)
                    if chars > workload.max_chars:
                        return


def train_ours(workload: Workload, texts: Iterator[str] | None = None) -> list[bytes]:
    from nanochat_jax import _rustbpe

    trained = _rustbpe.train(
        texts,
        [] if texts else [Path(path) for path in workload.paths],
        column="text",
        pattern=workload.pattern,
        vocab_size=workload.tokens,
        doc_cap=workload.doc_cap,
        max_chars=workload.max_chars,
        threads=workload.threads,
        progress=None,
    )
    return trained["ranks"]


def train_rustbpe(workload: Workload) -> list[bytes]:
    # Not an import statement: the crate's folder of the same name confuses the linters.
    tokenizer = import_module("rustbpe").Tokenizer()
    tokenizer.train_from_iterator(documents(workload), workload.tokens, pattern=workload.pattern)
    ranks = sorted(tokenizer.get_mergeable_ranks(), key=lambda item: item[1])
    return [bytes(token) for token, _ in ranks]


def train_hf(workload: Workload) -> list[bytes]:
    """It breaks ties differently, so its merges differ; only time and memory are compared."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(workload.pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=workload.tokens,
        min_frequency=0,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(documents(workload), trainer)
    return [token.encode() for token in tokenizer.get_vocab()]


TRAINERS: dict[str, Callable[[Workload], list[bytes]]] = {
    "ours": train_ours,
    "ours_iter": lambda workload: train_ours(workload, documents(workload)),
    "rustbpe": train_rustbpe,
    "hf": train_hf,
}


def run_alone(name: str, workload: Workload) -> dict[str, Any]:
    start, cpu_start = time.perf_counter(), time.process_time()
    ranks = TRAINERS[name](workload)
    return {
        "s": time.perf_counter() - start,
        "cpu_s": time.process_time() - cpu_start,
        "peak_mib": peak_mib(),
        "tokens": len(ranks),
        "digest": hashlib.sha256(repr(ranks).encode()).hexdigest(),
    }


def peak_mib() -> float:
    """This process's high-water mark; getrusage alone would count the parent's before the exec."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux: bytes on macOS
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


# --- all of them ----------------------------------------------------------------------------------


def start_alone(name: str, workload: Workload) -> dict[str, Any]:
    """Runs this script again as one contestant; its stderr is passed through."""
    threads = {"RAYON_NUM_THREADS": str(workload.threads), "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(
        [sys.executable, __file__, ALONE, name, json.dumps(asdict(workload))],
        env=os.environ | threads,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ValueError(f"{TITLES[name]} failed, see above")
    return json.loads(done.stdout.splitlines()[-1])


def encode_mb_s(tokenizer: "Tokenizer", shards: "Shards", threads: int) -> float:
    """Megabytes of validation text encoded per second, on all threads."""
    texts = DocumentBlocks(shards.val)[0]
    tokenizer.encode_batch(texts[:10], threads=threads)
    start = time.perf_counter()
    tokenizer.encode_batch(texts, prepend_bos=True, threads=threads)
    seconds = time.perf_counter() - start
    return sum(len(text.encode()) for text in texts) / 1e6 / seconds


def is_installed(name: str) -> bool:
    try:
        return name not in PACKAGES or bool(version(PACKAGES[name]))
    except PackageNotFoundError:
        return False


def summary(results: Mapping[str, dict[str, Any] | None]) -> dict[str, Any]:
    """{contestant}_s, _cpu_s and _peak_mib of all, and whether the merges are the same."""
    there = {name: result for name, result in results.items() if result is not None}
    line: dict[str, Any] = {
        f"{name}_{key}": round(there[name][key], 3) if name in there else None
        for name in results
        for key in ("s", "cpu_s", "peak_mib")
    }
    digests = [result["digest"] for name, result in there.items() if name != "hf"]
    line["identical_merges"] = len(set(digests)) == 1 if len(digests) > 1 else None
    if {"ours", "rustbpe"} <= there.keys():
        line["speedup"] = round(there["rustbpe"]["s"] / there["ours"]["s"], 2)
    return line


def main() -> None:
    config = parse(BenchTokenizerConfig, "bench_tokenizer", description=__doc__)
    shards = list_shards(config.dataset)
    workload = Workload(
        paths=[str(path) for path in shards.train],
        pattern=SPLIT_PATTERN,
        tokens=config.vocab_size - len(SPECIAL_TOKENS),
        doc_cap=config.doc_cap,
        max_chars=config.max_chars,
        threads=config.threads,
    )
    results: dict[str, dict[str, Any] | None] = {}
    for name in config.contestants:
        result = results[name] = start_alone(name, workload) if is_installed(name) else None
        if result is None:
            print(f"{TITLES[name]:15} is not installed")
            continue
        print(
            f"{TITLES[name]:15} {result['s']:7.2f} s  {result['cpu_s']:7.2f} s of CPU  "
            f"{result['peak_mib']:7.1f} MiB",
            flush=True,
        )
    tokenizer = Tokenizer(train_ours(workload))
    about = {
        "encode_mb_s": round(encode_mb_s(tokenizer, shards, config.threads), 2),
        "threads": config.threads,
        "vocab_size": tokenizer.vocab_size,
        "max_chars": config.max_chars,
    }
    print(json.dumps(summary(results) | about))


if __name__ == "__main__":
    if sys.argv[1:2] == [ALONE]:
        print(json.dumps(run_alone(sys.argv[2], Workload(**json.loads(sys.argv[3])))))
        sys.exit()
    run_script(main)
