"""Measures the training step of pretrain.py: speed, memory, and where the time goes.

    python scripts/bench_train.py --depth=4 --max-seq-len=512 --device-batch-size=8   # any machine
    python scripts/bench_train.py --depth=24 --device-batch-size=16 --accumulation=4  # one GPU

Random tokens, so no data set and no tokenizer. After a warm-up it times whole steps and takes the
median. A micro-batch is timed as the difference (of the fastest steps) between two programs that
differ by one; the rest of the step is the optimizer and the collectives. `--packing` also feeds the
step from a data set through the input pipeline, to see whether it waits. The last line is one JSON
object.
"""

import json
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from nanochat_jax.cli import run_script
from nanochat_jax.config import parse
from nanochat_jax.data.shards import list_shards
from nanochat_jax.data.text import train_loader
from nanochat_jax.devices import peak_flops
from nanochat_jax.distributed import provenance, start
from nanochat_jax.gpt import make_model
from nanochat_jax.optim import OptimConfig, make_optimizer
from nanochat_jax.sharding import make_mesh
from nanochat_jax.stages.pretraining import decide
from nanochat_jax.stages.settings import PretrainConfig
from nanochat_jax.tokenizer import Tokenizer, tokenizer_folder
from nanochat_jax.train import init_state, make_train_step, put_batch


@dataclass(frozen=True)
class BenchTrainConfig:
    """What to measure."""

    depth: int = 4
    """Number of layers."""
    recipe: Literal["2025", "2026"] = "2026"
    """Which nanochat."""
    vocab_size: int = 32768
    """Tokens in the vocabulary, special ones included."""
    max_seq_len: int = 2048
    """Tokens in a row."""
    device_batch_size: int = 8
    """Rows that a device computes together."""
    accumulation: int = 1
    """Micro-batches of a step."""
    n_devices: int | None = None
    """Devices to use (all)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type."""
    attention: Literal["auto", "blocked", "cudnn"] = "auto"
    """Attention kernel."""
    steps: int = 20
    """Timed steps."""
    warmup: int = 3
    """Steps before them."""
    packing: str | None = None
    """A data set (name or folder): feed the step from it, to measure the wait for data."""
    tokenizer: str = "default"
    """The tokenizer for --packing."""
    out: Path | None = None
    """Also write the JSON object here."""


class TrainBench:
    """The step of a configuration with `accumulation` micro-batches, compiled and warm."""

    def __init__(self, config: BenchTrainConfig):
        self.config = config
        self.mesh = make_mesh(config.n_devices)
        wanted = PretrainConfig(
            depth=config.depth,
            recipe=config.recipe,
            max_seq_len=config.max_seq_len,
            device_batch_size=config.device_batch_size,
            total_batch_size=self.tokens,
            num_iterations=1000,
        )
        self.plan = decide(wanted, config.vocab_size, self.mesh.size)
        self.model = make_model(self.plan.config, config.dtype, config.attention)
        optim_config = OptimConfig.from_plan(self.plan)
        optimizer = make_optimizer(self.plan.config, optim_config, self.model.dtype)
        self.state = init_state(self.model, optimizer, self.mesh, jax.random.key(0))
        step = make_train_step(self.model, optimizer, self.mesh, self.plan.settings.grad_clip)
        began = time.perf_counter()
        self.step = step.lower(self.state, self.batch(0)).compile()
        self.compile_s = time.perf_counter() - began

    @property
    def rows(self) -> int:
        """Rows of a step that this process computes."""
        here = self.mesh.size // jax.process_count()
        return self.config.device_batch_size * here * self.config.accumulation

    @property
    def tokens(self) -> int:
        """Tokens of a step over all processes."""
        return self.rows * jax.process_count() * self.config.max_seq_len

    def batch(self, seed: int) -> Any:
        shape = (self.rows, self.config.max_seq_len + 1)
        rows = np.random.default_rng(seed).integers(0, self.config.vocab_size, shape)
        return put_batch(rows.astype(np.int32), self.config.accumulation, self.mesh)

    def seconds(self, batches: Any, steps: int) -> list[float]:
        """Wall time of each of `steps` steps, batches included, after the warm-up."""
        times = []
        for i in range(self.config.warmup + steps):
            began = time.perf_counter()
            self.state, metrics = self.step(self.state, next(batches))
            jax.block_until_ready(metrics)
            if i >= self.config.warmup:
                times.append(time.perf_counter() - began)
        return times


def measure(config: BenchTrainConfig) -> dict[str, Any]:
    bench = TrainBench(config)
    fixed = bench.batch(0)
    times = bench.seconds(iter(lambda: fixed, None), config.steps)
    step_s = statistics.median(times)
    tokens_per_s = bench.tokens / step_s
    peak = peak_flops(jax.devices()[0].device_kind)
    flops = bench.plan.flops_per_token * tokens_per_s
    micro_ms, waited = _micro_batch_ms(config, min(times)), _data_wait_share(bench)
    return {
        "tokens_per_s": tokens_per_s,
        "step_ms": 1e3 * step_s,
        "step_ms_fastest": 1e3 * min(times),
        "micro_batch_ms": micro_ms,
        "rest_of_step_ms": None
        if micro_ms is None
        else 1e3 * min(times) - config.accumulation * micro_ms,
        "mfu": None if peak is None else flops / (peak * bench.mesh.size),
        "tflops_per_device": flops / bench.mesh.size / 1e12,
        "peak_gib": _peak_gib(bench),
        "compile_s": bench.compile_s,
        "data_wait_share": waited,
        "device": jax.devices()[0].device_kind,
        "n_devices": bench.mesh.size,
        "depth": config.depth,
        "recipe": config.recipe,
        "tokens_per_step": bench.tokens,
        "dtype": np.dtype(bench.model.dtype).name,
        "steps": config.steps,
        "provenance": provenance(),
    }


def _micro_batch_ms(config: BenchTrainConfig, fastest_s: float) -> float | None:
    """Time of one micro-batch: what one more of them adds to a step. None without accumulation."""
    if config.accumulation == 1:
        return None
    fewer = TrainBench(replace(config, accumulation=config.accumulation - 1))
    fixed = fewer.batch(0)
    without = min(fewer.seconds(iter(lambda: fixed, None), config.steps))
    return 1e3 * (fastest_s - without)


def _data_wait_share(bench: TrainBench) -> float | None:
    """Share of the time that steps wait for the input pipeline; None without --packing."""
    config = bench.config
    if config.packing is None:
        return None
    tokenizer = Tokenizer.load(tokenizer_folder(config.tokenizer))
    shards = list_shards(config.packing)
    rows = bench.rows * jax.process_count()
    loader = train_loader(
        shards, tokenizer, rows=rows, sequence_len=config.max_seq_len, streams=min(8, rows)
    )
    waits: list[float] = []

    def batches():
        while True:
            began = time.perf_counter()
            rows_np = next(loader)
            waits.append(time.perf_counter() - began)
            known = np.minimum(rows_np, config.vocab_size - 1)
            yield put_batch(known, config.accumulation, bench.mesh)

    with loader:
        times = bench.seconds(batches(), config.steps)
    return sum(waits[config.warmup :]) / sum(times)


def _peak_gib(bench: TrainBench) -> float | None:
    """What the device says it used at most; without that, what the compiler planned."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**30
    planned = bench.step.memory_analysis()
    if planned is None:
        return None
    return (planned.argument_size_in_bytes + planned.temp_size_in_bytes) / 2**30


def show(result: dict[str, Any]) -> None:
    table = Table(title=f"d{result['depth']} on {result['n_devices']} × {result['device']}")
    table.add_column("what")
    table.add_column("measured", justify="right")
    for name, value in result.items():
        if isinstance(value, int | float | str):
            table.add_row(name, f"{value:,.4g}" if isinstance(value, float) else str(value))
    Console().print(table)


def main() -> None:
    config = parse(BenchTrainConfig, "bench_train", description=__doc__)
    start()
    jax.config.update("jax_enable_compilation_cache", False)  # compile_s is to be a cold one
    result = measure(config)
    show(result)
    line = json.dumps(result)
    if config.out:
        config.out.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    run_script(main)
