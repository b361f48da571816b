"""Says what a pretraining run will need before it starts: memory, time, money, text, disk.

    python scripts/plan.py --depth 24 --gpus 8 --target h200 --usd-per-gpu-hour 3   # compiles
    python scripts/plan.py --config d20_2025 --gpus 8 --target h100
    python scripts/plan.py --config cpu --no-compile                                # arithmetic
    python scripts/plan.py --depth 24 --target h200 --engine-slots 32               # inference too

All flags of pretrain.py mean the same here. With a compiler (the CUDA wheels, extra cuda13; no GPU)
the step of pretrain.py is compiled for GPUs that need not be there, and the program is read: its
peak memory, kernels, collectives, and by a roofline its time, within about 10 %. Without one, from
FLOPs and array sizes alone.

The last line is one JSON object. In it attention_calls, bf16_gemms and fp8_gemms count one
micro-batch; kernels, optimizer_gemms and collectives a whole step, as the compiler combined them;
ms divides the step by kind of work, "exposed" being the wait for collectives. With --engine-slots
the keys engine_*, decode_* and prefill_* follow: of one GPU, of one token for every row, of one
chunk of a prompt.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from nanochat_jax.cli import run_script
from nanochat_jax.config import parse
from nanochat_jax.devices import GPUS, find_device, peak_flops
from nanochat_jax.planner import estimate
from nanochat_jax.planner.gpus import GIB, GPUS_PER_NODE, described
from nanochat_jax.planner.program import CompiledStep, compile_engine, compile_step, search_largest
from nanochat_jax.scaling import Plan
from nanochat_jax.stages.pretraining import decide
from nanochat_jax.stages.settings import PretrainConfig

# Known only from a compiled program: null in the JSON of a plan by arithmetic.
PROGRAM_KEYS = (
    *("compile_s", "lower_s", "kernels", "attention_calls", "fp8_gemms", "bf16_gemms"),
    *("reduce_scatters", "all_gathers", "all_reduces"),
)


@dataclass(frozen=True)
class PlanConfig(PretrainConfig):
    """The settings of pretrain.py, and the machine to plan for."""

    target: str = "auto"
    """h100 or h200; with --no-compile any GPU by name, or cpu; auto: this machine."""
    gpus: int | None = None
    """Devices; the default is this machine's for auto, else one node of eight."""
    vocab_size: int | None = None
    """Tokens in the vocabulary; the default is the recipe's, or the preset's tokenizer's."""
    compile: bool = True
    """Compile the step and read the program; else arithmetic alone."""
    max_batch_search: bool = False
    """Check the largest batch by compiling it too (up to three more compiles)."""
    engine_slots: int = 0
    """Also compile the inference engine, with this many rows on one GPU; 0: do not."""
    usd_per_gpu_hour: float = 3.0
    """Price of one GPU."""


def main() -> None:
    # Only the compiler is wanted: without this JAX would look for a GPU, and fail without one.
    jax.config.update("jax_platforms", "cpu")
    config = parse(PlanConfig, "pretrain", description=__doc__)
    if config.target == "auto":
        found, number = estimate.this_machine()
    else:
        found, number = config.target, 1 if config.target == "cpu" else GPUS_PER_NODE
    target, devices = described(found) or found, config.gpus or number
    if config.target == "auto" and target != "cpu" and find_device(target) is None:
        print(f"No data sheet of {target!r} in nanochat_jax/devices.py: no plan for this machine.")
        return
    plan = decide(config, config.vocab_size or estimate.vocabulary(config), devices)
    if config.compile and target in GPUS:
        compiled = compile_step(plan, target)
        cost, program = compiled.cost(), read_program(config, compiled)
    else:
        cost, program = estimate.estimate(plan, target), {}
    if program and config.engine_slots:
        program |= compile_engine(plan.config, target, config.engine_slots)
    summary = summarise(config, plan, cost, target) | program
    show(plan, summary, cost)
    print(json.dumps(summary))


def summarise(
    config: PlanConfig, plan: Plan, cost: estimate.StepCost, target: str
) -> dict[str, Any]:
    """What every plan says, compiled or not."""
    shards = estimate.shards_needed(plan.total_tokens, config.dataset)
    # The checkpoints kept, the best one, and the one being written.
    disk = shards * estimate.SHARD_BYTES + estimate.state_bytes(plan) * (config.keep_last + 2)
    # Of the devices' bfloat16 peak; a CPU has none.
    peak, flops = peak_flops(target), plan.flops_per_token * plan.total_batch_size / plan.n_devices
    hours = plan.num_iterations * cost.step_s / 3600
    price = 0.0 if target == "cpu" else config.usd_per_gpu_hour
    return {
        "depth": plan.depth,
        "recipe": plan.recipe,
        "target": target,
        "gpus": plan.n_devices,
        "device_batch_size": plan.device_batch_size,
        "grad_accum_steps": plan.grad_accum_steps,
        "peak_gib": round(cost.peak_bytes / GIB, 2),
        "capacity_gib": round(cost.capacity / GIB, 1),
        "fits": cost.fits,
        "max_device_batch": cost.max_device_batch,
        "ms_per_microbatch": round(cost.microbatch_s * 1e3, 2),
        "ms_per_step": round(cost.step_s * 1e3, 2),
        "tokens_per_s": round(plan.total_batch_size / cost.step_s),
        "mfu": round(flops / cost.step_s / peak, 4) if peak else None,
        "steps": plan.num_iterations,
        "hours": round(hours, 3),
        "usd": round(hours * plan.n_devices * price, 2),
        "shards": shards,
        "disk_gb": round(disk / 1e9, 2),
        "compiled": False,
        **dict.fromkeys(PROGRAM_KEYS),
    }


def read_program(config: PlanConfig, compiled: CompiledStep) -> dict[str, Any]:
    """What is known only from the compiled program."""
    found: dict[str, Any] = {"compiled": True, "max_device_batch_compiled": False}
    if config.max_batch_search:
        found["max_device_batch"] = search_largest(compiled)
        found["max_device_batch_compiled"] = True
    found["lower_s"] = round(compiled.lower_s, 1)
    found["compile_s"] = round(compiled.compile_s, 1)
    found["ms"] = {name: round(ms, 2) for name, ms in compiled.times().items()}
    return found | compiled.counts()


def show(plan: Plan, summary: dict[str, Any], cost: estimate.StepCost) -> None:
    table = Table(title=f"Plan: depth {plan.depth}, {plan.recipe} recipe, {cost.how}")
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_column("meaning")
    for row in rows(plan, summary):
        table.add_row(*row)
    console = Console()
    console.print(table)
    if not cost.fits:
        console.print(
            f"Does not fit: set --device-batch-size {max(1, summary['max_device_batch'])}"
            " (the gradients are accumulated, the result stays the same)."
        )


def rows(plan: Plan, s: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(what, value, meaning) of the table, from the summary `s`."""
    steps = f"{s['steps']:,} steps of {plan.total_batch_size:,}"
    batch = f"{s['gpus']} × {plan.grad_accum_steps} micro-batches of {s['device_batch_size']} rows"
    whose = "as compiled" if s.get("max_device_batch_compiled") else "estimated"
    duration = f"{s['hours']:.2f} h" if s["hours"] >= 1 else f"{s['hours'] * 60:.1f} min"
    yield "parameters", f"{plan.params.total:,}", f"{plan.flops_per_token:.3e} FLOPs a token"
    yield "tokens", f"{plan.total_tokens:,}", steps
    usable = f"of {s['capacity_gib']} GiB that it may take; {batch}"
    yield "peak memory", f"{s['peak_gib']} GiB", usable
    yield "largest device batch", str(s["max_device_batch"]), f"rows that fit, {whose}"
    yield "micro-batch", f"{s['ms_per_microbatch']:,} ms", "forward and backward"
    yield "step", f"{s['ms_per_step']:,} ms", f"{s['tokens_per_s']:,} tokens a second"
    yield "time", duration, "training alone, without validation and samples"
    yield "price", f"{s['usd']:,.2f} USD", "of these devices for that time"
    yield "text", f"{s['shards']} shards", "of the published data set, validation included"
    yield "disk", f"{s['disk_gb']} GB", "text and checkpoints"
    if s["compiled"]:
        gemms = f"{s['bf16_gemms']} bf16, {s['fp8_gemms']} fp8"
        gathers = f"{s['all_gathers']} gathers, {s['all_reduces']} all-reduces"
        milliseconds = ", ".join(f"{name} {ms:.0f}" for name, ms in s["ms"].items())
        yield "kernels", f"{s['kernels']:,}", "launched in a step"
        yield "attention calls", str(s["attention_calls"]), "cuDNN, in a micro-batch"
        yield "matrix products", gemms, "cuBLAS, in a micro-batch"
        yield "collectives", f"{s['reduce_scatters']} reduce-scatters", gathers
        yield "compile", f"{s['compile_s']} s", f"and {s['lower_s']} s to trace"
        yield "a step's ms", "", milliseconds
    if "engine_slots" in s:
        token = f"{s['decode_kernels']} kernels, {s['decode_gb_per_token']} GB"
        chunk = f"a chunk of {s['prefill_tokens']} tokens, {s['prefill_kernels']} kernels"
        yield "engine memory", f"{s['engine_peak_gib']} GiB", f"{s['engine_slots']} rows on one GPU"
        yield "decode", f"{s['decode_ms_per_token']} ms", f"a token for every row: {token}"
        yield "", f"{s['decode_tokens_per_s']:,} tokens/s", "of all rows"
        yield "prompt", f"{s['prefill_ms']} ms", chunk


if __name__ == "__main__":
    run_script(main)
