"""Muon as optax transforms: orthogonalised momentum for stacks of matrices, and cautious decay.

Momentum, second moments, norms and sums are float32; only the matrix products of the iteration run
in the compute dtype (bfloat16 on accelerators). The leading axis S of a stack is only batched over.

Shapes: S stack of matrices, O out, I in.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

NORMUON_BETA2 = 0.9

# Five steps of Polar Express (arXiv 2505.16932, table for 5 iterations, safety 2e-2, cushion 2).
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5  # kellerjordan.github.io/posts/muon


class MuonState(NamedTuple):
    """step int32 (); momentum (S, O, I); second_moment (S, O, 1) or (S, 1, I), () in 2025."""

    step: jax.Array
    momentum: optax.Updates
    second_moment: optax.Updates


def scale_by_muon(
    momentum: Callable[[jax.Array], jax.Array], compute_dtype=jnp.float32, variant: str = "2026"
) -> optax.GradientTransformation:
    """Replaces each matrix's gradient by an orthogonalised Nesterov momentum.

    2026: rows equilibrated, Polar Express, renormalised, variance-reduced (see `polar_update`).
    2025: five Newton–Schulz steps.
    """
    is_2026 = variant == "2026"

    def second_moment(p):
        fan_out, fan_in = p.shape[-2:]
        return jnp.zeros(
            (*p.shape[:-2], fan_out, 1) if fan_out >= fan_in else (*p.shape[:-2], 1, fan_in)
        )

    def init(params):
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        second = jax.tree.map(second_moment, params) if is_2026 else ()
        return MuonState(jnp.zeros([], jnp.int32), zeros, second)

    def update(updates, state, params=None):
        del params
        m = momentum(state.step)
        buffer = jax.tree.map(lambda b, g: b + (1 - m) * (g - b), state.momentum, updates)
        ahead = jax.tree.map(lambda b, g: b + (1 - m) * (g - b), buffer, updates)
        if is_2026:
            pairs = jax.tree.map(
                lambda g, v: polar_update(g, v, compute_dtype), ahead, state.second_moment
            )
            outer, inner = jax.tree.structure(ahead), jax.tree.structure((0, 0))
            directions, second = jax.tree.transpose(outer, inner, pairs)
        else:
            directions = jax.tree.map(lambda g: newton_schulz_update(g, compute_dtype), ahead)
            second = ()
        return directions, MuonState(optax.safe_increment(state.step), buffer, second)

    return optax.GradientTransformation(init, update)


def polar_update(g_SOI: jax.Array, second: jax.Array, compute_dtype) -> tuple[jax.Array, jax.Array]:
    """The 2026 direction of each matrix, and its new second moment; float32 but for the products.

    MuonEq (arXiv 2603.28254), Polar Express, Muon+ (arXiv 2602.21545), NorMuon (arXiv 2510.05491).
    All the norms they need follow from one reduction before the iteration and one after it.
    """
    fan_out, fan_in = g_SOI.shape[-2:]
    # MuonEq: every row gets the mean row norm; then the whole is brought below spectral norm 1.
    row_norm = jnp.sqrt(jnp.sum(jnp.square(g_SOI), -1, keepdims=True))
    equal = _norm(row_norm) / fan_out**0.5 / jnp.maximum(row_norm, 1e-6)
    norm = _norm(row_norm * equal)
    x_SOI = (g_SOI * (equal / (norm * 1.01 + 1e-6))).astype(compute_dtype)
    x_SOI = orthogonalise(x_SOI, POLAR_EXPRESS).astype(jnp.float32)
    # Muon+: the Frobenius norm of an exactly semi-orthogonal matrix.
    axis, n = (-1, fan_in) if fan_out >= fan_in else (-2, fan_out)
    v = jnp.mean(jnp.square(x_SOI), axis, keepdims=True)
    snap = min(fan_out, fan_in) ** 0.5 / jnp.maximum(jnp.sqrt(_total(v) * n), 1e-6)
    v = v * jnp.square(snap)
    # NorMuon: each neuron by its own running scale, the total norm kept.
    second = second + (1 - NORMUON_BETA2) * (v - second)
    step = jax.lax.rsqrt(jnp.maximum(second, 1e-10))
    kept = jnp.sqrt(_total(v) * n)
    now = jnp.sqrt(_total(v * jnp.square(step)) * n)
    return x_SOI * (snap * step * (kept / jnp.maximum(now, 1e-10))), second


def newton_schulz_update(g_SOI: jax.Array, compute_dtype) -> jax.Array:
    """The 2025 direction of each matrix, float32."""
    x_SOI = (g_SOI / (_norm(g_SOI) + 1e-7)).astype(compute_dtype)
    return orthogonalise(x_SOI, NEWTON_SCHULZ).astype(jnp.float32)


def orthogonalise(x_SOI: jax.Array, coefficients) -> jax.Array:
    """X ← aX + (bA + cA²)X for each (a, b, c), A the Gram matrix of the smaller side.

    Products are in x's dtype, one batched product for the stack; the sums between them are float32
    (bfloat16 would round the coefficients themselves) in one pass that reads and writes x's dtype.
    """
    tall = x_SOI.shape[-2] > x_SOI.shape[-1]
    for a, b, c in coefficients:
        gram = _matmul(x_SOI.mT, x_SOI) if tall else _matmul(x_SOI, x_SOI.mT)
        poly = _combine(b, gram, c, _matmul(gram, gram))
        x_SOI = _combine(a, x_SOI, 1.0, _matmul(x_SOI, poly) if tall else _matmul(poly, x_SOI))
    return x_SOI


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    # HIGHEST keeps float32 products float32 on GPUs (no TF32).
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.matmul(x, y, precision=precision, preferred_element_type=x.dtype)


def _combine(a: float, x: jax.Array, b: float, y: jax.Array) -> jax.Array:
    return (a * x.astype(jnp.float32) + b * y.astype(jnp.float32)).astype(x.dtype)


def _total(x: jax.Array) -> jax.Array:
    return jnp.sum(x, (-2, -1), keepdims=True)


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(_total(jnp.square(x)))


class CautiousDecayState(NamedTuple):
    step: jax.Array  # int32 ()


def add_cautious_decay(
    weight_decay: Callable[[jax.Array], jax.Array],
) -> optax.GradientTransformation:
    """Adds weight_decay(step)·p where it and the update pull the same way (arXiv 2510.12402)."""

    def init(params):
        del params
        return CautiousDecayState(jnp.zeros([], jnp.int32))

    def update(updates, state, params=None):
        if params is None:
            raise ValueError(optax.NO_PARAMS_MSG)
        decay = weight_decay(state.step)
        updates = jax.tree.map(
            lambda u, p: u + jnp.where(u * p >= 0, decay * p, 0.0), updates, params
        )
        return updates, CautiousDecayState(optax.safe_increment(state.step))

    return optax.GradientTransformation(init, update)


def scale_by_aspect(update_SOI: jax.Array) -> jax.Array:
    """Tall matrices take longer steps: sqrt(max(1, out / in))."""
    fan_out, fan_in = update_SOI.shape[-2:]
    return update_SOI * max(1.0, fan_out / fan_in) ** 0.5
