"""The optimizer: Muon on the matrices of the blocks, AdamW on everything else, as one optax chain.

It works on any slice of the parameters: the leading axis of a stack of matrices is only batched
over, and no row of an embedding meets another, so each device can run it on its own part of the
parameters without a collective. All-zero padding matrices stay zero. Every leaf of the state that
belongs to a parameter stands under the parameter's name and shares its leading axis.
Hyper-parameters are functions of the int32 step counts in the state and are never stored: a
restored state obeys the current configuration.
"""

import math
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nanochat_jax.gpt import GPTConfig
from nanochat_jax.muon import add_cautious_decay, scale_by_aspect, scale_by_muon
from nanochat_jax.scaling import RECIPES, OptimSettings, Plan

ADAM_EPS = 1e-10

# Parameters that share hyper-parameters share a label. No label is a parameter's name: the last
# parameter name on its path decides where a leaf of the state lies, and step counts have none.
LABELS = {
    **dict.fromkeys(("qo", "kv", "fc", "proj", "ve_gate"), "muon"),
    **dict.fromkeys(("smear_gate", "smear_lambda", "backout_lambda"), "adamw_smear"),
    "wte": "adamw_wte",
    "lm_head": "adamw_lm_head",
    "value_embeds": "adamw_value_embeds",
    "resid_lambdas": "adamw_resid",
    "x0_lambdas": "adamw_x0",
}


@dataclass(frozen=True, kw_only=True)
class OptimConfig(OptimSettings):
    """Every number of the optimizer.

    `weight_decay` is already scaled to the depth. `grad_clip` is not applied here: the norm spans
    all devices, so train.py does.
    """

    recipe: str
    num_iterations: int
    batch_lr_scale: float = 1.0
    lr_frac: float = 1.0  # of all rates, for stages after pretraining

    def __post_init__(self):
        if self.recipe not in RECIPES:
            raise ValueError(f"recipe is one of {', '.join(RECIPES)}, not {self.recipe!r}")
        if self.num_iterations < 1:
            raise ValueError(f"num_iterations must be at least 1, not {self.num_iterations}")

    @classmethod
    def from_plan(cls, plan: Plan) -> "OptimConfig":
        """The optimizer of a planned run."""
        values = {f.name: getattr(plan.settings, f.name) for f in fields(OptimSettings)}
        values |= {"weight_decay": plan.weight_decay_scaled, "batch_lr_scale": plan.batch_lr_scale}
        return cls(recipe=plan.recipe, num_iterations=plan.num_iterations, **values)


# --- schedules: of Python ints (float64) and of traced ones (float32) ----------------------------


def lr_multiplier(config: OptimConfig, step):
    """What every learning rate is multiplied with: linear up, constant, linear down; × lr_frac."""
    xp, step = _within(config, step)
    warmdown = max(_warmdown_steps(config), 1)
    left = (config.num_iterations - step) / warmdown
    down = left + (1 - left) * config.final_lr_frac
    steady = xp.where(step <= config.num_iterations - _warmdown_steps(config), 1.0, down)
    rising = (step + 1) / max(config.warmup_steps, 1)
    return _scalar(config.lr_frac * xp.where(step < config.warmup_steps, rising, steady))


def muon_momentum(config: OptimConfig, step):
    """Momentum of Muon: up to its peak over the first steps, then down with the learning rate."""
    xp, step = _within(config, step)
    up = step / max(config.momentum_warmup_steps, 1)
    warmdown = _warmdown_steps(config)
    done = (step - (config.num_iterations - warmdown)) / max(warmdown, 1)
    rising = (1 - up) * config.momentum_start + up * config.momentum_peak
    falling = config.momentum_peak + done * (config.momentum_final - config.momentum_peak)
    late = xp.where(done >= 0, falling, config.momentum_peak)
    return _scalar(xp.where(step < config.momentum_warmup_steps, rising, late))


def muon_weight_decay(config: OptimConfig, step):
    """Weight decay of Muon: half a cosine from its start to 0 (2026); 2025 has none."""
    if config.recipe == "2025":
        return 0.0
    xp, step = _within(config, step)
    return _scalar(config.weight_decay * 0.5 * (1 + xp.cos(np.pi * (step / config.num_iterations))))


def _warmdown_steps(config: OptimConfig) -> int:
    return round(config.warmdown_ratio * config.num_iterations)


def _within(config: OptimConfig, step) -> tuple[Any, Any]:
    """NumPy or its JAX twin, and the step; beyond the last one the schedules stand still."""
    xp = jnp if isinstance(step, jax.Array) else np
    return xp, xp.minimum(step, config.num_iterations)


def _scalar(value):
    return float(value) if isinstance(value, np.ndarray | np.generic) and not value.ndim else value


# --- a state for another schedule -----------------------------------------------------------------


def restart_schedules(opt_state):
    """The state with its moments as they are and every schedule at its beginning.

    Adam's own count stays: its bias correction belongs to the moments, not to the run.
    """

    def is_adam(node) -> bool:
        return isinstance(node, optax.ScaleByAdamState)

    def restart(node):
        is_count = not is_adam(node) and jnp.issubdtype(node.dtype, jnp.integer)
        return jnp.zeros_like(node) if is_count else node

    return jax.tree.map(restart, opt_state, is_leaf=is_adam)


# --- the chain -----------------------------------------------------------------------------------


class AdamWGroup(NamedTuple):
    lr: float
    b1: float
    b2: float
    weight_decay: float


def adamw_groups(gpt_config: GPTConfig, config: OptimConfig) -> dict[str, AdamWGroup]:
    """label -> hyper-parameters of each AdamW group; lr is before the schedule."""
    width = (gpt_config.n_embd / 768) ** -0.5
    head = config.unembedding_lr * config.batch_lr_scale * width
    table = config.embedding_lr * config.batch_lr_scale * width
    scalar = config.scalar_lr * config.batch_lr_scale
    if config.recipe == "2025":
        return {
            "adamw_lm_head": AdamWGroup(head, 0.8, 0.95, config.weight_decay),
            "adamw_wte": AdamWGroup(table, 0.8, 0.95, config.weight_decay),
        }
    return {
        "adamw_lm_head": AdamWGroup(head, 0.8, 0.96, 0.01),
        "adamw_wte": AdamWGroup(table, 0.8, 0.995, 0.001),
        "adamw_value_embeds": AdamWGroup(0.5 * table, 0.8, 0.995, 0.01),
        "adamw_resid": AdamWGroup(0.01 * scalar, 0.8, 0.95, 0.05),
        "adamw_x0": AdamWGroup(scalar, 0.96, 0.95, 0.0),
        "adamw_smear": AdamWGroup(0.2, 0.8, 0.95, 0.0),  # the one rate that no batch scales
    }


def make_optimizer(
    gpt_config: GPTConfig, optim_config: OptimConfig, compute_dtype=jnp.float32
) -> optax.GradientTransformation:
    """The optimizer of the model's flat dict of parameters.

    `compute_dtype` is that of Muon's matrix products (bfloat16 on accelerators); moments, norms and
    updates are float32 whatever the gradients are.
    """
    assert gpt_config.recipe == optim_config.recipe
    groups: dict[str, optax.GradientTransformation] = {
        label: _adamw(group, optim_config)
        for label, group in adamw_groups(gpt_config, optim_config).items()
    }
    groups["muon"] = _muon(optim_config, compute_dtype)
    # Gradients may come in bfloat16 from the reduce-scatter.
    as_float32 = optax.stateless(lambda updates, _: optax.tree.cast(updates, jnp.float32))
    return optax.chain(as_float32, optax.partition(groups, _labels))


def _labels(params) -> dict[str, str]:
    if unknown := sorted(set(params) - set(LABELS)):
        raise ValueError(f"no optimizer for parameter {', '.join(unknown)}; add it to LABELS")
    return {name: LABELS[name] for name in params}


def _adamw(group: AdamWGroup, config: OptimConfig) -> optax.GradientTransformation:
    return optax.chain(
        scale_by_adam(group.b1, group.b2),
        optax.add_decayed_weights(group.weight_decay),
        optax.scale_by_learning_rate(lambda step: group.lr * lr_multiplier(config, step)),
    )


def scale_by_adam(b1: float, b2: float) -> optax.GradientTransformation:
    """optax.scale_by_adam, state included, with bias corrections exact in float32.

    1 − b^t cancels while t is small: with b = 0.995 two of float32's seven digits are lost.
    """

    def update(updates, state, params=None):
        del params
        step = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda m, g: m + (1 - b1) * (g - m), state.mu, updates)
        nu = jax.tree.map(lambda v, g: v + (1 - b2) * (jnp.square(g) - v), state.nu, updates)
        unbias1, unbias2 = (-jnp.expm1(step * math.log(b)) for b in (b1, b2))
        directions = jax.tree.map(
            lambda m, v: (m / unbias1) / (jnp.sqrt(v / unbias2) + ADAM_EPS), mu, nu
        )
        return directions, optax.ScaleByAdamState(step, mu, nu)

    return optax.GradientTransformation(optax.scale_by_adam(b1, b2).init, update)


def _muon(config: OptimConfig, compute_dtype) -> optax.GradientTransformation:
    lr = config.matrix_lr * config.batch_lr_scale
    momentum = partial(muon_momentum, config)
    chain = [scale_by_muon(momentum, compute_dtype, variant=config.recipe)]
    if config.recipe == "2026":
        chain += [add_cautious_decay(partial(muon_weight_decay, config))]
    chain += [optax.stateless(lambda updates, _: jax.tree.map(scale_by_aspect, updates))]
    chain += [optax.scale_by_learning_rate(lambda step: lr * lr_multiplier(config, step))]
    return optax.chain(*chain)
