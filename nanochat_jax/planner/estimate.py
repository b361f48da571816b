"""What a pretraining run will cost on any machine, by arithmetic: memory, time, text, disk."""

import math
import os
import subprocess
import time
import tomllib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.config import CONFIGS
from nanochat_jax.data.shards import HUB_DATASETS
from nanochat_jax.devices import find_device
from nanochat_jax.distributed import GPU_MEMORY_SHARE
from nanochat_jax.gpt import GPT, GPTConfig
from nanochat_jax.optim import OptimConfig, make_optimizer
from nanochat_jax.planner.gpus import GIB
from nanochat_jax.scaling import RECIPES, Plan
from nanochat_jax.sharding import make_mesh
from nanochat_jax.stages.settings import PretrainConfig
from nanochat_jax.tokenizer import Tokenizer, tokenizer_folder
from nanochat_jax.train import abstract_logical_state

# The published data sets, with the tokenizer that is trained on them.
CHARS_PER_TOKEN = 4.8
CHARS_PER_SHARD = 250e6
SHARD_BYTES = 100e6
CROPPED_SHARE = 0.35  # of the tokens: best-fit packing into rows of 2048 cuts the rest off

ASSUMED_MFU = 0.5  # bfloat16 training on 8 GPUs as published for the original: 47.5 to 50 %
CPU_SHARE = 0.35  # of the speed of one large float32 product: what a training step reaches
KEPT_ACTIVATIONS_D = 15  # arrays (tokens, D) that a layer keeps for its backward pass, and …
KEPT_ACTIVATIONS_KV = 3  # … (tokens, K·H): see `activation_bytes`


def shards_needed(tokens: int, dataset: str) -> int:
    """Shards of a published data set that hold `tokens` tokens after packing, and the validation
    shard; no more than there are, and 0 for other text."""
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
    step_s = plan.flops_per_token * plan.total_batch_size / plan.n_devices / rate
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
    """The share of a GPU's memory that our scripts take at start (distributed.py)."""
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the second is older
    return float(next(filter(None, map(os.environ.get, names)), GPU_MEMORY_SHARE))


def measured_cpu_flops() -> float:
    """FLOP/s of float32 matrix products on this machine, all cores, at their best in 0.5 s."""
    a = np.ones((512, 512), np.float32)
    a @ a
    best, end = math.inf, time.perf_counter() + 0.5
    while time.perf_counter() < end:
        began = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - began)
    return 2 * len(a) ** 3 / best


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


def model_and_optimizer(plan: Plan, dtype: Any, attention: str) -> tuple[GPT, Any]:
    optimizer = make_optimizer(plan.config, OptimConfig.from_plan(plan), dtype)
    return GPT(plan.config, dtype, attention), optimizer
