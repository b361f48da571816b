"""Reads the optimised HLO that XLA made for a GPU: which kernels run, how often, what each moves.

The text comes from `compiled.as_text()`. Its computations are printed in the order in which they
will run ("is_scheduled=true"), so one walk over the entry gives the launches of a step; a loop's
body counts once per trip. Nothing here needs a GPU or JAX: it is text in, numbers out.
roofline.py turns the kernels into milliseconds.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

# Instructions that only name or regroup buffers: no kernel is launched for them.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier",
    "add-dependency", "partition-id", "replica-id", "domain",
}  # fmt: skip
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "token": 0, "opaque": 0}


@dataclass(frozen=True)
class Instruction:
    """One line of HLO: `%name = shape opcode(operands), attributes`."""

    name: str
    opcode: str
    shape: str
    argument: str  # the text between the parentheses
    attributes: str
    is_root: bool

    @cached_property
    def operands(self) -> tuple[str, ...]:
        return tuple(re.findall(r"%([\w.\-]+)", self.argument))

    def called(self, key: str) -> str | None:
        """The computation that an attribute such as calls= or body= names."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None

    def text(self, key: str) -> str:
        """A quoted attribute such as custom_call_target= or op_name=; empty when absent."""
        found = re.search(rf'\b{key}="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def backend_config(self) -> dict[str, Any]:
        marker = "backend_config="
        start = self.attributes.find(marker)
        if start < 0:
            return {}
        config, _ = json.JSONDecoder().raw_decode(self.attributes, start + len(marker))
        return config if isinstance(config, dict) else {}


@dataclass(frozen=True)
class Computation:
    instructions: dict[str, Instruction]

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in instruction.operands:
                if operand in users:
                    users[operand].append(instruction)
        return users


@dataclass(frozen=True)
class Module:
    """A parsed HLO module; `computations[entry]` is the program."""

    computations: dict[str, Computation]
    entry: str
    kernels: dict[str, list["Kernel | Loop | Wait"]] = field(default_factory=dict, repr=False)

    def schedule(self, computation: str | None = None) -> list["Kernel | Loop | Wait"]:
        """What a computation (default: the entry) launches, in order."""
        name = computation or self.entry
        if name not in self.kernels:
            self.kernels[name] = list(_schedule(self, self.computations[name]))
        return self.kernels[name]

    def launches(self, computation: str | None = None) -> Iterator[tuple["Kernel", int]]:
        """Every kernel of a computation with the number of times it runs, loops included."""
        for event in self.schedule(computation):
            if isinstance(event, Kernel):
                yield event, 1
            elif isinstance(event, Loop):
                for kernel, times in self.launches(event.body):
                    yield kernel, times * event.trips


@dataclass(frozen=True)
class Kernel:
    """One launch: a fusion, a library call, a copy or a collective.

    kind: "bf16_gemm", "fp8_gemm", "f32_gemm", "attention", "fusion", "copy", "other", or a
    collective as "all_reduce", "all_gather", "reduce_scatter", … `bytes` is what it reads and
    writes in device memory (for a collective: the larger of what goes in and what comes out),
    `flops` counts matrix products only.
    """

    name: str
    kind: str
    bytes: float
    flops: float
    op_name: str  # the path of jax.named_scope and primitives that it came from
    group: int = 1  # devices that take part in a collective
    is_async: bool = False  # a matching Wait follows


@dataclass(frozen=True)
class Wait:
    """The point where the program needs the result of the asynchronous kernel `name`."""

    name: str


@dataclass(frozen=True)
class Loop:
    body: str
    trips: int


# --- text -> module -----------------------------------------------------------------------------


def parse(text: str) -> Module:
    """Parses `compiled.as_text()`. ValueError when the text holds no entry computation."""
    computations: dict[str, Computation] = {}
    entry, current = None, None
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if header:
            current = computations[header[2]] = Computation({})
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (instruction := _instruction(line)):
            current.instructions[instruction.name] = instruction
    if entry is None:
        raise ValueError("the text is not an HLO module: it has no ENTRY computation")
    return Module(computations, entry)


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"\s+(ROOT )?%([\w.\-]+) = ", line)
    if not found:
        return None
    rest = line[found.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode, _, _ = rest[end:].strip().partition("(")
    start = end + rest[end:].index("(")
    stop = _closing(rest, start)
    argument, attributes = rest[start + 1 : stop], rest[stop + 1 :]
    return Instruction(found[2], opcode, rest[:end], argument, attributes, bool(found[1]))


def _closing(text: str, start: int) -> int:
    """The position of the parenthesis that closes the one at `start`."""
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == "(") - (text[position] == ")")
        if depth == 0:
            return position
    raise ValueError(f"unbalanced parentheses in HLO: {text[start : start + 80]!r}")


# --- shapes -------------------------------------------------------------------------------------


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """(element type, dimensions) of every array in an HLO shape, tuples flattened."""
    found = re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", shape)
    return [(kind, tuple(int(d) for d in dims.split(",") if d)) for kind, dims in found]


def element_bytes(kind: str) -> float:
    if kind in _BYTES:
        return _BYTES[kind]
    digits = re.search(r"\d+", kind)
    return int(digits.group()) / 8 if digits else 0


def shape_bytes(shape: str) -> float:
    return sum(element_bytes(kind) * math.prod(dims) for kind, dims in arrays(shape))


# --- module -> kernels --------------------------------------------------------------------------


def _schedule(module: Module, computation: Computation) -> Iterator[Kernel | Loop | Wait]:
    for instruction in computation.instructions.values():
        opcode = instruction.opcode
        if opcode in _FREE:
            continue
        if opcode == "while":
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', instruction.attributes)
            yield Loop(instruction.called("body") or "", int(trips[1]) if trips else 1)
        elif opcode == "call":
            yield Loop(instruction.called("to_apply") or "", 1)
        elif opcode == "conditional":
            branches = re.search(r"branch_computations=\{%?([\w.\-]+)", instruction.attributes)
            first = branches[1] if branches else instruction.called("true_computation")
            yield Loop(first or "", 1)
        elif opcode.endswith("-done"):
            yield Wait(instruction.operands[0])
        else:
            yield _kernel(module, computation, instruction)


def _kernel(module: Module, computation: Computation, instruction: Instruction) -> Kernel:
    """The launch of an instruction, or of the computation that it calls: its members, `where`."""
    inner = module.computations.get(instruction.called("calls") or "")
    where = inner or computation
    members = [*inner.instructions.values()] if inner else [instruction]
    found = _communication(where, members, instruction)
    if found is None:
        kind, flops = _work(where, members, "fusion" if inner else "other")
        kind = "copy" if instruction.opcode.startswith("copy") else kind
        moved = _fusion_bytes(where) if inner else _call_bytes(computation, instruction)
        names = [i.text("op_name") for i in (instruction, *members)]
        op_name = names[0] if "/" in names[0] else max(names, key=len)  # a bare fusion has none
        found = Kernel(instruction.name, kind, moved, flops, op_name)
    return replace(found, is_async=instruction.opcode.endswith("-start"))


def _communication(where, members, instruction) -> Kernel | None:
    """The kernel of a collective, also of one that XLA wrapped into a fusion or an async call."""
    for candidate in members:
        name = candidate.opcode.removesuffix("-start")
        if name in COLLECTIVES:
            ins = sum(shape_bytes(where.instructions[o].shape) for o in candidate.operands)
            outs = shape_bytes(candidate.shape)
            if candidate.opcode.endswith("-start") and name != "all-reduce":
                outs -= ins  # the start's shape lists its operands too
            size = ins if name == "all-reduce" else max(ins, outs)
            op_name = instruction.text("op_name") or candidate.text("op_name")
            kind, group = name.replace("-", "_"), _group_size(candidate)
            return Kernel(instruction.name, kind, size, 0.0, op_name, group)
    return None


def _group_size(collective: Instruction) -> int:
    """Devices per group, from the three ways in which XLA prints replica_groups."""
    text = collective.attributes
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'?([\w.]+)'?=(\d+)", found[1]))
        return math.prod(int(sizes.get(a, 1)) for a in re.findall(r"[\w.]+", found[2]))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", text):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return len(found[1].split(","))
    return 1


def _work(where: Computation, members: list[Instruction], kind: str) -> tuple[str, float]:
    """(kind, floating-point operations) of a kernel; the kind is the given one without products."""
    flops = 0.0
    for member in members:
        target = member.text("custom_call_target")
        if "fmha" in target:
            return "attention", attention_flops(where, member)
        if member.opcode == "dot" or "$matmul" in target or "$gemm" in target:
            element, _ = arrays(where.instructions[member.operands[0]].shape)[0]
            kind = "f32_gemm" if element in ("f32", "f64") else "bf16_gemm"
            kind = "fp8_gemm" if target.endswith("$f8") else kind
            flops += gemm_flops(where, member)
    return kind, flops


def gemm_flops(computation: Computation, gemm: Instruction) -> float:
    """2 · (elements of the result) · (length of the contraction)."""
    config = gemm.backend_config.get("gemm_backend_config", {})
    dims = config.get("dot_dimension_numbers", {}).get("lhs_contracting_dimensions")
    if dims is None:
        found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", gemm.attributes)
        dims = [d for d in found[1].split(",") if d] if found else []
    lhs = arrays(computation.instructions[gemm.operands[0]].shape)[0][1]
    result = arrays(gemm.shape)[0][1]
    return 2.0 * math.prod(result) * math.prod(lhs[int(d)] for d in dims)


def attention_flops(computation: Computation, call: Instruction) -> float:
    """Products inside the mask only: two forward, five backward, 2·H for every query and key."""
    config = call.backend_config["cudnn_fmha_backend_config"]
    B, N, T, S = (int(d) for d in config["intermediate_tensor_shape"]["dimensions"])
    H = arrays(computation.instructions[call.operands[0]].shape)[0][1][-1]
    causal = "CAUSAL" in config.get("mask_type", "")
    window = int(config.get("sliding_window_length", 0)) or T
    pairs = sum(min(i + 1, window) for i in range(T)) if causal else T * S
    products = 5 if "Backward" in call.text("custom_call_target") else 2
    return 2.0 * products * B * N * H * pairs


# --- bytes --------------------------------------------------------------------------------------


def _fusion_bytes(fused: Computation) -> float:
    inside = fused.instructions.values()
    reads = sum(_read(fused, i.name) for i in inside if i.opcode == "parameter")
    return reads + _written(fused, next(i for i in inside if i.is_root))


def _call_bytes(computation: Computation, instruction: Instruction) -> float:
    operands = [computation.instructions[o] for o in instruction.operands]
    outputs = arrays(instruction.shape)
    if instruction.opcode == "custom-call":
        outputs = outputs[:-1] if len(outputs) > 1 else outputs  # the last one is scratch memory
    written = sum(element_bytes(kind) * math.prod(dims) for kind, dims in outputs)
    return sum(shape_bytes(o.shape) for o in operands) + written


def _read(fused: Computation, name: str) -> float:
    """Bytes of a fusion's operand that it really reads: slices and gathers touch only a part."""
    whole = shape_bytes(fused.instructions[name].shape)
    touched = 0.0
    for user in fused.users[name]:
        is_first = user.operands[0] == name
        if user.opcode in ("slice", "dynamic-slice") or (user.opcode == "gather" and is_first):
            touched += shape_bytes(user.shape)
        elif user.opcode in ("bitcast", "get-tuple-element"):
            touched += _read(fused, user.name)
        elif user.opcode in ("dynamic-update-slice", "scatter") and is_first:
            continue  # updated in place: counted where it is written
        else:
            return whole
    return min(whole, touched)


def _written(fused: Computation, root: Instruction) -> float:
    """Bytes that a fusion writes; an update in place writes its part (a scatter also reads it)."""
    if root.opcode == "tuple":
        return sum(_written(fused, fused.instructions[o]) for o in root.operands)
    if root.opcode == "bitcast":
        return _written(fused, fused.instructions[root.operands[0]])
    if root.opcode == "dynamic-update-slice":
        return shape_bytes(fused.instructions[root.operands[1]].shape)
    if root.opcode == "scatter":
        return 2 * shape_bytes(fused.instructions[root.operands[2]].shape)
    if root.opcode == "custom-call":
        outputs = arrays(root.shape)
        return element_bytes(outputs[0][0]) * math.prod(outputs[0][1])
    return shape_bytes(root.shape)
