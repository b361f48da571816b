"""The model: a GPT as a pure function of its parameters, in nanochat's 2025 and 2026 forms.

Shapes: B batch, T time, D model width, N query heads, K key/value heads, H head dim, F = 4·D,
V vocabulary, P padded vocabulary, L layers. Weights are (out, in); matrices of one shape are
stacked over the layers. The model knows no mesh: it computes the rows it is given on one device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from nanochat_jax.attention import attention_kernel, causal_attention

SOFTCAP = 15.0  # logits are squashed to ±15
QK_SHARPEN = 1.2  # 2026: q and k after their norm
SMEAR_CHANNELS, GATE_CHANNELS = 24, 12  # how much of the stream the 2026 gates look at
EPS = float(np.finfo(np.float32).eps)

Params = dict[str, jax.Array]


@dataclass(frozen=True)
class GPTConfig:
    """What the parameters mean; saved with every checkpoint."""

    recipe: str = "2026"
    sequence_len: int = 2048
    vocab_size: int = 32768
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    window_pattern: str = "SSSL"  # tiled over the layers; 2025 has full attention

    def __post_init__(self):
        if self.recipe not in ("2025", "2026"):
            raise ValueError(f"recipe is '2025' or '2026', not {self.recipe!r}")
        if self.n_embd % self.n_head or self.head_dim % 2:
            raise ValueError(
                f"n_embd={self.n_embd} must be n_head={self.n_head} times an even number"
            )
        if self.n_head % self.n_kv_head:
            raise ValueError(
                f"n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}"
            )
        if not self.window_pattern or set(self.window_pattern.upper()) - set("SL"):
            raise ValueError(f"window_pattern is made of S and L, not {self.window_pattern!r}")
        if self.recipe == "2026" and self.n_embd < SMEAR_CHANNELS:
            raise ValueError(
                f"n_embd={self.n_embd} is under the {SMEAR_CHANNELS} channels of smear"
            )

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def kv_dim(self) -> int:
        return self.n_kv_head * self.head_dim

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // 64) * 64 if self.recipe == "2026" else self.vocab_size

    @property
    def rope_base(self) -> float:
        return 100_000.0 if self.recipe == "2026" else 10_000.0

    @property
    def window_sizes(self) -> tuple[int, ...]:
        """Keys to the left that each layer sees; the last layer always sees sequence_len."""
        if self.recipe == "2025":
            return (np.iinfo(np.int32).max,) * self.n_layer
        short = -(-self.sequence_len // 4 // 128) * 128
        reach = {"L": self.sequence_len, "S": short}
        pattern = self.window_pattern.upper()
        tiled = [reach[pattern[i % len(pattern)]] for i in range(self.n_layer)]
        return (*tiled[:-1], self.sequence_len)

    @property
    def value_embed_layers(self) -> tuple[int, ...]:
        """Layers that own a value embedding: every second one, the last included (2026)."""
        if self.recipe == "2025":
            return ()
        return tuple(i for i in range(self.n_layer) if i % 2 == (self.n_layer - 1) % 2)


class GPT(nn.Module):
    """Decoder-only transformer: rotary positions, qk-norm, relu² MLP, untied head, no biases.

    `dtype` is the one compute dtype of matrix products and activations; parameters are declared in
    float32. `attention` names the implementation (attention.py).
    """

    config: GPTConfig
    dtype: Any = jnp.float32
    attention: str = "blocked"

    def setup(self):
        for name, (shape, init) in parameter_table(self.config).items():
            setattr(self, name, self.param(name, init, shape, jnp.float32))

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Logits (B, T, V) in float32, soft-capped."""
        logits_BTV = self._logits(tokens_BT).astype(jnp.float32)
        return SOFTCAP * jnp.tanh(logits_BTV / SOFTCAP)

    def losses(self, tokens_BT: jax.Array, targets_BT: jax.Array) -> jax.Array:
        """Cross-entropy in nats of every position (B, T), float32; 0 where the target is −1."""
        return softcap_cross_entropy(self._logits(tokens_BT), targets_BT)

    def _logits(self, tokens_BT):
        x_BTD = self.hidden(tokens_BT)
        with jax.named_scope("head"):
            return linear(x_BTD, self.lm_head)[..., : self.config.vocab_size]

    def hidden(self, tokens_BT: jax.Array) -> jax.Array:
        """The normed stream (B, T, D) that the head reads."""
        config = self.config
        params = {name: getattr(self, name) for name in parameter_table(config)}
        with jax.named_scope("embed"):
            x = norm(embed(self.wte, tokens_BT, self.dtype))
            if config.recipe == "2026":
                x = smear(x, self.smear_gate, self.smear_lambda)
        rope = rotary(jnp.arange(tokens_BT.shape[1]), config.head_dim, config.rope_base)
        layers = lookup_value_embeds(unstack_layers(config, params), tokens_BT, self.dtype)

        def attend(layer, q, k, v):
            return causal_attention(q, k, v, config.window_sizes[layer], self.attention)

        return transform(config, layers, residual_scalars(config, params), x, rope, attend)


def init_params(model: GPT, key: jax.Array) -> Params:
    """Fresh float32 parameters, as a flat dict of arrays."""
    return dict(model.init(key, jnp.zeros((1, 1), jnp.int32))["params"])


def param_shapes(config: GPTConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """name -> shape and dtype of every parameter."""
    table = parameter_table(config).items()
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, (shape, _) in table}


def parameter_table(config: GPTConfig) -> dict[str, tuple[tuple[int, ...], Callable]]:
    """name -> (shape, initialiser) of every parameter; their order decides the random numbers."""
    L, D, P = config.n_layer, config.n_embd, config.padded_vocab_size
    normal, constant = nn.initializers.normal, nn.initializers.constant
    bound = (3 / D) ** 0.5
    if config.recipe == "2025":
        wte, lm_head = normal(1.0), constant(0.0)
        qo, kv, fc = (normal(_std_2025(n, D)) for n in (D, config.kv_dim, 4 * D))
    else:
        wte, lm_head = normal(0.8), normal(0.001)
        qo, kv, fc = (_uniform(-scale * bound, scale * bound) for scale in (1.0, 1.0, 0.4))
    table = {
        "wte": ((P, D), wte),
        "lm_head": ((P, D), lm_head),
        "qo": ((2 * L, D, D), _every_second_zero(qo)),
        "kv": ((2 * L, config.kv_dim, D), kv),
        "fc": ((L, 4 * D, D), fc),
        "proj": ((L, D, 4 * D), constant(0.0)),
    }
    if config.recipe == "2025":
        return table
    n_ve, depth = len(config.value_embed_layers), np.arange(L) / max(L - 1, 1)
    return table | {
        "value_embeds": ((n_ve, P, config.kv_dim), _uniform(-bound, bound)),
        "ve_gate": ((n_ve, config.n_kv_head, GATE_CHANNELS), _uniform(0.0, 0.02)),
        "smear_gate": ((1, SMEAR_CHANNELS), _uniform(0.0, 0.02)),
        "resid_lambdas": ((L,), _values(1.15 - 0.10 * depth)),
        "x0_lambdas": ((L,), _values(0.20 - 0.15 * depth)),
        "smear_lambda": ((1,), constant(0.0)),
        "backout_lambda": ((1,), constant(0.2)),
    }


def _std_2025(fan_out: int, fan_in: int) -> float:
    return min(1.0, (fan_out / fan_in) ** 0.5) / fan_in**0.5  # arXiv 2310.17813


def _uniform(low: float, high: float):
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, low, high)


def _values(values: np.ndarray):
    return lambda key, shape, dtype: jnp.asarray(values, dtype)


def _every_second_zero(init):
    """For the stack q, o, q, o, …: output projections start at zero."""
    return lambda key, shape, dtype: init(key, shape, dtype).at[1::2].set(0.0)


# --- the parts ------------------------------------------------------------------------------------


def unstack_layers(config: GPTConfig, params: Params) -> list[dict[str, jax.Array]]:
    """The matrices of each layer, by the names of `block`; "ve_table" is its value embedding."""
    qo, kv, fc, proj = (unstack(params[name]) for name in ("qo", "kv", "fc", "proj"))
    stacks = (qo[::2], qo[1::2], kv[::2], kv[1::2], fc, proj)
    names = ("q", "o", "k", "v", "fc", "proj")
    layers = [dict(zip(names, of_layer, strict=True)) for of_layer in zip(*stacks, strict=True)]
    if config.value_embed_layers:
        tables, gates = unstack(params["value_embeds"]), unstack(params["ve_gate"])
        for i, table, gate in zip(config.value_embed_layers, tables, gates, strict=True):
            layers[i] |= {"ve_table": table, "gate": gate}
    return layers


def lookup_value_embeds(layers: Sequence[dict[str, jax.Array]], tokens_BT, dtype) -> list[dict]:
    """The layers, with "ve", the tokens' value embeddings (B, T, K·H), where there is a table."""
    return [
        layer | {"ve": embed(layer["ve_table"], tokens_BT, dtype)} if "ve_table" in layer else layer
        for layer in layers
    ]


class ResidualScalars(NamedTuple):
    """The 2026 recipe's scalars of the residual stream, two a layer and one; 2025 has none."""

    resid: tuple[jax.Array, ...]
    initial: tuple[jax.Array, ...]
    backout: jax.Array


def residual_scalars(config: GPTConfig, params: Params) -> ResidualScalars | None:
    if config.recipe == "2025":
        return None
    lambdas = unstack(params["resid_lambdas"]), unstack(params["x0_lambdas"])
    # Behind the barrier they are plain scalars: one kernel serves all layers, not one each index.
    resid, initial = jax.lax.optimization_barrier(lambdas)
    return ResidualScalars(resid, initial, params["backout_lambda"][0])


def transform(
    config: GPTConfig,
    layers: Sequence[dict],
    scalars: ResidualScalars | None,
    x_BTD,
    rope,
    attend: Callable[..., jax.Array],
):
    """The embedded stream (B, T, D) through all layers, normed.

    `attend(layer, q_BTNH, k_BTKH, v_BTKH)` is the attention of layer number `layer`, (B, T, N, H).
    """
    x = x0 = x_mid = x_BTD
    for i, layer in enumerate(layers):
        with jax.named_scope(f"layer{i}"):
            if scalars:
                x = weighted_sum(scalars.resid[i], x, scalars.initial[i], x0)
            x = block(config, layer, x, rope, partial(attend, i))
        if i == config.n_layer // 2:
            x_mid = x
    if scalars:
        x = weighted_sum(1.0, x, -scalars.backout, x_mid)
    return norm(x)


def block(config: GPTConfig, layer: dict, x_BTD, rope, attend: Callable[..., jax.Array]):
    """One transformer layer: x + attention(norm(x)), then x + mlp(norm(x))."""
    with jax.named_scope("attention"):
        h_BTD = norm(x_BTD)
        y_BTNH = attend(*attention_inputs(config, layer, h_BTD, rope))
        x_BTD = x_BTD + linear(y_BTNH.reshape(x_BTD.shape), layer["o"])
    with jax.named_scope("mlp"):
        h_BTF = relu_squared(linear(norm(x_BTD), layer["fc"]))
        return x_BTD + linear(h_BTF, layer["proj"])


def attention_inputs(config: GPTConfig, layer: dict, h_BTD, rope):
    """Queries (B, T, N, H), keys and values (B, T, K, H), ready for attention."""
    B, T, _ = h_BTD.shape
    q = linear(h_BTD, layer["q"]).reshape(B, T, config.n_head, config.head_dim)
    k = linear(h_BTD, layer["k"]).reshape(B, T, config.n_kv_head, config.head_dim)
    v = linear(h_BTD, layer["v"]).reshape(B, T, config.n_kv_head, config.head_dim)
    if "ve" in layer:
        gate_BTK = linear(h_BTD[..., :GATE_CHANNELS], layer["gate"])
        v = add_value_embedding(v, gate_BTK, layer["ve"].reshape(v.shape))
    sharpen = QK_SHARPEN if config.recipe == "2026" else 1.0
    cos, sin = rope
    return rotate_and_norm(q, cos, sin, sharpen), rotate_and_norm(k, cos, sin, sharpen), v


@jax.custom_vjp
def linear(x_I: jax.Array, w_OI: jax.Array) -> jax.Array:
    """x·wᵀ in x's dtype: the one place where a weight meets an activation."""
    return _contract(x_I, w_OI.astype(x_I.dtype), (x_I.ndim - 1,), (1,))


def _linear_backward(saved, g_O):
    x_I, w_OI = saved
    dx_I = _contract(g_O, w_OI.astype(g_O.dtype), (g_O.ndim - 1,), (0,))
    tokens = tuple(range(x_I.ndim - 1))
    # A CPU transposes the left operand of this product in memory: let it be the narrower one.
    if w_OI.shape[0] > w_OI.shape[1]:
        dw_OI = _contract(x_I, g_O, tokens, tokens).T
    else:
        dw_OI = _contract(g_O, x_I, tokens, tokens)
    return dx_I, dw_OI.astype(w_OI.dtype)


linear.defvjp(lambda x_I, w_OI: (linear(x_I, w_OI), (x_I, w_OI)), _linear_backward)


def _contract(a, b, dims_a: tuple[int, ...], dims_b: tuple[int, ...]):
    return jax.lax.dot_general(a, b, ((dims_a, dims_b), ((), ())), preferred_element_type=a.dtype)


def rematerialised(function: Callable) -> Callable:
    """`function` with a backward pass that recomputes it from its inputs.

    XLA would otherwise keep float32 intermediates of these elementwise parts for the backward pass;
    the barrier hides from it that the two computations are the same.
    """
    wrapped = jax.custom_vjp(function)

    def forward(*args):
        return function(*args), args

    def backward(args, cotangent):
        return jax.vjp(function, *jax.lax.optimization_barrier(args))[1](cotangent)

    wrapped.defvjp(forward, backward)
    return wrapped


@rematerialised
def norm(x: jax.Array) -> jax.Array:
    """RMS norm over the last axis without a learned scale, computed in float32."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + EPS)).astype(x.dtype)


@rematerialised
def relu_squared(x: jax.Array) -> jax.Array:
    return jnp.square(jax.nn.relu(x))


@rematerialised
def weighted_sum(a: jax.Array, x: jax.Array, b: jax.Array, y: jax.Array) -> jax.Array:
    """a·x + b·y with float32 scalars, in x's dtype."""
    return (a * x.astype(jnp.float32) + b * y.astype(jnp.float32)).astype(x.dtype)


@rematerialised
def add_value_embedding(v_BTKH, gate_BTK, ve_BTKH):
    """v + 3·sigmoid(gate)·ve, one gate a key/value head."""
    gate = 3 * jax.nn.sigmoid(gate_BTK.astype(jnp.float32))[..., None]
    return (v_BTKH.astype(jnp.float32) + gate * ve_BTKH.astype(jnp.float32)).astype(v_BTKH.dtype)


def rotary(positions_T: jax.Array, head_dim: int, base: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin (T, H/2) of position·base^(−2j/H), float32; positions (B, T) give (B, T, H/2)."""
    frequencies = 1.0 / base ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    angles = positions_T.astype(jnp.float32)[..., None] * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angles), jnp.sin(angles)


def rotate_and_norm(x_BTNH, cos_TH, sin_TH, scale: float):
    """Rotates the two halves of each head by −position·frequency, norms, and scales.

    The norm is taken before the rotation, which keeps it: half the memory traffic on a GPU.
    """
    return _rotate_and_norm(x_BTNH, cos_TH[..., None, :], sin_TH[..., None, :], scale)


@rematerialised
def _rotate_and_norm(x, cos, sin, scale):
    x32 = x.astype(jnp.float32)
    rms = jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + EPS) * scale
    rotate = partial(jax.lax.platform_dependent, cpu=_rotate_joined, default=_rotate_flipped)
    return (rotate(x32, cos, sin) * rms).astype(x.dtype)


def _rotate_joined(x, cos, sin):
    x1, x2 = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([x1 * cos + x2 * sin, x2 * cos - x1 * sin], axis=-1)


def _rotate_flipped(x, cos, sin):
    """The same sum. XLA spends a second per concatenation on GPU kernels; a CPU is slow to flip."""
    halves = x.reshape(*x.shape[:-1], 2, -1)
    sign = jnp.array([[1.0], [-1.0]])
    turned = halves * cos[..., None, :] + jnp.flip(halves, -2) * (sin[..., None, :] * sign)
    return turned.reshape(x.shape)


def smear(x_BTD, gate_1C, smear_lambda_1):
    """Adds to each position but the first a gated part of the one before it (2026)."""
    smeared = add_previous(x_BTD[:, 1:], x_BTD[:, :-1], gate_1C, smear_lambda_1)
    return jnp.concatenate([x_BTD[:, :1], smeared], axis=1)


def add_previous(here_BTD, before_BTD, gate_1C, smear_lambda_1):
    gate = jax.nn.sigmoid(linear(here_BTD[..., :SMEAR_CHANNELS], gate_1C).astype(jnp.float32))
    return weighted_sum(1.0, here_BTD, smear_lambda_1[0] * gate, before_BTD)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def embed(table_PD: jax.Array, tokens_BT: jax.Array, dtype) -> jax.Array:
    """Rows of the table, (B, T, D) in `dtype`; gradients are summed in float32."""
    return table_PD[tokens_BT].astype(dtype)


def _embed_forward(table_PD, tokens_BT, dtype):
    return embed(table_PD, tokens_BT, dtype), (tokens_BT, table_PD)


def _embed_backward(dtype, saved, g_BTD):
    tokens_BT, table_PD = saved
    # A frequent token meets thousands of additions: in bfloat16 most of them would be lost.
    total = jnp.zeros(table_PD.shape, jnp.float32).at[tokens_BT].add(g_BTD.astype(jnp.float32))
    return total.astype(table_PD.dtype), None


embed.defvjp(_embed_forward, _embed_backward)


@jax.custom_vjp
def unstack(stack: jax.Array) -> tuple[jax.Array, ...]:
    """The slices along the first axis; their gradients are stacked once, not padded and added."""
    return tuple(jax.lax.index_in_dim(stack, i, keepdims=False) for i in range(stack.shape[0]))


unstack.defvjp(lambda stack: (unstack(stack), None), lambda _, slices: (jnp.stack(slices),))


@jax.custom_vjp
def softcap_cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """−log softmax(15·tanh(logits/15))[target], (B, T) in float32; 0 where the target is −1.

    Keeps the logits as they came (bfloat16 on a GPU) and the log-sum-exp, and recomputes the rest.
    No pass for the maximum: capped logits are at most 15, so the exponentials cannot overflow.
    """
    return _softcap_forward(logits_BTV, targets_BT)[0]


def _softcap_forward(logits_BTV, targets_BT):
    capped = SOFTCAP * jnp.tanh(logits_BTV.astype(jnp.float32) / SOFTCAP)
    logsum_BT = jnp.log(jnp.sum(jnp.exp(capped), axis=-1))
    picked = jnp.take_along_axis(logits_BTV, jnp.maximum(targets_BT, 0)[..., None], axis=-1)[..., 0]
    target_BT = SOFTCAP * jnp.tanh(picked.astype(jnp.float32) / SOFTCAP)
    losses = jnp.where(targets_BT >= 0, logsum_BT - target_BT, 0.0)
    return losses, (logits_BTV, targets_BT, logsum_BT)


def _softcap_backward(saved, g_BT):
    logits_BTV, targets_BT, logsum_BT = jax.lax.optimization_barrier(saved)
    t = jnp.tanh(logits_BTV.astype(jnp.float32) / SOFTCAP)
    p = jnp.exp(SOFTCAP * t - logsum_BT[..., None])
    hit = jax.lax.broadcasted_iota(jnp.int32, t.shape, t.ndim - 1) == targets_BT[..., None]
    g = jnp.where(targets_BT >= 0, g_BT, 0.0)[..., None]
    return (g * (p - hit) * (1 - t * t)).astype(logits_BTV.dtype), None


softcap_cross_entropy.defvjp(_softcap_forward, _softcap_backward)


def compute_dtype(name: str) -> Any:
    """The type of matrix products and activations: "auto" is bfloat16 but for a CPU."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"dtype is auto, float32 or bfloat16, not {name!r}")
    return jnp.bfloat16 if name == "bfloat16" else jnp.float32


def make_model(config: GPTConfig, dtype: str = "auto", attention: str = "auto") -> GPT:
    """The model in a compute type (see `compute_dtype`) with an attention kernel (attention.py)."""
    kind = compute_dtype(dtype)
    return GPT(
        config, kind, attention_kernel(attention, kind, config.sequence_len, config.head_dim)
    )
