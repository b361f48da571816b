"""The HLO reader against a real compiled program and against small programs written out here.

hlo/toy_step.hlo is what XLA made for 8 × H200 of a step with the shape of ours (debugging
metadata removed): weights gathered from a stack of 8 matrices 256 × 256; two micro-batches in a
scan and one after it, each with four products (three merged into one by XLA) and one attention
over 512 tokens that reaches 128 back; gradients reduce-scattered, their norm all-reduced, a float32
product.
"""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_jax.planner import hlo

TOKENS, WIDTH, HEADS, ROWS, REACH = 2 * 512, 256, 2, 2, 128
MICRO_BATCHES = 3


@pytest.fixture(scope="module")
def toy() -> hlo.Module:
    return hlo.parse((Path(__file__).parent / "hlo" / "toy_step.hlo").read_text(encoding="utf-8"))


def kernels(text: str) -> list[hlo.Kernel]:
    return [kernel for kernel, _ in hlo.parse(text).launches()]


def entry(*lines: str) -> str:
    return (
        "HloModule m\n\nENTRY %main () -> f32[] {\n" + "\n".join(f"  {x}" for x in lines) + "\n}\n"
    )


def test_a_loop_counts_once_a_trip(toy):
    counts = Counter()
    for kernel, times in toy.launches():
        counts[kernel.kind] += times
    per_micro_batch = 2 + 3  # merged qkv and o; backward: o's input, o's and qkv's weights
    assert counts["bf16_gemm"] == MICRO_BATCHES * per_micro_batch
    assert counts["attention"] == MICRO_BATCHES * 2
    assert counts["f32_gemm"] == 1
    assert counts["all_gather"] == counts["reduce_scatter"] == counts["all_reduce"] == 1
    assert [e.trips for e in toy.schedule() if isinstance(e, hlo.Loop)] == [MICRO_BATCHES - 1]


def test_flops_are_those_of_the_formula(toy):
    flops = Counter()
    for kernel, times in toy.launches():
        flops[kernel.kind] += kernel.flops * times
    matrices = 4 + 1 + 4  # forward, gradient of o's input, gradients of the weights
    assert flops["bf16_gemm"] == MICRO_BATCHES * matrices * 2 * TOKENS * WIDTH**2
    pairs = sum(min(i + 1, REACH + 1) for i in range(512))
    products = 2 + 5
    assert flops["attention"] == MICRO_BATCHES * products * 2 * pairs * WIDTH * ROWS
    assert flops["f32_gemm"] == 2 * WIDTH**3


def test_collectives_have_their_bytes_and_their_group(toy):
    found = {k.kind: k for k, _ in toy.launches() if k.group > 1}
    stack = 8 * WIDTH * WIDTH * 2  # bfloat16
    assert found["all_gather"].bytes == found["reduce_scatter"].bytes == stack
    assert found["all_reduce"].bytes == 4
    assert {k.group for k in found.values()} == {8}
    assert found["all_gather"].is_async
    waits = [e.name for e in toy.schedule() if isinstance(e, hlo.Wait)]
    assert found["all_gather"].name in waits


def test_a_slice_of_a_stack_costs_only_the_slice(toy):
    """The product that reads matrix 3 of the stack moves one matrix; its scratch is no traffic."""
    gemm = next(k for k, _ in toy.launches() if k.name == "dynamic_slice_fusion.2")
    assert gemm.bytes == 2 * (WIDTH * WIDTH + 2 * TOKENS * WIDTH)


def test_update_in_place_costs_what_it_changes():
    text = """HloModule m

%update (p0: f32[100,1000], p1: f32[1,1000], p2: s32[]) -> f32[100,1000] {
  %p0 = f32[100,1000]{1,0} parameter(0)
  %p1 = f32[1,1000]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  ROOT %d = f32[100,1000]{1,0} dynamic-update-slice(%p0, %p1, %p2, %p2)
}

ENTRY %main (a: f32[100,1000], b: f32[1,1000], i: s32[]) -> f32[100,1000] {
  %a = f32[100,1000]{1,0} parameter(0)
  %b = f32[1,1000]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %f = f32[100,1000]{1,0} fusion(%a, %b, %i), kind=kLoop, calls=%update
}
"""
    (kernel,) = kernels(text)
    assert kernel.bytes == 4000 + 4 + 4000


def test_a_gather_reads_the_rows_it_takes():
    text = """HloModule m

%rows (p0: bf16[32768,64], p1: s32[10]) -> bf16[10,64] {
  %p0 = bf16[32768,64]{1,0} parameter(0)
  %p1 = s32[10]{0} parameter(1)
  ROOT %g = bf16[10,64]{1,0} gather(%p0, %p1), offset_dims={1}, slice_sizes={1,64}
}

ENTRY %main (a: bf16[32768,64], i: s32[10]) -> bf16[10,64] {
  %a = bf16[32768,64]{1,0} parameter(0)
  %i = s32[10]{0} parameter(1)
  ROOT %f = bf16[10,64]{1,0} fusion(%a, %i), kind=kLoop, calls=%rows
}
"""
    (kernel,) = kernels(text)
    assert kernel.bytes == 2 * (10 * 64 * 2) + 40


def test_fp8_products_are_distinguished_from_bf16_ones():
    text = entry(
        "%x = f8e4m3fn[64,32]{1,0} parameter(0)",
        "%w = f8e4m3fn[16,32]{1,0} parameter(1)",
        "%s = f32[] parameter(2)",
        "%g = (bf16[64,16]{1,0}, s8[33554432]{0}) custom-call(%x, %w, %s, %s), custom_call_target="
        '"__cublas$lt$matmul$f8", backend_config={"gemm_backend_config":{"dot_dimension_numbers":'
        '{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"]}}}',
        "%y = bf16[64,16]{1,0} get-tuple-element(%g), index=0",
        "%z = bf16[16,16]{1,0} dot(%y, %y), lhs_contracting_dims={0}, rhs_contracting_dims={0}",
        "ROOT %c = bf16[16,16]{1,0} copy(%z)",
    )
    fp8, bf16, copy = kernels(text)
    assert (fp8.kind, fp8.flops) == ("fp8_gemm", 2 * 64 * 16 * 32)
    assert fp8.bytes == 64 * 32 + 16 * 32 + 8 + 64 * 16 * 2
    assert (bf16.kind, bf16.flops) == ("bf16_gemm", 2 * 16 * 16 * 64)
    assert (copy.kind, copy.bytes) == ("copy", 2 * 16 * 16 * 2)


@pytest.mark.parametrize(
    "groups", ["replica_groups=mesh['data'=4] {'data'}", "replica_groups=[2,4]<=[8]",
               "replica_groups={{0,1,2,3},{4,5,6,7}}"]
)  # fmt: skip
def test_group_size_in_every_spelling(groups):
    text = entry(
        "%p = f32[8]{0} parameter(0)",
        f"ROOT %r = f32[8]{{0}} all-reduce(%p), {groups}, to_apply=%add",
    )
    (kernel,) = kernels(text)
    assert (kernel.kind, kernel.group, kernel.bytes) == ("all_reduce", 4, 32)


@given(
    tokens=st.integers(1, 24),
    window=st.integers(0, 30),
    causal=st.booleans(),
    backward=st.booleans(),
)
def test_attention_flops_count_the_mask(tokens, window, causal, backward):
    i, j = np.mgrid[:tokens, :tokens]
    seen = (j <= i) & (i - j <= window if window else True) if causal else np.ones_like(i, bool)
    target = "__cudnn$fmhaSoftmax" + ("Backward" if backward else "")
    mask, length = ("CAUSAL", window + 1 if window else 0) if causal else ("NO_MASK", 0)
    text = entry(
        f"%q = bf16[2,{tokens},3,16]{{3,2,1,0}} parameter(0)",
        f"ROOT %a = (bf16[2,3,{tokens},16]{{3,1,2,0}}, u8[0]{{0}}) custom-call(%q, %q, %q), "
        f'custom_call_target="{target}", backend_config={{"cudnn_fmha_backend_config":'
        f'{{"intermediate_tensor_shape":{{"dimensions":["2","3","{tokens}","{tokens}"]}},'
        f'"mask_type":"{mask}","sliding_window_length":{length}}}}}',
    )
    (kernel,) = kernels(text)
    assert kernel.kind == "attention"
    assert kernel.flops == (5 if backward else 2) * 2 * 16 * 2 * 3 * seen.sum()


SIZES = {"pred": 1, "s8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s32": 4, "f32": 4}
ARRAYS = st.tuples(st.sampled_from(list(SIZES)), st.lists(st.integers(0, 9), max_size=4))


@given(st.lists(ARRAYS, min_size=1, max_size=4))
def test_shape_bytes(parts):
    shape = ", ".join(f"{kind}[{','.join(map(str, dims))}]{{0}}" for kind, dims in parts)
    assert hlo.shape_bytes(f"({shape})") == sum(SIZES[k] * math.prod(d) for k, d in parts)


def test_a_loop_without_a_known_count_runs_once():
    text = """HloModule m

%body (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %c = f32[4]{0} copy(%p)
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  ROOT %w = f32[4]{0} while(%a), condition=%cond, body=%body
}
"""
    assert [(k.kind, times) for k, times in hlo.parse(text).launches()] == [("copy", 1)]


def test_text_that_is_no_module_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("module @jit_step { func.func public @main() }")
