"""Predicts how long a compiled GPU program takes, from its kernels and a data sheet.

Each kernel takes the longer of its arithmetic and its memory traffic, at the fractions of the peak
that such kernels reach in practice. With these fractions the original's published step times on
8×H100 come out within 10 %; that is how far a prediction can be trusted, and nothing here is a
measurement. Collectives run on their own stream beside the kernels; what the schedule does not hide
is reported.
"""

from collections import defaultdict
from dataclasses import dataclass, field

from nanochat_jax.devices import Gpu
from nanochat_jax.planner.hlo import Kernel, Loop, Module, Wait

BANDWIDTH_SHARE = 0.85  # of the memory bandwidth: elementwise kernels, copies, reductions
PEAK_SHARE = {"bf16_gemm": 0.75, "fp8_gemm": 0.62, "f32_gemm": 0.75, "attention": 0.42}
LINK_SHARE = 0.80  # of one direction of NVLink: what NCCL's large collectives reach on 8 GPUs
KERNEL_FLOOR_S = 2e-6  # no kernel is shorter than its launch
COLLECTIVE_FLOOR_S = 20e-6  # latency of a NCCL call over 8 GPUs
MODEL, OPTIMIZER = "model", "optimizer"


def kernel_seconds(kernel: Kernel, gpu: Gpu) -> float:
    """Seconds of one launch by the roofline; for a collective, of its communication."""
    if kernel.group > 1:  # a ring of n passes on (n − 1)/n of the array; all-reduce does so twice
        rounds = 2 if kernel.kind == "all_reduce" else 1
        sent = rounds * kernel.bytes * (kernel.group - 1) / kernel.group
        return max(sent / (gpu.link_bandwidth * LINK_SHARE), COLLECTIVE_FLOOR_S)
    memory = kernel.bytes / (gpu.bandwidth * BANDWIDTH_SHARE)
    if kernel.kind not in PEAK_SHARE:
        return max(memory, KERNEL_FLOOR_S)
    peak = {"fp8_gemm": gpu.fp8_flops, "f32_gemm": gpu.tf32_flops}.get(kernel.kind, gpu.bf16_flops)
    return max(memory, kernel.flops / (peak * PEAK_SHARE[kernel.kind]), KERNEL_FLOOR_S)


@dataclass
class Timeline:
    """Seconds of a program: its kernels, its collectives, and what of these nothing hides."""

    # (part, kind) -> seconds of kernels that are no collectives
    seconds: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    communication: float = 0.0
    exposed: float = 0.0  # waiting for collectives

    @property
    def compute(self) -> float:
        return sum(self.seconds.values(), 0.0)

    @property
    def total(self) -> float:
        return self.compute + self.exposed

    def part(self, part: str) -> float:
        return sum(s for (where, _), s in self.seconds.items() if where == part)


def timeline(
    module: Module, gpu: Gpu, computation: str | None = None, part: str = OPTIMIZER
) -> Timeline:
    """Walks the schedule with one stream of kernels and one of collectives.

    `part` is where kernels without a path of their own belong until one with a path says otherwise.
    """
    result = Timeline()
    now = link_free = 0.0
    ready: dict[str, float] = {}
    for event in module.schedule(computation):
        if isinstance(event, Loop):
            launches = module.launches(event.body)
            is_model = any("jvp(" in kernel.op_name for kernel, _ in launches)
            body = timeline(module, gpu, event.body, MODEL if is_model else OPTIMIZER)
            for key, seconds in body.seconds.items():
                result.seconds[key] += seconds * event.trips
            result.communication += body.communication * event.trips
            result.exposed += body.exposed * event.trips
            now += body.total * event.trips
        elif isinstance(event, Wait):
            waited = max(0.0, ready.get(event.name, now) - now)
            result.exposed += waited
            now += waited
        elif event.group > 1:
            seconds = kernel_seconds(event, gpu)
            link_free = max(link_free, now) + seconds
            result.communication += seconds
            ready[event.name] = link_free
            if not event.is_async:
                result.exposed += link_free - now
                now = link_free
        else:
            seconds = kernel_seconds(event, gpu)
            part = part_of(event, part)
            result.seconds[part, event.kind] += seconds
            now += seconds
    return result


def part_of(kernel: Kernel, unknown: str = OPTIMIZER) -> str:
    """MODEL for forward, backward and gradient accumulation, OPTIMIZER for the rest of the step.

    JAX writes "jvp(" into the path of everything that is differentiated; accumulation is the other
    thing that happens in the loop over micro-batches.
    """
    path = kernel.op_name
    if not path:
        return unknown
    in_scan = "while/body" in path and "optimizer" not in path
    return MODEL if "jvp(" in path or in_scan else OPTIMIZER
