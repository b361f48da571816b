"""Muon, AdamW and their schedules against the original, and the properties that sharding needs."""

import dataclasses
from functools import cache, partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_optim import arrays, for_recipe, model_config, optim_config
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_jax.gpt import GPTConfig, parameter_table
from nanochat_jax.interop.names import params_from_torch, params_to_torch, torch_names
from nanochat_jax.muon import POLAR_EXPRESS, orthogonalise, polar_update, scale_by_muon
from nanochat_jax.optim import (
    LABELS,
    OptimConfig,
    adamw_groups,
    lr_multiplier,
    make_optimizer,
    muon_momentum,
    muon_weight_decay,
)
from nanochat_jax.scaling import plan

RECIPES = ("2025", "2026")
STACKS = ("qo", "kv", "fc", "proj")
SMALL = {
    recipe: GPTConfig(
        recipe=recipe, sequence_len=64, vocab_size=70, n_layer=3, n_head=4, n_kv_head=2, n_embd=32
    )
    for recipe in RECIPES
}


def small_config(recipe: str, **overrides) -> OptimConfig:
    return for_recipe(recipe, **{"num_iterations": 20, "warmup_steps": 2} | overrides)


def random_tree(config: GPTConfig, seed: int, scale: float = 1.0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    shapes = {name: shape for name, (shape, _) in parameter_table(config).items()}
    return {n: jnp.asarray(scale * rng.standard_normal(s), jnp.float32) for n, s in shapes.items()}


def some(tree: dict, *names: str) -> dict:
    """A few parameters stand for all where a test compiles several optimizers."""
    return {name: tree[name] for name in names if name in tree}


@cache
def jitted(optimizer: optax.GradientTransformation):
    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step)


def run(optimizer, params, gradients, state=None):
    """Applies the optimizer to each tree of gradients in turn -> (params, state)."""
    state = optimizer.init(params) if state is None else state
    for gradient in gradients:
        params, state = jitted(optimizer)(params, state, gradient)
    return params, state


def assert_all_finite(tree):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        assert np.isfinite(np.asarray(leaf, np.float32)).all(), jax.tree_util.keystr(path)


# --- the original's numbers -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def replay(golden):
    """recipe -> (meta, archive, model config, [(params, state) after each golden gradient])."""

    @cache
    def replayed(recipe: str):
        meta, archive = golden.json(f"optim{recipe}"), golden.npz(f"optim{recipe}")
        config = model_config(meta, recipe)
        optimizer = make_optimizer(config, optim_config(meta, recipe))
        params, state = params_from_torch(config, arrays(archive, "init/")), None
        history = []
        for t in range(meta["steps_run"]):
            gradient = params_from_torch(config, arrays(archive, f"grad{t}/"))
            params, state = run(optimizer, params, [gradient], state)
            history.append((params, state))
        return meta, archive, config, history

    return replayed


@pytest.mark.golden
@pytest.mark.parametrize("recipe", RECIPES)
def test_parameters_follow_the_original(replay, recipe):
    """Float32 against the original's float32, within a few times its own distance to float64."""
    meta, archive, config, history = replay(recipe)
    roundoff = meta["float32_vs_float64_maxabs"]
    assert roundoff
    for steps in roundoff:
        expected = arrays(archive, f"after{steps}/")
        ours = params_to_torch(config, history[int(steps) - 1][0])
        assert set(ours) == set(expected) == set(roundoff[steps])
        for name, values in expected.items():
            tolerance = 3 * roundoff[steps][name] + 2e-7 * max(1.0, np.abs(values).max())
            np.testing.assert_allclose(
                ours[name], values, rtol=0, atol=tolerance, err_msg=f"{name} after {steps} steps"
            )


@pytest.mark.golden
def test_moments_follow_the_original(replay):
    meta, _, config, history = replay("2026")
    _, state = history[-1]
    ours = moments_by_torch_name(config, state)
    for key, expected in meta["state_norms_after6"].items():
        _, name, moment = key.split("/")
        squares = [float(np.square(array).sum()) for array in ours[moment, name]]
        assert sum(squares) ** 0.5 == pytest.approx(expected["norm_float64"], rel=1e-4), key


def moments_by_torch_name(config: GPTConfig, state) -> dict[tuple[str, str], list[np.ndarray]]:
    """(moment, torch name) -> the moments of that tensor, or of all matrices of its shape."""
    fields = {
        "mu": "exp_avg",
        "nu": "exp_avg_sq",
        "momentum": "momentum_buffer",
        "second_moment": "second_momentum_buffer",
    }
    names, table = torch_names(config), parameter_table(config)
    found: dict[tuple[str, str], list[np.ndarray]] = {}
    alike: dict[tuple, list[np.ndarray]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        moment = fields.get(getattr(path[-2], "name", ""))
        if moment is None:
            continue
        name, array = path[-1].key, np.asarray(leaf)
        theirs = names[name]
        slices = [(theirs, array)] if isinstance(theirs, str) else zip(theirs, array, strict=True)
        for torch, part in slices:
            shared = (moment, table[name][0][1:] if LABELS[name] == "muon" else torch)
            found[moment, torch] = alike.setdefault(shared, [])
            found[moment, torch].append(part)
    return found


@pytest.mark.golden
@pytest.mark.parametrize("recipe", RECIPES)
def test_hyper_parameters_are_the_originals(golden, recipe):
    meta = golden.json(f"optim{recipe}")
    config, cfg = model_config(meta, recipe), optim_config(meta, recipe)
    label_of = {
        torch: LABELS[name]
        for name, theirs in torch_names(config).items()
        for torch in ([theirs] if isinstance(theirs, str) else theirs)
    }
    same = partial(pytest.approx, rel=1e-12, abs=1e-15)
    for step in meta["per_step"]:
        t = step["step"]
        assert lr_multiplier(cfg, t) == same(step["lrm"])
        for group in step["groups"]:
            (label,) = {label_of[name] for name in group["params"]}
            if label == "muon":
                lr = cfg.matrix_lr * cfg.batch_lr_scale
                assert muon_momentum(cfg, t) == same(group["momentum"])
                assert muon_weight_decay(cfg, t) == same(group.get("weight_decay", 0.0))
            else:
                lr, *rest = adamw_groups(config, cfg)[label]
                assert rest == [*group["betas"], group["weight_decay"]]
            assert lr * lr_multiplier(cfg, t) == same(group["lr"])


# --- schedules ------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    recipe=st.sampled_from(RECIPES),
    steps=st.integers(1, 5000),
    warmup=st.integers(0, 100),
    warmdown=st.floats(0, 1),
)
def test_schedules_are_the_same_for_ints_and_traced_steps(recipe, steps, warmup, warmdown):
    cfg = small_config(
        recipe, num_iterations=steps, warmup_steps=warmup, warmdown_ratio=warmdown, weight_decay=0.3
    )
    some_steps = jnp.asarray([0, 1, warmup, steps // 2, steps - 1, steps, 2 * steps])
    for schedule in (lr_multiplier, muon_momentum, muon_weight_decay):
        traced = np.broadcast_to(schedule(cfg, some_steps), some_steps.shape)
        for t, value in zip(some_steps.tolist(), traced, strict=True):
            plain = schedule(cfg, t)
            assert isinstance(plain, float)
            assert 0 <= plain <= 1
            assert value == pytest.approx(plain, abs=2e-6)


def test_schedules_cover_their_range():
    cfg = for_recipe("2026", 1000)
    lrs = [lr_multiplier(cfg, t) for t in range(1001)]
    assert lrs[0] == 1 / 40
    assert lrs[39:351] == [1.0] * 312
    assert all(a > b for a, b in pairwise(lrs[350:]))
    assert lrs[1000] == lr_multiplier(cfg, 1200) == pytest.approx(0.05)
    # Warm-up of the momentum wins although the warm-down has begun at step 350.
    assert muon_momentum(cfg, 399) == pytest.approx(0.97, abs=4e-4)
    assert muon_momentum(cfg, 400) == pytest.approx(0.97 - 0.07 * 50 / 650)
    assert muon_momentum(cfg, 1000) == pytest.approx(0.90)
    assert muon_weight_decay(cfg, 1000) == pytest.approx(0.0)
    old = for_recipe("2025", 1000)
    assert [lr_multiplier(old, t) for t in (0, 800, 900, 1000)] == pytest.approx([1, 1, 0.5, 0])
    momenta = [muon_momentum(old, t) for t in (0, 150, 300, 999)]
    assert momenta == pytest.approx([0.85, 0.9, 0.95, 0.95])


def test_from_plan_takes_the_scaled_numbers():
    run_plan = plan(20, matrix_lr=0.03, warmup_steps=7)
    cfg = OptimConfig.from_plan(run_plan)
    assert cfg.num_iterations == run_plan.num_iterations
    assert cfg.weight_decay == run_plan.weight_decay_scaled
    assert cfg.batch_lr_scale == run_plan.batch_lr_scale != 1.0
    assert (cfg.matrix_lr, cfg.warmup_steps) == (0.03, 7)
    assert OptimConfig.from_plan(plan(20, "2025")) == for_recipe("2025", 21400)


# --- what training on many devices needs ----------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_slices_of_the_stacks_give_slices_of_the_result(recipe):
    """Two devices with equal parts of every stack and table, against one with all of it."""
    config = SMALL[recipe]
    optimizer = make_optimizer(config, small_config(recipe))
    cut = ("qo", "kv", "wte", "lm_head", "value_embeds")
    names = (*cut, "resid_lambdas")
    params = some(random_tree(config, 0), *names)
    gradients = [some(random_tree(config, t, 0.1), *names) for t in (1, 2, 3)]
    whole = run(optimizer, params, gradients)

    def half(tree, second: int):
        return {n: jnp.split(a, 2)[second] if n in cut else a for n, a in tree.items()}

    halves = [run(optimizer, half(params, i), [half(g, i) for g in gradients]) for i in (0, 1)]

    def compare(path, all_of_it, first, second):
        keys = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
        joined = jnp.concatenate([first, second]) if keys and keys[-1] in cut else first
        np.testing.assert_allclose(joined, all_of_it, rtol=2e-5, atol=2e-6, err_msg=str(keys))

    jax.tree_util.tree_map_with_path(compare, whole, *halves)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_leaf_of_the_state_lies_as_its_parameter(recipe):
    """Moments carry their parameter's name and leading axis; all else is an int32 step count."""
    config = SMALL[recipe]
    params = random_tree(config, 0)
    state = make_optimizer(config, small_config(recipe)).init(params)
    seen = dict.fromkeys(params, 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        keys = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
        if keys and keys[-1] in params:
            assert leaf.shape[0] == params[keys[-1]].shape[0]
            assert leaf.dtype == jnp.float32
            seen[keys[-1]] += 1
        else:
            assert (leaf.shape, leaf.dtype) == ((), jnp.int32)
    for name, moments in seen.items():
        assert moments == (1 if recipe == "2025" and LABELS[name] == "muon" else 2)


@pytest.mark.parametrize("recipe", RECIPES)
def test_padding_matrices_stay_zero_in_bfloat16(recipe):
    """And gradients, moments and updates have their dtypes."""
    config = SMALL[recipe]
    optimizer = make_optimizer(config, small_config(recipe), jnp.bfloat16)

    def padded(tree, dtype):
        pad = [(0, 2), (0, 0), (0, 0)]
        return {n: jnp.pad(a, pad).astype(dtype) for n, a in some(tree, *STACKS).items()}

    start = padded(random_tree(config, 0), jnp.float32)
    gradients = [padded(random_tree(config, t), jnp.bfloat16) for t in range(1, 5)]
    params, state = run(optimizer, start, gradients)
    assert_all_finite((params, state))
    assert all(leaf.dtype in (jnp.float32, jnp.int32) for leaf in jax.tree.leaves((params, state)))
    for name in STACKS:
        assert not np.asarray(params[name][-2:]).any(), name
        assert (params[name][:-2] != start[name][:-2]).mean() > 0.99


def special_gradients(shape: tuple[int, int]) -> jax.Array:
    normal = np.random.default_rng(3).standard_normal(shape)
    zero_row, rank_1 = normal.copy(), np.outer(normal[:, 0], normal[0])
    zero_row[shape[0] // 2] = 0
    cases = [0 * normal, zero_row, rank_1, 1e-30 * normal, 1e15 * normal]
    return jnp.asarray(np.stack(cases), jnp.float32)


@pytest.mark.parametrize("compute_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("variant", RECIPES)
def test_degenerate_gradients_stay_finite(variant, compute_dtype):
    shapes = {"qo": (24, 24), "fc": (48, 12), "proj": (12, 48), "ve_gate": (2, 12)}
    gradients = {name: special_gradients(shape) for name, shape in shapes.items()}
    optimizer = scale_by_muon(lambda step: 0.9, compute_dtype, variant)
    state, update = optimizer.init(gradients), jax.jit(optimizer.update)
    for _ in range(3):
        directions, state = update(gradients, state)
        assert_all_finite((directions, state))
    for name, (fan_out, _) in shapes.items():
        zero, zero_row, *_ = np.asarray(directions[name])
        assert not zero.any()
        assert not zero_row[fan_out // 2].any()
        assert zero_row.any()


# --- the state holds moments and steps, never hyper-parameters ------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_resuming_under_another_configuration_uses_its_numbers(recipe):
    config = SMALL[recipe]
    names = ("qo", "lm_head", "wte", "smear_lambda")
    params = some(random_tree(config, 0), *names)
    gradients = [some(random_tree(config, t), *names) for t in (1, 2, 3)]
    cfg = small_config(recipe)
    first = make_optimizer(config, cfg)
    params, state = run(first, params, gradients[:2])

    still = dataclasses.replace(cfg, unembedding_lr=0.0, embedding_lr=0.0, matrix_lr=0.0)
    kept, _ = run(make_optimizer(config, still), params, gradients[2:], state)
    moved = {name for name in params if not np.array_equal(kept[name], params[name])}
    assert moved == {"smear_lambda"} & set(params)

    double = dataclasses.replace(cfg, unembedding_lr=2 * cfg.unembedding_lr)
    once, _ = run(first, params, gradients[2:], state)
    twice, _ = run(make_optimizer(config, double), params, gradients[2:], state)
    step, double_step = (t["lm_head"] - params["lm_head"] for t in (once, twice))
    np.testing.assert_allclose(double_step, 2 * step, atol=2e-6)
    assert np.array_equal(once["wte"], twice["wte"])
    assert np.abs(step).max() > 1e-3


def test_the_step_count_in_the_state_drives_the_schedules():
    config = SMALL["2026"]
    cfg = small_config("2026", num_iterations=4, warmup_steps=0, warmdown_ratio=1.0)
    optimizer = make_optimizer(config, dataclasses.replace(cfg, final_lr_frac=0.0))
    names = ("kv", "lm_head", "x0_lambdas")
    gradient = some(random_tree(config, 1), *names)
    before, state = run(optimizer, some(random_tree(config, 0), *names), [])
    for _ in range(4):
        params, state = run(optimizer, before, [gradient], state)
        assert not any(np.array_equal(params[name], before[name]) for name in names)
        before = params
    # Step 4 of 4: every rate is zero.
    last, _ = run(optimizer, params, [gradient], state)
    assert all(np.array_equal(last[name], params[name]) for name in names)


def test_cautious_decay_only_helps_the_update():
    config = SMALL["2026"]
    cfg = small_config("2026", warmup_steps=0)
    params, gradient = (some(random_tree(config, seed), "fc") for seed in (0, 1))
    decaying, plain = (
        make_optimizer(config, dataclasses.replace(cfg, weight_decay=decay)) for decay in (0.28, 0)
    )
    p, with_decay, without = (
        np.asarray(t["fc"])
        for t in (
            params,
            run(decaying, params, [gradient])[0],
            run(plain, params, [gradient])[0],
        )
    )
    inwards = (without - p) * p < 0
    lr = cfg.matrix_lr * 4**0.5  # fc is four times as tall as wide
    np.testing.assert_allclose((without - with_decay)[inwards], lr * 0.28 * p[inwards], atol=1e-6)
    np.testing.assert_array_equal(without[~inwards], with_decay[~inwards])
    assert 0.2 < inwards.mean() < 0.8


# --- the pieces of Muon ---------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    shape=st.sampled_from([(24, 24), (40, 8), (8, 40), (1, 12)]),
    scale=st.floats(1e-2, 1e3),
    seed=st.integers(0, 2**32 - 1),
)
def test_direction_has_the_norm_of_an_orthogonal_matrix_whatever_the_scale(shape, scale, seed):
    fan_out, fan_in = shape
    gradient = np.random.default_rng(seed).standard_normal((2, *shape)).astype(np.float32)
    second = jnp.zeros((2, fan_out, 1) if fan_out >= fan_in else (2, 1, fan_in))
    direction, new_second = POLAR_UPDATE(gradient, second)
    norms = np.linalg.norm(np.asarray(direction), axis=(1, 2))
    np.testing.assert_allclose(norms, min(shape) ** 0.5, rtol=1e-4)
    scaled, scaled_second = POLAR_UPDATE(np.float32(scale) * gradient, second)
    np.testing.assert_allclose(scaled, direction, atol=1e-2)
    np.testing.assert_allclose(scaled_second, new_second, atol=1e-2)


POLAR_UPDATE = jax.jit(partial(polar_update, compute_dtype=jnp.float32))


@pytest.mark.parametrize("shape", [(3, 48, 48), (2, 96, 24), (2, 24, 96)])
def test_polar_express_brings_singular_values_near_one(shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    x /= 1.01 * np.linalg.norm(x, axis=(1, 2), keepdims=True)
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    polar = jax.jit(partial(orthogonalise, coefficients=POLAR_EXPRESS))
    ours = np.asarray(polar(x))
    in_basis = u.swapaxes(1, 2) @ ours @ vt.swapaxes(1, 2)
    values = np.diagonal(in_basis, axis1=1, axis2=2)
    # Five steps with this safety margin leave 15 %, and reach values down to a few thousandths.
    assert np.abs(values[s > 0.005] - 1).max() < 0.15
    diagonal = values[..., None] * np.eye(s.shape[-1])
    np.testing.assert_allclose(in_basis, diagonal, atol=1e-4)
    low = np.asarray(polar(jnp.asarray(x, jnp.bfloat16)), np.float32)
    assert np.vdot(low, ours) / np.linalg.norm(low) / np.linalg.norm(ours) > 0.995


# --- mistakes -------------------------------------------------------------------------------------


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="no optimizer for parameter w_new"):
        make_optimizer(SMALL["2026"], small_config("2026")).init({"w_new": jnp.zeros(3)})
    with pytest.raises(ValueError, match="recipe is one of 2025, 2026, not '2027'"):
        dataclasses.replace(small_config("2026"), recipe="2027")
    with pytest.raises(ValueError, match="num_iterations must be at least 1"):
        dataclasses.replace(small_config("2026"), num_iterations=0)
