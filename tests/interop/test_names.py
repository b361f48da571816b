"""Stacks to torch's names and back, on the original's own parameter lists."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from golden_optim import arrays, model_config
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_jax.gpt import GPTConfig, parameter_table
from nanochat_jax.interop.names import params_from_torch, params_to_torch, torch_names

FILES = [
    ("gpt2026_forward", "2026", "param/"),
    ("gpt2025_forward", "2025", "param/"),
    ("optim2026", "2026", "init/"),
    ("optim2025", "2025", "init/"),
    ("train2026", "2026", "init/"),
    ("train2025", "2025", "init/"),
]


def random_params(config: GPTConfig, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {name: shape for name, (shape, _) in parameter_table(config).items()}
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


@pytest.mark.golden
@pytest.mark.parametrize(("file", "recipe", "prefix"), FILES)
def test_the_originals_parameters_round_trip(golden, file, recipe, prefix):
    config = model_config(golden.json(file), recipe)
    theirs = arrays(golden.npz(file), prefix)
    params = params_from_torch(config, theirs)
    assert {n: p.shape for n, p in params.items()} == {
        n: shape for n, (shape, _) in parameter_table(config).items()
    }
    back = params_to_torch(config, params)
    assert set(back) == set(theirs)
    for name, array in theirs.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)
        assert back[name].dtype == np.float32


@pytest.mark.golden
def test_slices_stand_where_the_contract_says(golden):
    config = model_config(golden.json("gpt2026_forward"), "2026")
    theirs = arrays(golden.npz("gpt2026_forward"), "param/")
    params = params_from_torch(config, theirs)
    for i in range(config.n_layer):
        h = f"transformer.h.{i}"
        for stack, position, name in (
            ("qo", 2 * i, "attn.c_q"),
            ("qo", 2 * i + 1, "attn.c_proj"),
            ("kv", 2 * i, "attn.c_k"),
            ("kv", 2 * i + 1, "attn.c_v"),
            ("fc", i, "mlp.c_fc"),
            ("proj", i, "mlp.c_proj"),
        ):
            np.testing.assert_array_equal(params[stack][position], theirs[f"{h}.{name}.weight"])
    for place, i in enumerate(config.value_embed_layers):
        gate = theirs[f"transformer.h.{i}.attn.ve_gate.weight"]
        np.testing.assert_array_equal(params["ve_gate"][place], gate)
        np.testing.assert_array_equal(
            params["value_embeds"][place], theirs[f"value_embeds.{i}.weight"]
        )


@settings(max_examples=30, deadline=None)
@given(
    recipe=st.sampled_from(["2025", "2026"]),
    n_layer=st.integers(1, 5),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    vocab_size=st.integers(1, 130),
    seed=st.integers(0, 99),
)
def test_any_model_round_trips(recipe, n_layer, kv_heads, group, vocab_size, seed):
    config = GPTConfig(
        recipe=recipe,
        vocab_size=vocab_size,
        n_layer=n_layer,
        n_head=kv_heads * group,
        n_kv_head=kv_heads,
        n_embd=24 * kv_heads * group,
    )
    params = random_params(config, seed)
    state_dict = params_to_torch(config, params)
    assert sum(a.size for a in state_dict.values()) == sum(a.size for a in params.values())
    again = params_from_torch(config, state_dict)
    assert set(again) == set(params)
    assert all(np.array_equal(again[name], params[name]) for name in params)


def test_other_dtypes_are_widened_and_scalars_take_their_shape():
    config = GPTConfig(n_layer=2, n_head=2, n_kv_head=2, n_embd=32, vocab_size=64)
    state_dict = params_to_torch(config, random_params(config))
    state_dict["transformer.wte.weight"] = state_dict["transformer.wte.weight"].astype(
        ml_dtypes.bfloat16
    )
    state_dict["smear_lambda"] = np.float32(0.25)
    params = params_from_torch(config, state_dict)
    assert params["wte"].dtype == jnp.float32
    assert params["smear_lambda"].tolist() == [0.25]


def test_mistakes_name_the_tensor():
    config = GPTConfig(n_layer=2, n_head=2, n_kv_head=2, n_embd=32, vocab_size=64)
    good = params_to_torch(config, random_params(config))
    fc = torch_names(config)["fc"][1]
    with pytest.raises(ValueError, match=f"missing {fc}; check n_layer"):
        params_from_torch(config, {k: v for k, v in good.items() if k != fc})
    with pytest.raises(ValueError, match=r"unknown optimizer\.state"):
        params_from_torch(config, good | {"optimizer.state": np.zeros(1)})
    with pytest.raises(ValueError, match=r"lm_head.weight has shape \(32, 64\), .* makes it \(64"):
        params_from_torch(config, good | {"lm_head.weight": good["lm_head.weight"].T})
    with pytest.raises(ValueError, match=r"of a 2025 model of 2 layers: unknown .* and 2 more"):
        params_from_torch(GPTConfig("2025", n_layer=2, n_head=2, n_kv_head=2, n_embd=32), good)
    params = random_params(config)
    with pytest.raises(ValueError, match=r"fc has shape \(1, 128, 32\)"):
        params_to_torch(config, params | {"fc": params["fc"][:1]})
    params.pop("wte")
    with pytest.raises(ValueError, match="the parameters of a 2026 model are backout_lambda"):
        params_to_torch(config, params)
