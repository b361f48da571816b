"""Compiles the training step and the engine for GPUs that need not be there, and reads them."""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from nanochat_jax.engine.engine import make_engine
from nanochat_jax.gpt import GPT, GPTConfig, parameter_table
from nanochat_jax.planner import hlo
from nanochat_jax.planner.estimate import (
    StepCost,
    fixed_bytes,
    largest_batch,
    model_and_optimizer,
    row_choices,
    usable_share,
)
from nanochat_jax.planner.gpus import COMPILER_OPTIONS, GIB, deviceless_mesh, find_gpu
from nanochat_jax.planner.roofline import MODEL, OPTIMIZER, Timeline, part_of, timeline
from nanochat_jax.scaling import Plan
from nanochat_jax.sharding import BATCH_SPEC
from nanochat_jax.train import (
    Batch,
    TrainState,
    abstract_state,
    make_train_step,
)

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


# --- What generating will cost: the engine's programs compiled for a GPU that need no ---


class Program(NamedTuple):
    """One run of a compiled program; of the decode loop one turn."""

    kernels: int
    bytes: float  # read and written in device memory
    seconds: float  # by the roofline
    peak_bytes: int
    compile_s: float


class InferenceCost(NamedTuple):
    """An engine of `slots` rows on one GPU."""

    slots: int
    chunk_tokens: int  # of one prefill
    decode: Program
    prefill: Program

    def summary(self) -> dict[str, Any]:
        decode, prefill = self.decode, self.prefill
        return {
            "engine_slots": self.slots,
            "decode_kernels": decode.kernels,
            "decode_gb_per_token": round(decode.bytes / 1e9, 3),
            "decode_ms_per_token": round(decode.seconds * 1e3, 3),
            "decode_tokens_per_s": round(self.slots / decode.seconds),
            "prefill_kernels": prefill.kernels,
            "prefill_tokens": self.chunk_tokens,
            "prefill_ms": round(prefill.seconds * 1e3, 2),
            "engine_peak_gib": round(max(decode.peak_bytes, prefill.peak_bytes) / GIB, 2),
            "engine_compile_s": round(decode.compile_s + prefill.compile_s, 1),
        }


def compile_engine(config: GPTConfig, target: str, slots: int) -> InferenceCost:
    """Compiles the engine of a bfloat16 model with `slots` rows of its whole context.

    ValueError for an unknown target, and when the CUDA wheels are absent.
    """
    model = GPT(config, jnp.bfloat16)
    engine = make_engine(model, n_slots=slots, mesh=deviceless_mesh(target, 1))
    shapes = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32)
        for name, (shape, _) in parameter_table(config).items()
    }
    read = {name: _read(low, target) for name, low in engine.lowered(shapes).items()}
    return InferenceCost(engine.n_slots, engine.buckets[-1], read["decode"], read["prefill"])


def _read(lowered: Any, target: str) -> Program:
    began = time.perf_counter()
    compiled = lowered.compile(compiler_options=dict(COMPILER_OPTIONS))
    compile_s = time.perf_counter() - began
    module = hlo.parse(compiled.as_text())
    launches = list(module.launches())  # the loop's length is not known: it counts once
    return Program(
        kernels=sum(times for _, times in launches),
        bytes=sum(kernel.bytes * times for kernel, times in launches),
        seconds=timeline(module, find_gpu(target)).total,
        peak_bytes=compiled.memory_analysis().peak_memory_in_bytes,
        compile_s=compile_s,
    )
