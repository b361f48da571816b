"""Planning: arithmetic that must be right without a compiler, the command line, and, where the CUDA
wheels are installed (marker gpu_compile), the counts of the real step compiled for 8 × H200.
"""

import dataclasses
import json
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_jax import scaling
from nanochat_jax.devices import GPUS
from nanochat_jax.planner import estimate, gpus, program
from nanochat_jax.stages.settings import PretrainConfig

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
COMPILER = find_spec("jax_cuda13_plugin") or find_spec("jax_cuda12_plugin")


def d24(rows: int = 16, devices: int = 8) -> scaling.Plan:
    return scaling.plan(24, target_param_data_ratio=8.0, device_batch_size=rows, n_devices=devices)


def run_plan(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "scripts/plan.py", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )


def last_line(done: subprocess.CompletedProcess) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# --- text and disk --------------------------------------------------------------------------------


def test_shards_agree_with_the_published_run():
    """The original says that 170 shards are enough for d24; the last one is for validation."""
    needed = estimate.shards_needed(d24().total_tokens, "climbmix")
    assert 160 <= needed <= 180


def test_shards_end_where_the_data_set_ends_and_other_text_needs_none():
    assert estimate.shards_needed(10**15, "climbmix") == 6543
    assert estimate.shards_needed(1, "climbmix") == 2
    assert estimate.shards_needed(10**12, "local") == 0


@given(tokens=st.integers(10**6, 10**11), more=st.integers(10**8, 10**10))
def test_more_tokens_need_more_shards(tokens, more):
    fewer = estimate.shards_needed(tokens, "climbmix")
    assert fewer <= estimate.shards_needed(tokens + more, "climbmix")
    held = (fewer - 1) * 250e6 * (1 - 0.35) / 4.8
    assert held >= tokens or fewer == 6543


def test_a_checkpoint_holds_parameters_and_moments():
    """AdamW keeps two moments; Muon one and a row or column: between 2 and 3 float32 in all."""
    plan = d24()
    muon = plan.params.transformer_matrices
    adamw = plan.params.total - muon
    assert estimate.state_bytes(plan) == pytest.approx(4 * (2 * muon + 3 * adamw), rel=0.01)


# --- memory and time by arithmetic ----------------------------------------------------------------


def test_estimated_memory_is_near_what_the_compiler_found():
    """57.6 GiB for d24 with 16 rows on 8 × H200, 17.3 GiB for d12 (LOG.md)."""
    assert estimate.estimate(d24(), "h200").peak_bytes / GIB == pytest.approx(57.6, rel=0.1)
    d12 = scaling.plan(12, device_batch_size=16, n_devices=8)
    assert estimate.estimate(d12, "h200").peak_bytes / GIB == pytest.approx(17.3, rel=0.1)


def test_the_largest_batch_fits_and_the_next_one_does_not():
    plan, target = d24(), "h200"
    cost = estimate.estimate(plan, target)
    largest = cost.max_device_batch
    assert largest in estimate.row_choices(plan)
    peaks = {
        rows: estimate.fixed_bytes(plan, 2) + estimate.activation_bytes(plan.config, rows, 2)
        for rows in (largest, 2 * largest)
    }
    assert peaks[largest] <= cost.capacity
    assert peaks[2 * largest] > cost.capacity or 2 * largest not in estimate.row_choices(plan)


def test_memory_share_of_jax_decides_what_fits(monkeypatch):
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.95")
    roomy = estimate.estimate(d24(32), "h200")
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.3")
    tight = estimate.estimate(d24(32), "h200")
    assert (roomy.fits, tight.fits) == (True, False)
    assert tight.max_device_batch < roomy.max_device_batch


def test_other_rows_change_only_the_accumulation():
    plan = program.with_rows(d24(), 32)
    assert plan.grad_accum_steps * 2 == d24().grad_accum_steps
    assert dataclasses.replace(plan, device_batch_size=16, grad_accum_steps=4) == d24()


def test_vocabulary_of_a_tokenizer_not_yet_trained_comes_from_its_preset(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    assert estimate.vocabulary(PretrainConfig(tokenizer="cpu")) == 4096
    assert estimate.vocabulary(PretrainConfig(tokenizer="fineweb-edu-64k")) == 65536
    assert estimate.vocabulary(PretrainConfig(tokenizer="unheard-of", recipe="2025")) == 65536


def test_an_unknown_device_is_named():
    with pytest.raises(ValueError, match="'abacus'"):
        estimate.estimate(d24(), "abacus")


# --- GPUs that are not here -----------------------------------------------------------------------


def test_target_description_carries_the_data_sheet():
    text = gpus.target_config(GPUS["h200"])
    assert text.count("{") == text.count("}")
    numbers = dict(re.findall(r"(\w+): (\d+)\b", text))
    assert int(numbers["core_count"]) == 132
    assert int(numbers["memory_bandwidth"]) == 4_800_000_000_000
    assert 139 * GIB < int(numbers["device_memory_size"]) < 142e9 * 1.08


def test_full_names_of_drivers_are_recognised():
    assert gpus.described("NVIDIA H100 80GB HBM3") == "h100"
    assert gpus.described("NVIDIA H200") == "h200"
    assert gpus.described("NVIDIA A100-SXM4-80GB") is None
    with pytest.raises(ValueError, match="h100, h200"):
        gpus.find_gpu("b200")


# --- the command line -----------------------------------------------------------------------------

KEYS = {
    *("peak_gib", "fits", "max_device_batch", "ms_per_microbatch", "compile_s", "kernels"),
    *("attention_calls", "fp8_gemms", "bf16_gemms", "reduce_scatters", "all_gathers"),
    *("all_reduces", "hours", "usd", "shards", "disk_gb"),
}


def test_plan_without_a_compiler_says_time_and_disk():
    done = run_plan("--config", "cpu", "--no-compile", "--target", "cpu")
    plan = last_line(done)
    assert plan.keys() >= KEYS
    assert (plan["gpus"], plan["shards"], plan["usd"]) == (1, 0, 0.0)
    assert plan["hours"] > 0
    assert plan["disk_gb"] > 0
    preset = tomllib.loads((ROOT / "configs" / "cpu.toml").read_text(encoding="utf-8"))["pretrain"]
    assert plan["steps"] == preset["num_iterations"]
    assert f"{plan['steps']:,} steps of {preset['total_batch_size']:,}" in done.stdout
    assert plan["compile_s"] is None


def test_the_speedrun_by_arithmetic():
    """The original's bfloat16 runs of this length took two to three hours."""
    plan = d24()
    cost = estimate.estimate(plan, "h100")
    assert cost.fits
    assert 1.5 < plan.num_iterations * cost.step_s / 3600 < 3.0


@pytest.mark.skipif(bool(COMPILER), reason="the CUDA wheels are installed here")
def test_plan_says_what_to_install():
    done = run_plan("--depth=4", "--target=h200", "--device-batch-size=16")
    assert done.returncode == 1
    assert "cuda13" in done.stderr
    assert "--no-compile" in done.stderr
    assert "Traceback" not in done.stderr


# --- the real program -----------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[12, 24])
def compiled(request) -> dict:
    if not COMPILER:
        pytest.skip("needs the CUDA wheels: bash test.sh --gpu-compile installs them")
    flags = (f"--depth={request.param}", "--gpus=8", "--target=h200", "--device-batch-size=16")
    return last_line(run_plan(*flags, "--target-param-data-ratio=8", "--engine-slots=1"))


@pytest.mark.gpu_compile
@pytest.mark.timeout(900)
def test_the_compiled_step_keeps_its_shape(compiled):
    """Guards what docs/architecture.md and LOG.md say of the program: a failure here means that a
    change of the model or of JAX cost memory, kernels or overlap. Look before changing a number.
    """
    depth = compiled["depth"]
    assert compiled["attention_calls"] == 2 * depth
    # Six matrices a layer (k and v may be merged) and the head, three products each; and the
    # gates of smear and of every second layer.
    gates = 3 * (depth // 2 + 1)
    assert 3 * (5 * depth + 1) <= compiled["bf16_gemms"] <= 3 * (6 * depth + 1) + gates
    assert compiled["fp8_gemms"] == compiled["f32_gemms"] == 0
    assert 1 <= compiled["reduce_scatters"] <= 8  # gradients are scattered, not all-reduced …
    assert compiled["all_reduce_mb"] < 1  # … but for a few scalars
    assert 1 <= compiled["all_gathers"] <= 8
    assert compiled["fits"]
    assert compiled["peak_gib"] <= {12: 18, 24: 60}[depth]
    assert compiled["ms_per_microbatch"] <= {12: 52, 24: 275}[depth]


@pytest.mark.gpu_compile
@pytest.mark.timeout(900)
def test_the_compiled_decode_loop_reads_little_more_than_the_weights(compiled):
    """One row on one H200. A prototype of d24 had 458 kernels and moved 1.735 GB a token."""
    depth = compiled["depth"]
    assert compiled["decode_kernels"] <= 15 * depth + 110  # sampling, with all its options, is 100
    assert compiled["decode_gb_per_token"] <= {12: 0.4, 24: 1.65}[depth]
    assert compiled["decode_ms_per_token"] <= {12: 0.6, 24: 1.25}[depth]
    assert compiled["prefill_ms"] <= {12: 1.5, 24: 4.5}[depth]
    assert compiled["engine_peak_gib"] < {12: 2, 24: 4}[depth]
