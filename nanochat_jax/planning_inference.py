"""What generating will cost: the engine's programs compiled for a GPU that need not be there.

The counterpart of planning.py for inference: one token for all rows (the body of the decode loop)
and one prompt chunk, read as that file reads a training step.
"""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nanochat_jax import hlo
from nanochat_jax.engine.engine import engine_of
from nanochat_jax.gpt import GPT, GPTConfig, parameter_table
from nanochat_jax.roofline import timeline
from nanochat_jax.topology import COMPILER_OPTIONS, GIB, deviceless_mesh, find_gpu


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
    engine = engine_of(model, slots=slots, mesh=deviceless_mesh(target, 1))
    shapes = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32)
        for name, (shape, _) in parameter_table(config).items()
    }
    read = {name: _read(low, target) for name, low in engine.lowered(shapes).items()}
    return InferenceCost(engine.slots, engine.buckets[-1], read["decode"], read["prefill"])


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
