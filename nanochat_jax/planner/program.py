"""Compiles the training step and the engine for GPUs that need not be there, and reads both."""

import math
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

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
from nanochat_jax.train import Batch, abstract_state, make_train_step


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
        """With cuDNN's scratch memory in the backward pass, of which a compiler without a device
        knows nothing: a float32 gradient of the queries."""
        config = self.plan.config
        queries = self.plan.device_batch_size * config.sequence_len * config.n_embd
        return self.program_bytes + 4.0 * queries

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
            microbatch_s=self.timeline.part(MODEL) / self.plan.grad_accum_steps,
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


def compile_step(plan: Plan, target: str) -> CompiledStep:
    """Compiles the plan's training step for `plan.n_devices` GPUs named `target` ("h100", "h200").

    Takes half a minute to minutes. ValueError when the CUDA wheels are absent.
    """
    mesh = deviceless_mesh(target, plan.n_devices)
    model, optimizer = model_and_optimizer(plan, jnp.bfloat16, "cudnn")
    rows = plan.device_batch_size * plan.n_devices
    shape = (plan.grad_accum_steps, rows, plan.config.sequence_len)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, BATCH_SPEC))
    step = make_train_step(model, optimizer, mesh, plan.settings.grad_clip)
    state = abstract_state(model, optimizer, mesh)
    began = time.perf_counter()
    lowered = step.lower(state, Batch(tokens, tokens))
    lower_s = time.perf_counter() - began
    module, peak, compile_s = _compile(lowered)
    return CompiledStep(plan, target, module, peak, lower_s, compile_s)


def _compile(lowered: Any) -> tuple[hlo.Module, int, float]:
    """The optimised program, the peak of its buffers in bytes, and the seconds it took."""
    began = time.perf_counter()
    compiled = lowered.compile(compiler_options=COMPILER_OPTIONS)
    compile_s = time.perf_counter() - began
    peak = compiled.memory_analysis().peak_memory_in_bytes
    return hlo.parse(compiled.as_text()), peak, compile_s


def search_largest(first: CompiledStep) -> int:
    """Largest batch that fits, in rows, by up to three compiles around the estimate of `first`."""
    choices, capacity = row_choices(first.plan), first.cost().capacity
    rows = first.cost().max_device_batch or choices[0]
    best = first.plan.device_batch_size if first.peak_bytes <= capacity else 0
    failed = math.inf
    for _ in range(3):
        if rows not in choices or not best < rows < failed:
            break
        if compile_step(with_rows(first.plan, rows), first.target).peak_bytes <= capacity:
            best, rows = rows, rows * 2
        else:
            failed, rows = rows, rows // 2
    return best


def with_rows(plan: Plan, rows: int) -> Plan:
    """The same plan with another device batch; the accumulation makes up for it."""
    step_rows = plan.total_batch_size // (plan.config.sequence_len * plan.n_devices)
    return replace(plan, device_batch_size=rows, grad_accum_steps=step_rows // rows)


def compile_engine(config: GPTConfig, target: str, slots: int) -> dict[str, Any]:
    """Compiles the engine of a bfloat16 model with `slots` rows of its whole context on one GPU.

    Returns what scripts/plan.py prints: of the decode loop one turn, which is one token for every
    row; of the prefill its largest chunk. ValueError for an unknown target, and when the CUDA
    wheels are absent.
    """
    engine = make_engine(GPT(config, jnp.bfloat16), n_slots=slots, mesh=deviceless_mesh(target, 1))
    shapes = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32)
        for name, (shape, _) in parameter_table(config).items()
    }
    kernels, moved, seconds, peaks, compile_s = {}, {}, {}, [], 0.0
    for name, lowered in engine.lowered(shapes).items():
        module, peak, took = _compile(lowered)
        launches = list(module.launches())  # the decode loop's length is not known: it counts once
        kernels[name] = sum(times for _, times in launches)
        moved[name] = sum(kernel.bytes * times for kernel, times in launches)
        seconds[name] = timeline(module, find_gpu(target)).total
        peaks.append(peak)
        compile_s += took
    return {
        "engine_slots": engine.n_slots,
        "decode_kernels": kernels["decode"],
        "decode_gb_per_token": round(moved["decode"] / 1e9, 3),
        "decode_ms_per_token": round(seconds["decode"] * 1e3, 3),
        "decode_tokens_per_s": round(engine.n_slots / seconds["decode"]),
        "prefill_kernels": kernels["prefill"],
        "prefill_tokens": engine.buckets[-1],
        "prefill_ms": round(seconds["prefill"] * 1e3, 2),
        "engine_peak_gib": round(max(peaks) / GIB, 2),
        "engine_compile_s": round(compile_s, 1),
    }
