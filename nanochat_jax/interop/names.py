"""nanochat's PyTorch names: one tensor per layer there, one stack per shape here.

Both keep weights as (out, in): translating is stacking and unstacking, nothing is transposed.
"""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from nanochat_jax.gpt import GPTConfig, Params, parameter_table


def torch_names(config: GPTConfig) -> dict[str, str | tuple[str, ...]]:
    """Our name -> the torch name of the same tensor, or of each slice of the stack."""
    layers = [f"transformer.h.{i}" for i in range(config.n_layer)]
    names: dict[str, str | tuple[str, ...]] = {
        "wte": "transformer.wte.weight",
        "lm_head": "lm_head.weight",
        "qo": tuple(f"{h}.attn.{w}.weight" for h in layers for w in ("c_q", "c_proj")),
        "kv": tuple(f"{h}.attn.{w}.weight" for h in layers for w in ("c_k", "c_v")),
        "fc": tuple(f"{h}.mlp.c_fc.weight" for h in layers),
        "proj": tuple(f"{h}.mlp.c_proj.weight" for h in layers),
    }
    if config.recipe == "2026":
        owners = config.value_embed_layers
        names["value_embeds"] = tuple(f"value_embeds.{i}.weight" for i in owners)
        names["ve_gate"] = tuple(f"transformer.h.{i}.attn.ve_gate.weight" for i in owners)
        names["smear_gate"] = "smear_gate.weight"
        same = ("resid_lambdas", "x0_lambdas", "smear_lambda", "backout_lambda")
        names.update({name: name for name in same})
    return names


def params_from_torch(config: GPTConfig, state_dict: Mapping[str, np.ndarray]) -> Params:
    """Our float32 parameters from a state dict of arrays.

    ValueError if a tensor is missing, unknown or of another shape than `config` asks for.
    """
    names, params = torch_names(config), {}
    _check_names(names, state_dict, config)
    for name, (shape, _) in parameter_table(config).items():
        theirs = names[name]
        if isinstance(theirs, str):
            array = _tensor(state_dict, theirs, shape)
        else:
            array = np.stack([_tensor(state_dict, t, shape[1:]) for t in theirs])
        params[name] = jnp.asarray(array)
    return params


def params_to_torch(config: GPTConfig, params: Mapping) -> dict[str, np.ndarray]:
    """The state dict (float32) of our parameters; ValueError as in `params_from_torch`."""
    names, table = torch_names(config), parameter_table(config)
    if set(params) != set(table):
        raise ValueError(
            f"the parameters of a {config.recipe} model are {', '.join(sorted(table))}, "
            f"not {', '.join(sorted(params))}"
        )
    state_dict: dict[str, np.ndarray] = {}
    for name, theirs in names.items():
        array = _tensor(params, name, table[name][0])
        if isinstance(theirs, str):
            state_dict[theirs] = array
        else:
            state_dict.update(zip(theirs, array, strict=True))
    return state_dict


def _check_names(names: Mapping, state_dict: Mapping, config: GPTConfig) -> None:
    expected = {t for n in names.values() for t in ((n,) if isinstance(n, str) else n)}
    missing, unknown = sorted(expected - set(state_dict)), sorted(set(state_dict) - expected)
    if missing or unknown:
        parts = [f"missing {_some(missing)}"] if missing else []
        parts += [f"unknown {_some(unknown)}"] if unknown else []
        raise ValueError(
            f"these are not the tensors of a {config.recipe} model of {config.n_layer} layers: "
            f"{'; '.join(parts)}; check n_layer and recipe in the configuration"
        )


def _some(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _tensor(tensors: Mapping, name: str, shape: tuple[int, ...]) -> np.ndarray:
    array = np.asarray(tensors[name])
    if array.shape == () and shape == (1,):
        array = array.reshape(1)
    if array.shape != tuple(shape):
        raise ValueError(f"{name} has shape {array.shape}, but the configuration makes it {shape}")
    return array.astype(np.float32)
