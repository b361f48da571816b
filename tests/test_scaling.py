"""The dial against every row of the original's sizes, its error messages, and the device table."""

from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_jax import scaling
from nanochat_jax.devices import DEVICES, find_device, peak_flops
from nanochat_jax.optim import OptimConfig, lr_multiplier, muon_momentum, muon_weight_decay
from nanochat_jax.scaling import Plan, explain, plan

RENAMED = {"max_seq_len": "sequence_len"}


def plan_of(row: dict, recipe: str, **more) -> Plan:
    overrides = {RENAMED.get(k, k): v for k, v in row["overrides"].items()}
    return plan(row["depth"], recipe, **{"vocab_size": row["vocab_size"]} | more | overrides)


def assert_params(row: dict, made: Plan):
    counts = {f.name: getattr(made.params, f.name) for f in fields(made.params)}
    counts |= {"total": made.params.total}
    assert {name: counts[name] for name in row["param_counts"]} == row["param_counts"]


def assert_schedule(row: dict, made: Plan, columns: list[str]):
    cfg = OptimConfig.from_plan(made)
    schedules = {
        "lr_multiplier": lr_multiplier,
        "muon_momentum": muon_momentum,
        "muon_weight_decay": muon_weight_decay,
    }
    for step, *expected in row["schedule"]:
        ours = [schedules[name](cfg, step) for name in columns[1:]]
        assert ours == pytest.approx(expected, rel=1e-12, abs=1e-15), step


@pytest.mark.golden
@pytest.mark.parametrize("part", ["by_depth", "extra"])
def test_2026_sizes_are_the_originals(golden, part):
    head = golden.json("sizing")["head"]
    for row in head[part]:
        made = plan_of(row, "2026")
        config = made.config
        assert config.n_embd == row["model_dim"]
        assert (config.n_head, config.n_kv_head) == (row["num_heads"], row["num_kv_heads"])
        assert config.padded_vocab_size == row["padded_vocab"]
        assert made.scaling_params == row["num_scaling_params"]
        assert list(config.value_embed_layers) == row["value_embed_layers"]
        assert list(config.window_sizes) == [left for left, _ in row["window_sizes"]]
        assert_params(row, made)
        assert made.flops_per_token == row["flops_per_token"]
        assert made.target_tokens == row["target_tokens"]
        assert made.reference_tokens == row["D_REF"]
        assert row["B_REF"] == scaling.REFERENCE_BATCH
        assert made.total_batch_size == row["total_batch_size"]
        assert made.batch_lr_scale == row["batch_lr_scale"]
        assert made.weight_decay_scaled == pytest.approx(row["weight_decay_scaled"], rel=1e-14)
        assert made.num_iterations == row["num_iterations"]
        assert made.total_tokens == row["total_tokens"]
        assert made.total_flops == row["total_flops"]
        assert_schedule(row, made, head["schedule_columns"])


@pytest.mark.golden
@pytest.mark.parametrize("part", ["by_depth", "extra"])
def test_2025_sizes_are_the_originals(golden, part):
    old = golden.json("sizing")["oct2025"]
    for row in old[part]:
        made = plan_of(row, "2025", n_devices=old["world_size_assumed"])
        config = made.config
        heads = (config.n_embd, config.n_head, config.n_kv_head)
        assert heads == (row["model_dim"], row["num_heads"], row["num_kv_heads"])
        assert_params(row, made)
        assert made.flops_per_token == row["flops_per_token"]
        assert f"{made.flops_per_token:e}" == row["flops_per_token_str"]
        assert made.num_iterations == row["num_iterations"]
        assert made.total_tokens == row["total_tokens"]
        assert made.total_batch_size == row["total_batch_size"]
        assert made.total_flops == row["total_flops"]
        assert f"{made.total_flops:e}" == row["total_flops_str"]
        assert made.grad_accum_steps == row["grad_accum_steps_8gpu"]
        assert_schedule(row, made, old["schedule_columns"])


@pytest.mark.golden
def test_the_recipe_holds_the_originals_defaults(golden):
    theirs = golden.json("sizing")["head"]["base_train_defaults"]
    ours = scaling.RECIPES["2026"]
    for field in fields(ours):
        name = {new: old for old, new in RENAMED.items()}.get(field.name, field.name)
        if name in theirs and field.name != "total_batch_size":
            assert getattr(ours, field.name) == theirs[name], name


def test_the_hundred_dollar_run_has_its_printed_numbers():
    made = plan(20, "2025", n_devices=8)
    assert made.params.total == 560_988_160
    assert f"{made.flops_per_token:e}" == "3.491758e+09"
    assert made.num_iterations == 21_400
    assert made.total_tokens == 11_219_763_200
    assert f"{made.total_flops:e}" == "3.917670e+19"
    lines = {name: value for name, value, _ in explain(made)}
    assert lines["parameters"] == "560,988,160"
    assert lines["FLOPs per token"] == "3.491758e+09"
    assert lines["steps"] == "21,400"
    assert lines["FLOPs"] == "3.917670e+19"
    assert lines["windows"] == "full"


@settings(max_examples=40, deadline=None)
@given(
    depth=st.integers(1, 30),
    recipe=st.sampled_from(["2025", "2026"]),
    head_dim=st.sampled_from([64, 128]),
    steps=st.integers(1, 10**6),
    accumulation=st.integers(1, 8),
)
def test_plans_are_consistent(depth, recipe, head_dim, steps, accumulation):
    heads = -(-64 * depth // head_dim)
    if recipe == "2025" and 64 * depth % (2 * heads):
        with pytest.raises(ValueError, match="take an even depth"):
            plan(depth, recipe, head_dim=head_dim)
        return
    batch = 16 * 2048 * 4 * accumulation
    made = plan(
        depth,
        recipe,
        head_dim=head_dim,
        num_iterations=steps,
        total_batch_size=batch,
        device_batch_size=16,
        n_devices=4,
    )
    assert made.grad_accum_steps == accumulation
    assert made.num_iterations == steps
    assert made.total_tokens == steps * batch
    assert made.config.n_head * made.config.head_dim == made.config.n_embd
    assert 64 * depth <= made.config.n_embd < 64 * depth + head_dim
    explained = explain(made)
    assert len({name for name, _, _ in explained}) == len(explained)
    assert all(name and value and formula for name, value, formula in explained)


def test_explanations_hold_what_decided():
    by_flops = {name: how for name, _, how in explain(plan(12, target_flops=1e18))}
    assert by_flops["steps"] == "1e+18 target FLOPs"
    given_steps = explain(plan(12, num_iterations=7, target_flops=1e18, total_batch_size=2**19))
    assert ("steps", "7", "as given") in given_steps
    assert ("batch", "524,288", "tokens a step: as given") in given_steps
    d24 = {name: (value, how) for name, value, how in explain(plan(24))}
    assert d24["batch"][0] == "1,048,576"
    assert "^0.383" in d24["batch"][1]
    assert d24["windows"] == ("512, 2048", "pattern SSSL, last layer L")
    assert d24["lr scale"] == ("1.4142", "sqrt(batch / 524,288)")
    small = {
        name: row for name, *row in explain(plan(4, total_batch_size=2**13, device_batch_size=4))
    }
    assert small["lr scale"] == ["0.5000", "for a batch below 32,768 tokens"]


def test_overrides_reach_the_plan():
    made = plan(4, n_kv_head=1, matrix_lr=0.01, vocab_size=None, head_dim=64)
    assert made.config.n_kv_head == 1
    assert made.config.vocab_size == 32768
    assert made.settings.matrix_lr == 0.01
    unscaled = plan(20, "2025", total_batch_size=2**18, weight_decay=0.1)
    assert (unscaled.batch_lr_scale, unscaled.weight_decay_scaled) == (1.0, 0.1)
    assert unscaled.num_iterations == 2 * 21_400


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 0}, "depth must be at least 1"),
        ({"recipe": "2024"}, "recipe is one of 2025, 2026, not '2024'"),
        ({"learning_rate": 1}, "unknown setting learning_rate; known are unembedding_lr"),
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"target_param_data_ratio": -1}, "give num_iterations"),
        ({"target_flops": 1.0}, "less than one step of"),
        ({"target_param_data_ratio": 1e-6, "total_batch_size": 2**16}, "less than one step of"),
        ({"n_kv_head": 4}, "multiple of n_kv_head=4"),
        ({"window_pattern": "SX"}, "made of S and L"),
        ({"n_devices": 0}, "must all be at least 1"),
        (
            {"n_devices": 7},
            r"524,288 tokens is not a whole number of micro-batches of 458,752 \(32 rows × 2048 "
            "tokens × 7 devices\\); take total_batch_size=458752",
        ),
        ({"device_batch_size": 24}, "take device_batch_size=16 or total_batch_size=540672"),
    ],
)
def test_what_cannot_be_trained_is_a_clear_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan(**{"depth": 12, "head_dim": 128} | arguments)


@pytest.mark.parametrize(
    ("device_kind", "tflops", "memory"),
    [
        ("NVIDIA H100 80GB HBM3", 989, 80),
        ("NVIDIA H100 PCIe", 756, 80),
        ("NVIDIA H100 NVL", 835, 94),
        ("NVIDIA H800", 989, 80),
        ("NVIDIA H200", 989, 141),
        ("NVIDIA H200 NVL", 836, 141),
        ("NVIDIA GH200 480GB", 989, 96),
        ("NVIDIA H20", 148, 96),
        ("NVIDIA B200", 2250, 180),
        ("NVIDIA GB200", 2500, 186),
        ("NVIDIA A100-SXM4-80GB", 312, 80),
        ("NVIDIA A100 80GB PCIe", 312, 80),
        ("NVIDIA A100-SXM4-40GB", 312, 40),
        ("NVIDIA A100-PCIE-40GB", 312, 40),
        ("NVIDIA A10", 125, 24),
        ("NVIDIA A10G", 70, 24),
        ("NVIDIA L4", 121, 24),
        ("NVIDIA L40", 181, 48),
        ("NVIDIA L40S", 362, 48),
        ("NVIDIA GeForce RTX 3090", 71, 24),
        ("NVIDIA GeForce RTX 4090", 165.2, 24),
        ("NVIDIA GeForce RTX 5090", 209.5, 32),
        ("NVIDIA RTX 6000 Ada Generation", 364, 48),
        ("AMD Instinct MI300X", 1307, 192),
        ("TPU v2", 22.5, 8),
        ("TPU v3", 61.5, 16),
        ("TPU v4", 275, 32),
        ("TPU v5 lite", 197, 16),
        ("TPU v5e", 197, 16),
        ("TPU v5", 459, 95),
        ("TPU v5p", 459, 95),
        ("TPU v6 lite", 918, 32),
        ("TPU7x", 1153, 96),
    ],
)
def test_devices_are_found_by_what_jax_calls_them(device_kind, tflops, memory):
    assert peak_flops(device_kind) == tflops * 1e12
    assert find_device(device_kind).memory == memory
    assert peak_flops(device_kind.lower()) == tflops * 1e12


@pytest.mark.parametrize(
    "device_kind",
    ["cpu", "", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce GTX 1080", "Tesla T4"],
)
def test_unknown_devices_have_no_peak(device_kind):
    assert find_device(device_kind) is None
    assert peak_flops(device_kind) is None


def test_the_device_table_is_plausible():
    assert len(DEVICES) >= 20
    for device in DEVICES:
        assert 20 <= device.bf16_tflops <= 3000
        assert device.fp8_tflops == 0 or 1.9 <= device.fp8_tflops / device.bf16_tflops <= 2.1
        # Arithmetic intensity at the ridge, in FLOPs a byte: between an H20 and a TPU v6e.
        assert 30 <= device.bf16_tflops / device.bandwidth <= 600
        assert 8 <= device.memory <= 300
