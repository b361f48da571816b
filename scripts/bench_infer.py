"""Measures the engine: time to the first token, time per token, throughput, memory bandwidth.

    python scripts/bench_infer.py                                    # a small model, any machine
    python scripts/bench_infer.py --depth 24 --max-seq-len 2048 --prompt-tokens 512   # one GPU
    python scripts/bench_infer.py --run cpu --batch-sizes 1          # a trained model

Random weights and prompts unless --run names a run; no row stops before --new-tokens. Each row of
the table is one batch size: all rows are prefilled one after the other, then decode together in the
loop on the device. "loop over step" compares, at the first batch size, that loop with the same
engine called for one token at a time, as a loop in Python would: same program, same tokens, one
round trip to the host per token. The runs of both alternate; the fastest of each counts. The last
line is one JSON object.
"""

import json
import math
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from nanochat_jax.checkpoint import load_model
from nanochat_jax.cli import run_script
from nanochat_jax.config import parse
from nanochat_jax.devices import find_device
from nanochat_jax.distributed import provenance, start
from nanochat_jax.engine.decode import DecodeInputs
from nanochat_jax.engine.engine import Chunk, Engine, make_engine
from nanochat_jax.engine.sampling import SamplingParams
from nanochat_jax.gpt import GPT, Params, compute_dtype, init_params
from nanochat_jax.runs import run_folder
from nanochat_jax.scaling import plan


@dataclass(frozen=True)
class BenchInferConfig:
    """What to measure."""

    run: str = ""
    """A trained run instead of random weights; depth to max-seq-len then come from it."""
    depth: int = 2
    """Number of layers. The round trip to the host costs the same for every model: the larger the
    model, the less it matters."""
    recipe: Literal["2025", "2026"] = "2026"
    """Which nanochat."""
    vocab_size: int = 4096
    """Tokens in the vocabulary."""
    max_seq_len: int = 256
    """Context: tokens that a row has room for."""
    prompt_tokens: int = 64
    """Tokens of every prompt."""
    new_tokens: int = 128
    """Tokens sampled for every row, in one call of the loop."""
    batch_sizes: str = "1,8,32,128"
    """Rows decoded together, separated by commas."""
    temperature: float = 0.8
    """0 takes the most likely token."""
    top_k: int = 50
    """Sample among the k most likely tokens; 0: all."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type."""
    repeats: int = 5
    """Runs of each measurement; the fastest counts."""
    out: Path | None = None
    """Also write the JSON object here."""


class InferBench:
    """An engine with `rows` prefilled rows."""

    def __init__(self, config: BenchInferConfig, model: GPT, params: Params, rows: int):
        self.config, self.rows = config, rows
        self.engine = make_engine(model, params, n_slots=rows, chunk=config.new_tokens)
        self.engine.warm_up()
        rng = np.random.default_rng(0)
        shape = (rows, config.prompt_tokens)
        self.prompts = rng.integers(0, model.config.vocab_size, shape).tolist()
        self.ttft_s = math.inf

    def prefill(self) -> None:
        """Prefills every row; the first one is timed, with its first token."""
        self.engine.reset()
        for row, prompt in enumerate(self.prompts):
            began = time.perf_counter()
            _append(self.engine, row, prompt)
            if row == 0:
                self.engine.decode(self._inputs(only=0), 1)
                self.ttft_s = min(self.ttft_s, time.perf_counter() - began)
        _append(self.engine, 0, self.prompts[0])  # without that token

    def decode_s(self, tokens_per_call: int) -> float:
        """Seconds to sample the new tokens of all rows, so many in each call."""
        inputs = self._inputs()
        began = time.perf_counter()
        for _ in range(0, self.config.new_tokens, tokens_per_call):
            self.engine.decode(inputs, tokens_per_call)
            inputs.sampled[:] += tokens_per_call
            inputs.remaining[:] -= tokens_per_call
        return time.perf_counter() - began

    def _inputs(self, only: int | None = None) -> DecodeInputs:
        inputs = DecodeInputs.empty(self.rows)
        for row in range(self.rows):
            inputs.running[row] = only in (None, row)
            inputs.remaining[row] = self.config.new_tokens
            sampling = SamplingParams(self.config.temperature, self.config.top_k, seed=row)
            inputs.params.put(row, sampling, 0)
        return inputs


def _append(engine: Engine, row: int, prompt: list[int]) -> None:
    done = 0
    while done < len(prompt):
        end = done + engine.bucket(len(prompt) - done)
        engine.prefill([Chunk(row, done, prompt[:end])])
        done = end


def measure(config: BenchInferConfig) -> dict[str, Any]:
    model, params = _model(config)
    sizes = [int(size) for size in config.batch_sizes.split(",")]
    if config.prompt_tokens + config.new_tokens > model.config.sequence_len:
        raise ValueError(
            f"--prompt-tokens {config.prompt_tokens} and --new-tokens {config.new_tokens} are more "
            f"than the context of {model.config.sequence_len}; raise --max-seq-len"
        )
    rows, step_tokens_per_s = [], 0.0
    for size in sizes:
        bench = InferBench(config, model, params, size)
        loop, step = [], []
        for _ in range(config.repeats):
            bench.prefill()
            loop.append(bench.decode_s(config.new_tokens))
            if size == sizes[0]:
                bench.prefill()
                step.append(bench.decode_s(1))
        if step:
            step_tokens_per_s = size * config.new_tokens / min(step)
        rows.append(_row(bench, min(loop)))
    first = rows[0]
    return {
        "loop_tokens_per_s": first["tokens_per_s"],
        "step_tokens_per_s": step_tokens_per_s,
        "loop_over_step": first["tokens_per_s"] / step_tokens_per_s,
        "ttft_ms": first["ttft_ms"],
        "bandwidth_share": first["bandwidth_share"],
        "peak_gib": max(row["peak_gib"] for row in rows),
        "device": jax.devices()[0].device_kind,
        "depth": model.config.n_layer,
        "recipe": model.config.recipe,
        "dtype": np.dtype(model.dtype).name,
        "prompt_tokens": config.prompt_tokens,
        "new_tokens": config.new_tokens,
        "rows": rows,
        "provenance": provenance(),
    }


def _model(config: BenchInferConfig) -> tuple[GPT, Params]:
    if config.run:
        loaded = load_model(run_folder(config.run), dtype=config.dtype)
        return loaded.model, loaded.params
    shape = plan(
        config.depth,
        recipe=config.recipe,
        vocab_size=config.vocab_size,
        sequence_len=config.max_seq_len,
        total_batch_size=config.max_seq_len,
        device_batch_size=1,
    ).config
    model = GPT(shape, compute_dtype(config.dtype))
    return model, init_params(model, jax.random.key(0))


def _row(bench: InferBench, loop_s: float) -> dict[str, Any]:
    token_s = loop_s / bench.config.new_tokens
    device = find_device(jax.devices()[0].device_kind)
    moved = bench.engine.bytes_per_token()
    # Of the device; on a CPU, of this process. It never falls from row to row.
    stats = jax.local_devices()[0].memory_stats() or {}
    own_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "batch": bench.rows,
        "ttft_ms": 1e3 * bench.ttft_s,
        "ms_per_token": 1e3 * token_s,
        "tokens_per_s": bench.rows / token_s,
        "bandwidth_share": None if device is None else moved / token_s / (device.bandwidth * 1e12),
        "gb_per_token": moved / 1e9,
        "peak_gib": (stats.get("peak_bytes_in_use") or own_peak) / 2**30,
    }


def show(result: dict[str, Any]) -> None:
    table = Table(title=f"d{result['depth']}, {result['dtype']}, {result['device']}")
    for name in result["rows"][0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in result["rows"]:
        table.add_row(*("–" if value is None else f"{value:,.4g}" for value in row.values()))
    console = Console()
    console.print(table)
    console.print(
        f"loop {result['loop_tokens_per_s']:,.0f} tokens/s, one call a token "
        f"{result['step_tokens_per_s']:,.0f}: {result['loop_over_step']:.1f} times"
    )


def main() -> None:
    config = parse(BenchInferConfig, "bench_infer", description=__doc__)
    start()
    result = measure(config)
    show(result)
    line = json.dumps(result)
    if config.out:
        config.out.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    run_script(main)
