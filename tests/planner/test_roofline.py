"""The roofline's arithmetic, and its two streams, on schedules written out here."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_jax.devices import GPUS
from nanochat_jax.planner import roofline
from nanochat_jax.planner.hlo import Kernel, Loop, Module, Wait

H200 = GPUS["h200"]
MODEL_PATH = "step/jvp()/dot_general"


def fusion(seconds: float, name: str = "f", path: str = MODEL_PATH) -> Kernel:
    return Kernel(name, "fusion", seconds * H200.bandwidth * roofline.BANDWIDTH_SHARE, 0.0, path)


def gather(seconds: float, name: str = "g", is_async: bool = True) -> Kernel:
    sent = seconds * H200.link_bandwidth * roofline.LINK_SHARE
    return Kernel(name, "all_gather", sent * 8 / 7, 0.0, "", group=8, is_async=is_async)


def run(*events, bodies=None) -> roofline.Timeline:
    module = Module({}, "main", {"main": list(events), **(bodies or {})})
    return roofline.timeline(module, H200)


def test_a_product_takes_its_share_of_the_peak_or_its_memory_time():
    work = Kernel("k", "bf16_gemm", 0.0, 989.4e12 * 0.75, MODEL_PATH)
    assert roofline.kernel_seconds(work, H200) == pytest.approx(1.0)
    thin = Kernel("k", "bf16_gemm", 4800e9 * 0.85 * 2, 989.4e12 * 0.75, MODEL_PATH)
    assert roofline.kernel_seconds(thin, H200) == pytest.approx(2.0)
    fp8 = Kernel("k", "fp8_gemm", 0.0, 1978.9e12 * 0.62, MODEL_PATH)
    assert roofline.kernel_seconds(fp8, H200) == pytest.approx(1.0)
    attention = Kernel("k", "attention", 0.0, 989.4e12 * 0.42, MODEL_PATH)
    assert roofline.kernel_seconds(attention, H200) == pytest.approx(1.0)


def test_elementwise_is_bandwidth_and_never_under_a_launch():
    assert roofline.kernel_seconds(fusion(0.5), H200) == pytest.approx(0.5)
    assert roofline.kernel_seconds(fusion(1e-9), H200) == roofline.KERNEL_FLOOR_S
    assert roofline.kernel_seconds(fusion(1.0), GPUS["h100"]) == pytest.approx(4800 / 3352.32)


def test_an_all_reduce_goes_round_twice():
    once = gather(0.1)
    twice = Kernel("r", "all_reduce", once.bytes, 0.0, "", group=8)
    assert roofline.kernel_seconds(once, H200) == pytest.approx(0.1)
    assert roofline.kernel_seconds(twice, H200) == pytest.approx(0.2)


def test_work_between_start_and_wait_hides_a_collective():
    hidden = run(gather(1.0), fusion(2.0), Wait("g"))
    assert (hidden.exposed, hidden.total) == (0.0, pytest.approx(2.0))
    half = run(gather(1.0), fusion(0.25), Wait("g"))
    assert (half.exposed, half.total) == (pytest.approx(0.75), pytest.approx(1.0))
    late = run(fusion(2.0), gather(1.0), Wait("g"))
    assert (late.exposed, late.total) == (pytest.approx(1.0), pytest.approx(3.0))


def test_a_synchronous_collective_hides_behind_nothing():
    assert run(gather(1.0, is_async=False), fusion(2.0)).total == pytest.approx(3.0)


def test_collectives_wait_for_each_other():
    line = run(gather(1.0, "a"), gather(1.0, "b"), Wait("a"), fusion(0.5), Wait("b"))
    assert line.total == pytest.approx(2.0)
    assert line.exposed == pytest.approx(1.5)


def test_a_loop_is_its_body_times_its_trips_and_belongs_to_the_model():
    body = [fusion(1.0, path=""), fusion(0.5, path=MODEL_PATH)]
    line = run(Loop("body", 3), fusion(0.25, path="step/optimizer/mul"), bodies={"body": body})
    assert line.part(roofline.MODEL) == pytest.approx(4.5)
    assert line.part(roofline.OPTIMIZER) == pytest.approx(0.25)
    assert line.total == pytest.approx(4.75)


def test_a_kernel_without_a_path_belongs_where_its_predecessor_does():
    line = run(fusion(1.0, path=""), fusion(1.0), fusion(1.0, path=""))
    assert line.part(roofline.OPTIMIZER) == pytest.approx(1.0)
    assert line.part(roofline.MODEL) == pytest.approx(2.0)


@given(st.lists(st.tuples(st.booleans(), st.floats(0.001, 1.0)), min_size=1, max_size=12))
def test_the_total_lies_between_the_longer_stream_and_their_sum(steps):
    events: list = []
    for i, (is_collective, seconds) in enumerate(steps):
        events.append(gather(seconds, f"g{i}") if is_collective else fusion(seconds))
    waits = [Wait(e.name) for e in events if e.group > 1]
    line = run(*events, *waits)
    assert max(line.compute, line.communication) <= line.total + 1e-9
    assert line.total <= line.compute + line.communication + 1e-9
