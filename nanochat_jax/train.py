"""The training step and the evaluation step: pure functions of state and batch, without I/O.

The step is one per-device program under `jax.shard_map`; every collective stands here by name:
gather the weights, count the supervised tokens, scatter the gradients, sum the loss. Measured
reasons are in docs/architecture.md.

Shapes: A accumulation steps (micro-batches), B rows, T time, V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from nanochat_jax.gpt import GPT, Params, init_params, param_shapes
from nanochat_jax.sharding import (
    AXIS,
    BATCH_SPEC,
    REPLICATED,
    SHARD_DIM,
    logical_shardings,
    make_to_logical,
    pad_axis,
    pad_tree,
    shard_map,
    shardings,
    specs,
    with_shardings,
)


class Batch(NamedTuple):
    """One optimizer step: A micro-batches of B rows of T tokens, int32; target −1 is ignored."""

    inputs_ABT: Any
    targets_ABT: Any


Metrics = dict[str, jax.Array]

# (model, weights, micro-batch, denominator) -> this device's part of the loss, a float32 scalar.
# A micro-batch is a batch without its first axis; the denominator counts the supervised tokens of
# the whole step, at least 1.
type Loss = Callable[[GPT, Params, Any, jax.Array], jax.Array]


@flax.struct.dataclass
class TrainState:
    """Everything that changes from step to step; model and optimizer are closed over."""

    step: jax.Array  # int32 scalar: updates made
    params: Params  # float32 master weights
    opt_state: optax.OptState


# --- the state on the mesh ------------------------------------------------------------------------


def init_state(
    model: GPT, optimizer: optax.GradientTransformation, mesh: Mesh, key: jax.Array
) -> TrainState:
    """A fresh state, made where it will live; the same numbers for any number of devices."""
    make = partial(_fresh_state, model, optimizer, mesh.size)
    placed = shardings(_state_shapes(model, optimizer, mesh.size), mesh)
    return jax.jit(make, out_shardings=placed)(key)


def _fresh_state(model, optimizer, n_devices: int, key) -> TrainState:
    params = pad_tree(init_params(model, key), n_devices)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


@lru_cache(maxsize=8)
def _state_shapes(model, optimizer, n_devices: int) -> TrainState:
    # Cached: several callers need it, and tracing model and optimizer takes a second or two.
    make = partial(_fresh_state, model, optimizer, n_devices)
    return jax.eval_shape(make, jax.random.key(0))


def abstract_state(model: GPT, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the training state: what a compiler needs, without arrays."""
    shapes = _state_shapes(model, optimizer, mesh.size)
    return with_shardings(shapes, shardings(shapes, mesh))


def abstract_logical_state(
    model: GPT, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """The same without padding: what a checkpoint holds."""
    shapes = _state_shapes(model, optimizer, 1)
    return with_shardings(shapes, logical_shardings(shapes, mesh))


def make_state_to_logical(
    model: GPT, optimizer: optax.GradientTransformation, mesh: Mesh
) -> Callable[[TrainState], TrainState]:
    """The function from a state to the logical state that is saved: the one without padding."""
    return make_to_logical(abstract_logical_state(model, optimizer, mesh), mesh)


def put_batch(rows: np.ndarray, accumulation: int, mesh: Mesh) -> Batch:
    """This process's rows (R, T+1) of one step -> Batch of (A, B, T) arrays on the mesh."""
    return Batch(*put_arrays((rows[:, :-1], rows[:, 1:]), accumulation, mesh))


def put_arrays(
    arrays: Sequence[np.ndarray], accumulation: int, mesh: Mesh
) -> tuple[jax.Array, ...]:
    """This process's rows of one step, (R, …) each -> arrays (A, B, …) on the mesh."""
    put = partial(jax.make_array_from_process_local_data, NamedSharding(mesh, BATCH_SPEC))
    micro = (array.reshape(accumulation, -1, *array.shape[1:]) for array in arrays)
    return tuple(put(np.ascontiguousarray(array)) for array in micro)


# --- the steps ------------------------------------------------------------------------------------


def cross_entropy(model, weights: Params, micro: Batch, denominator: jax.Array) -> jax.Array:
    """The loss of pretraining and fine-tuning: mean cross-entropy of the supervised tokens."""
    losses = model.apply({"params": weights}, micro.inputs_ABT, micro.targets_ABT, method="losses")
    return sum_of(losses) / denominator


def sum_of(losses: jax.Array) -> jax.Array:
    """Their sum in float32, without the rounding error of thousands added one after another.

    That is what XLA does on a CPU. The differences from a rough mean are small, and so is the error
    of their sum.
    """
    mean = jax.lax.stop_gradient(jnp.mean(losses))
    return jnp.sum(losses - mean) + mean * losses.size


def make_train_step(
    model: GPT,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    grad_clip: float = 0.0,
    loss: Loss = cross_entropy,
) -> jax.stages.Wrapped:
    """The jitted step (state, batch) -> (state, metrics). The state given in is donated.

    Losses are summed over supervised tokens and divided once by their number over all devices and
    micro-batches, so accumulation, devices and masks never change the mathematics; a batch without
    supervised tokens has loss 0. `grad_clip` > 0 limits the global gradient norm. Another `loss`
    may come with another batch: any NamedTuple of arrays (A, B, …) that has `targets_ABT`.
    """
    state_specs = specs(abstract_state(model, optimizer, mesh))
    local = partial(_local_train_step, model, optimizer, mesh.size, grad_clip, loss)
    in_specs, out_specs = (state_specs, BATCH_SPEC), (state_specs, REPLICATED)
    sharded = shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    return jax.jit(sharded, donate_argnums=0)


def _local_train_step(model, optimizer, n_devices, grad_clip, loss_of, state: TrainState, batch):
    weights = gather_weights(model, state.params)
    supervised = jax.lax.psum(jnp.sum(batch.targets_ABT >= 0), AXIS)
    denominator = jnp.maximum(supervised, 1)
    loss, gradients = _accumulate(lambda *of: loss_of(model, *of, denominator), weights, batch)
    with jax.named_scope("scatter_gradients"):
        gradients = scatter_gradients(model, n_devices, gradients)
    norm = _global_norm(gradients)
    if grad_clip > 0:
        shrink = jnp.minimum(1.0, grad_clip / (norm + 1e-6))
        gradients = jax.tree.map(lambda g: g * shrink, gradients)
    with jax.named_scope("optimizer"):
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
    metrics = {
        "loss": jax.lax.psum(loss, AXIS),
        "grad_norm": norm,
        "supervised_tokens": supervised,
    }
    return TrainState(state.step + 1, params, opt_state), metrics


def _accumulate(loss_of: Callable[[Params, Any], jax.Array], weights: Params, batch: Any):
    """Loss and float32 gradients of this device's rows over all micro-batches.

    All but the last run in a scan; the last runs outside it, so that its memory is free for what
    follows and the compiler can overlap them. The barrier keeps it from starting before the scan
    has ended: two micro-batches of activations would be in memory together.
    """
    grad_of = jax.value_and_grad(loss_of)
    if batch.targets_ABT.shape[0] == 1:
        loss, gradients = grad_of(weights, jax.tree.map(lambda x: x[0], batch))
        return loss, jax.tree.map(lambda g: g.astype(jnp.float32), gradients)

    def add(total, weights, micro):
        return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, grad_of(weights, micro))

    zero_gradients = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)
    total, _ = jax.lax.scan(
        lambda total, micro: (add(total, weights, micro), None),
        (jnp.zeros((), jnp.float32), zero_gradients),
        jax.tree.map(lambda x: x[:-1], batch),
    )
    last = jax.tree.map(lambda x: x[-1], batch)
    total, weights, last = jax.lax.optimization_barrier((total, weights, last))
    return add(total, weights, last)


def make_eval_step(model: GPT, mesh: Mesh) -> Callable[[Params, Batch, jax.Array], Metrics]:
    """The jitted (params, batch, token_bytes_V) -> sums over the batch.

    "nats" and "bytes" are sums over targets that stand for text (token_bytes > 0), the two halves
    of bits per byte; "loss_sum" and "tokens" are sums over all supervised targets.
    """
    local = partial(_local_eval_step, model)
    in_specs = (specs(param_shapes(model.config)), BATCH_SPEC, REPLICATED)
    return jax.jit(shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=REPLICATED))


def _local_eval_step(model, params, batch: Batch, token_bytes_V):
    weights = gather_weights(model, params)

    def sums(micro):
        inputs_BT, targets_BT = micro
        losses_BT = model.apply({"params": weights}, inputs_BT, targets_BT, method="losses")
        bytes_BT = jnp.where(targets_BT >= 0, token_bytes_V[targets_BT], 0)
        return {
            "nats": sum_of(jnp.where(bytes_BT > 0, losses_BT, 0.0)),
            "bytes": jnp.sum(bytes_BT),
            "loss_sum": sum_of(losses_BT),
            "tokens": jnp.sum(targets_BT >= 0),
        }

    per_micro = jax.lax.map(sums, (batch.inputs_ABT, batch.targets_ABT))
    return jax.tree.map(lambda x: jax.lax.psum(jnp.sum(x), AXIS), per_micro)


# --- the collectives ------------------------------------------------------------------------------


def gather_weights(model: GPT, params: Params) -> Params:
    """Every device's slice of the master weights -> whole weights in the compute dtype, unpadded.

    The few replicated ones (scalars, gates) stay in float32.
    """
    logical = param_shapes(model.config)

    def gather(name, leaf):
        if name not in SHARD_DIM:
            return leaf
        dim = SHARD_DIM[name]
        whole = jax.lax.all_gather(leaf.astype(model.dtype), AXIS, axis=dim, tiled=True)
        return jax.lax.slice_in_dim(whole, 0, logical[name].shape[dim], axis=dim)

    with jax.named_scope("gather_weights"):
        return {name: gather(name, leaf) for name, leaf in params.items()}


def make_gather(model: GPT, mesh: Mesh) -> Callable[[Params], Params]:
    """The jitted function from sharded parameters to whole ones in the compute dtype.

    They lie on every device, as generation in the middle of a run needs them.
    """
    local, in_specs = partial(gather_weights, model), (specs(param_shapes(model.config)),)
    return jax.jit(shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=REPLICATED))


def make_own_gather(model: GPT, mesh: Mesh) -> Callable[[Params], Params]:
    """As `make_gather`; with several processes each gets the arrays on its first device."""
    gather = make_gather(model, mesh)
    if jax.process_count() == 1:
        return gather
    return lambda params: {n: array.addressable_data(0) for n, array in gather(params).items()}


def scatter_gradients(model: GPT, n_devices: int, gradients: Params) -> Params:
    """Whole gradients of this device's rows -> this device's slice of their sum, float32.

    Matrices travel in the compute dtype (bfloat16 on a GPU), the small replicated ones in float32.
    """

    def scatter(name, leaf):
        if name not in SHARD_DIM:
            return jax.lax.psum(leaf, AXIS)
        dim = SHARD_DIM[name]
        padded = pad_axis(leaf.astype(model.dtype), dim, n_devices)
        summed = jax.lax.psum_scatter(padded, AXIS, scatter_dimension=dim, tiled=True)
        return summed.astype(jnp.float32)

    return {name: scatter(name, leaf) for name, leaf in gradients.items()}


def _global_norm(gradients: Params) -> jax.Array:
    """Euclidean norm over all parameters, whole on every device."""
    squares = {name: jnp.sum(jnp.square(g)) for name, g in gradients.items()}
    local = sum(square for name, square in squares.items() if name in SHARD_DIM)
    sharded = jax.lax.psum(local, AXIS)
    replicated = sum(square for name, square in squares.items() if name not in SHARD_DIM)
    return jnp.sqrt(sharded + replicated)
