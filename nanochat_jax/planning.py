"""What a pretraining run will cost before it starts: memory, time, money, text, disk.

Two ways. `estimate` is arithmetic alone and works for every machine. `compile_step` compiles the
very step of pretrain.py for GPUs that need not be there (topology.py) and reads the program: its
peak memory, its kernels (hlo.py) and how long they should take (roofline.py). scripts/plan.py
prints both.
"""

import math
import os
import subprocess
import time
import tomllib
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from nanochat_jax import hlo
from nanochat_jax.config import CONFIGS, PretrainConfig
from nanochat_jax.data.loader import Batch
from nanochat_jax.data.shards import HUB_DATASETS
from nanochat_jax.devices import find_device
from nanochat_jax.gpt import GPT, GPTConfig
from nanochat_jax.optim import OptimConfig, make_optimizer
from nanochat_jax.roofline import MODEL, OPTIMIZER, Timeline, part_of, timeline
from nanochat_jax.runtime import GPU_MEMORY_SHARE
from nanochat_jax.scaling import RECIPES, Plan
from nanochat_jax.sharding import BATCH_SPEC, make_mesh
from nanochat_jax.tokenizer import Tokenizer, tokenizer_folder
from nanochat_jax.topology import COMPILER_OPTIONS, GIB, deviceless_mesh, find_gpu
from nanochat_jax.train import TrainState, abstract_logical_state, abstract_state, make_train_step

# The published data sets, with the tokenizer that is trained on them.
CHARS_PER_TOKEN = 4.8
CHARS_PER_SHARD = 250e6
SHARD_BYTES = 100e6
CROPPED_SHARE = 0.35  # of the tokens: best-fit packing into rows of 2048 cuts the rest off

ASSUMED_MFU = 0.5  # bfloat16 training on 8 GPUs as published for the original: 47.5 to 50 %
CPU_SHARE = 0.35  # of the speed of one large float32 product: what a training step reaches
KEPT_ACTIVATIONS_D = 15  # arrays (tokens, D) that a layer keeps for its backward pass, and …
KEPT_ACTIVATIONS_KV = 3  # … (tokens, K·H): see `activation_bytes`


# --- text, disk, money ----------------------------------------------------------------------------


def shards_needed(tokens: int, dataset: str) -> int:
    """Shards of a published data set that hold `tokens` tokens after packing, and the validation
    shard; no more than there are, and 0 for text of your own."""
    if dataset not in HUB_DATASETS:
        return 0
    characters = tokens * CHARS_PER_TOKEN / (1 - CROPPED_SHARE)
    training = max(1, math.ceil(characters / CHARS_PER_SHARD))
    return min(training, HUB_DATASETS[dataset].last_shard) + 1


@lru_cache
def state_bytes(plan: Plan) -> int:
    """Bytes of parameters and optimizer moments: one checkpoint."""
    model, optimizer = model_and_optimizer(plan, jnp.float32, "blocked")
    state = abstract_logical_state(model, optimizer, make_mesh(1))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def disk_bytes(shards: int, checkpoint: int, keep_last: int) -> float:
    """Text, the checkpoints kept, the best one, and the one being written."""
    return shards * SHARD_BYTES + checkpoint * (keep_last + 2)


def usd(hours: float, devices: int, usd_per_hour: float) -> float:
    return hours * devices * usd_per_hour


def mfu(plan: Plan, cost: "StepCost", target: str) -> float | None:
    """Share of the devices' bfloat16 peak that the step reaches; None on a CPU."""
    device = find_device(target)
    if device is None:
        return None
    flops = plan.flops_per_token * plan.total_batch_size / plan.n_devices
    return round(flops / cost.step_s / (device.bf16_tflops * 1e12), 4)


# --- arithmetic without a compiler ----------------------------------------------------------------


@dataclass(frozen=True)
class StepCost:
    """One training step on every device. `how` says where the numbers come from."""

    how: str
    peak_bytes: float  # of one device
    capacity: float  # bytes that the program may take of it
    max_device_batch: int  # rows; 0 where not even one fits
    microbatch_s: float
    step_s: float

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.capacity


def estimate(plan: Plan, target: str) -> StepCost:
    """By arithmetic: FLOPs at an assumed share of the peak, and the arrays that must be kept.

    `target` is "cpu" (this machine: one matrix product is timed) or the name of a device of
    devices.py.
    """
    flops = plan.flops_per_token * plan.total_batch_size / plan.n_devices
    if target == "cpu":
        rate, value_bytes = CPU_SHARE * measured_cpu_flops(), 4
        capacity = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        how = f"arithmetic, at {rate / 1e9:.0f} GFLOP/s"
    else:
        device = find_device(target)
        if device is None:
            raise ValueError(
                f"target {target!r} is no device of nanochat_jax/devices.py, nor 'cpu'"
            )
        rate, value_bytes = ASSUMED_MFU * device.bf16_tflops * 1e12, 2
        capacity = device.memory * GIB * usable_share()
        how = f"arithmetic, at {ASSUMED_MFU:.0%} of {device.bf16_tflops:.0f} TFLOP/s"
    fixed = fixed_bytes(plan, value_bytes)
    peak = fixed + activation_bytes(plan.config, plan.device_batch_size, value_bytes)
    step_s = flops / rate
    largest = largest_batch(plan, peak, fixed, capacity)
    return StepCost(how, peak, capacity, largest, step_s / plan.grad_accum_steps, step_s)


def activation_bytes(config: GPTConfig, rows: int, value_bytes: int) -> float:
    """What one micro-batch keeps from its forward to its backward pass.

    Per layer in units of D: the stream twice, its two norms, q before and after rotation,
    attention's output, and 2·4 in the MLP; in units of K·H: k twice and v. Value embeddings: the
    rows looked up. Outside the layers: the logits and their gradient.
    """
    tokens = rows * config.sequence_len
    layer = KEPT_ACTIVATIONS_D * config.n_embd + KEPT_ACTIVATIONS_KV * config.kv_dim
    values = config.n_layer * layer + len(config.value_embed_layers) * config.kv_dim
    return tokens * value_bytes * (values + 2 * config.padded_vocab_size)


def fixed_bytes(plan: Plan, value_bytes: int) -> float:
    """What does not grow with the rows: a slice of the state, the gathered weights, one
    micro-batch's gradients, and float32 sums of gradients where micro-batches are accumulated.
    """
    sums = 4 if plan.grad_accum_steps > 1 else 0
    return state_bytes(plan) / plan.n_devices + plan.params.total * (2 * value_bytes + sums)


def largest_batch(plan: Plan, peak: float, fixed: float, capacity: float) -> int:
    """Largest power of two of rows that divides the step and fits, by a straight line through
    `fixed` at no rows and `peak` at the plan's; 0 when none fits.
    """
    per_row = (peak - fixed) / plan.device_batch_size
    return max((r for r in row_choices(plan) if fixed + r * per_row <= capacity), default=0)


def row_choices(plan: Plan) -> list[int]:
    """Powers of two of rows per device that divide a step."""
    rows = plan.total_batch_size // (plan.config.sequence_len * plan.n_devices)
    return [2**i for i in range(rows.bit_length()) if rows % 2**i == 0]


def usable_share() -> float:
    """The share of a GPU's memory that our scripts take at start (runtime.py)."""
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the second is older
    return float(
        next((os.environ[name] for name in names if os.environ.get(name)), GPU_MEMORY_SHARE)
    )


def measured_cpu_flops(size: int = 512, seconds: float = 0.5) -> float:
    """FLOP/s of float32 matrix products on this machine, all cores, at their best."""
    a = np.ones((size, size), np.float32)
    a @ a
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def this_machine() -> tuple[str, int]:
    """(name, number) of the NVIDIA GPUs here, or ("cpu", 1)."""
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "cpu", 1
    names = found.strip().splitlines()
    return (names[0].strip(), len(names)) if names else ("cpu", 1)


def vocabulary(config: PretrainConfig) -> int:
    """Size of the vocabulary of the run's tokenizer: the one on disk, else the one that a preset
    trains under this name, else the recipe's.
    """
    folder = tokenizer_folder(config.tokenizer)
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.load(folder).vocab_size
    for preset in sorted(CONFIGS.glob("*.toml")):
        trained = tomllib.loads(preset.read_text(encoding="utf-8")).get("tok_train", {})
        if trained.get("name") == config.tokenizer and "vocab_size" in trained:
            return trained["vocab_size"]
    return RECIPES[config.recipe].vocab_size


# --- with the compiler ----------------------------------------------------------------------------


@dataclass(frozen=True)
class CompiledStep:
    """The optimised program of one training step for GPUs that need not exist."""

    plan: Plan
    target: str
    module: hlo.Module
    program_bytes: int  # peak of the program's own buffers on one device
    lower_s: float
    compile_s: float

    @cached_property
    def timeline(self) -> Timeline:
        return timeline(self.module, find_gpu(self.target))

    @property
    def peak_bytes(self) -> float:
        return self.program_bytes + attention_workspace(self.plan)

    @property
    def microbatch_s(self) -> float:
        """Forward and backward of one micro-batch, its gradients added; the mean over a step."""
        return self.timeline.part(MODEL) / self.plan.grad_accum_steps

    def counts(self) -> dict[str, float]:
        """Library calls of a micro-batch; launches and collectives of a whole step.

        Collectives are counted as the compiler combined them.
        """
        step, model, reduced = Counter[str](), Counter[str](), 0.0
        for kernel, times in self.module.launches():
            step[kernel.kind] += times
            model[kernel.kind] += times if part_of(kernel) == MODEL else 0
            reduced += kernel.bytes * times if kernel.kind == "all_reduce" else 0
        per_micro = self.plan.grad_accum_steps
        return {
            "kernels": sum(step.values()),
            "attention_calls": model["attention"] // per_micro,
            "fp8_gemms": model["fp8_gemm"] // per_micro,
            "bf16_gemms": model["bf16_gemm"] // per_micro,
            "f32_gemms": model["f32_gemm"] // per_micro,
            "optimizer_gemms": sum(step[k] - model[k] for k in step if k.endswith("_gemm")),
            "reduce_scatters": step["reduce_scatter"],
            "all_gathers": step["all_gather"],
            "all_reduces": step["all_reduce"],
            "all_reduce_mb": round(reduced / 1e6, 3),
        }

    def cost(self) -> StepCost:
        capacity = find_gpu(self.target).memory * usable_share()
        fixed = fixed_bytes(self.plan, 2)
        return StepCost(
            how=f"compiled for {self.plan.n_devices} × {find_gpu(self.target).name}",
            peak_bytes=self.peak_bytes,
            capacity=capacity,
            max_device_batch=largest_batch(self.plan, self.peak_bytes, fixed, capacity),
            microbatch_s=self.microbatch_s,
            step_s=self.timeline.total,
        )

    def times(self) -> dict[str, float]:
        """Milliseconds of a step by what takes them; "exposed" is waiting for collectives."""
        seconds: dict[str, float] = defaultdict(float)
        line = self.timeline
        for (part, kind), value in line.seconds.items():
            known = kind in ("bf16_gemm", "fp8_gemm", "f32_gemm", "attention")
            seconds["optimizer" if part == OPTIMIZER else kind if known else "elementwise"] += value
        seconds["collectives"], seconds["exposed"] = line.communication, line.exposed
        return {name: value * 1e3 for name, value in seconds.items()}


def compile_step(
    plan: Plan, target: str, options: Mapping[str, bool | int | str] = COMPILER_OPTIONS
) -> CompiledStep:
    """Compiles the plan's training step for `plan.n_devices` GPUs of kind `target` ("h100",
    "h200").

    Takes half a minute to minutes. ValueError when the CUDA wheels are absent.
    """
    step, state, batch = step_to_compile(plan, deviceless_mesh(target, plan.n_devices))
    began = time.perf_counter()
    lowered = step.lower(state, batch)
    middle = time.perf_counter()
    compiled = lowered.compile(compiler_options=dict(options))
    compile_s = time.perf_counter() - middle
    memory = compiled.memory_analysis()
    module = hlo.parse(compiled.as_text())
    peak = memory.peak_memory_in_bytes
    return CompiledStep(plan, target, module, peak, middle - began, compile_s)


def step_to_compile(plan: Plan, mesh: Mesh) -> tuple[Any, TrainState, Batch]:
    """The jitted step of pretrain.py on GPUs, and the shapes of its arguments on `mesh`."""
    model, optimizer = model_and_optimizer(plan, jnp.bfloat16, "cudnn")
    shape = (
        plan.grad_accum_steps,
        plan.device_batch_size * plan.n_devices,
        plan.config.sequence_len,
    )
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, BATCH_SPEC))
    step = make_train_step(model, optimizer, mesh, plan.settings.grad_clip)
    return step, abstract_state(model, optimizer, mesh), Batch(tokens, tokens)


def model_and_optimizer(plan: Plan, dtype: Any, attention: str) -> tuple[GPT, Any]:
    optimizer = make_optimizer(plan.config, OptimConfig.from_plan(plan), dtype)
    return GPT(plan.config, dtype, attention), optimizer


def attention_workspace(plan: Plan) -> float:
    """Scratch memory of cuDNN's backward pass, which no compiler without a device knows: a float32
    gradient of the queries."""
    config = plan.config
    return 4.0 * plan.device_batch_size * config.sequence_len * config.n_embd


def search_largest(first: CompiledStep, compiles: int = 3) -> int:
    """Largest batch that fits, in rows, by compiling at and around the estimate of `first`."""
    choices, capacity = row_choices(first.plan), first.cost().capacity
    rows = first.cost().max_device_batch or choices[0]
    best, failed, made = 0, math.inf, 0
    if first.peak_bytes <= capacity:
        best = first.plan.device_batch_size
    while made < compiles and rows in choices and best < rows < failed:
        made += 1
        if compile_step(with_rows(first.plan, rows), first.target).peak_bytes <= capacity:
            best, rows = rows, rows * 2
        else:
            failed, rows = rows, rows // 2
    return best


def with_rows(plan: Plan, rows: int) -> Plan:
    """The same plan with another device batch; the accumulation makes up for it."""
    step_rows = plan.total_batch_size // (plan.config.sequence_len * plan.n_devices)
    return replace(plan, device_batch_size=rows, grad_accum_steps=step_rows // rows)
