"""The mesh, and where every array of the training state lives on it.

One axis, "data". Each device computes its own rows of the batch with a full copy of the weights in
the compute dtype; float32 master weights and optimizer moments exist once, cut over the devices
(ZeRO-1, arXiv 1910.02054) along one dimension per parameter. Muon needs whole matrices, so stacks
of matrices are cut along the stack; one that the devices do not divide is padded with zero
matrices. Checkpoints hold the logical arrays without that padding: they fit any device count.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = "data"
BATCH_SPEC = P(None, AXIS)  # (A, B, T): the rows of every micro-batch are cut over the devices
REPLICATED = P()

# The dimension along which a parameter, and its moments, are cut; those not named are replicated.
SHARD_DIM = {"qo": 0, "kv": 0, "fc": 0, "proj": 0, "wte": 0, "lm_head": 0, "value_embeds": 1}

# Without the check that outputs declared replicated are so: it does not know that all_gather's are.
shard_map = partial(jax.shard_map, check_vma=False)


def make_mesh(n_devices: int | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """A one-axis mesh over the first `n_devices` (default all) of `devices` (default: ours)."""
    available = list(jax.devices() if devices is None else devices)
    wanted = len(available) if n_devices is None else n_devices
    if not 1 <= wanted <= len(available):
        raise ValueError(f"{wanted} devices asked for, {len(available)} found")
    return jax.make_mesh(
        (wanted,), (AXIS,), axis_types=(AxisType.Auto,), devices=available[:wanted]
    )


def own_mesh(mesh: Mesh) -> Mesh:
    """This process's devices of a mesh: each process of a cluster run has its own engine."""
    return mesh if jax.process_count() == 1 else make_mesh(devices=mesh.local_devices)


def shard_dim(path: tuple, leaf: Any) -> int | None:
    """The dimension a leaf is cut along; None for scalars (step counts) and small parameters."""
    name = parameter_name(path)
    return None if name is None or not leaf.shape else SHARD_DIM.get(name)


def parameter_name(path: tuple) -> str | None:
    """The last dictionary key of a leaf's path: optimizer moments carry their parameter's name."""
    keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
    return keys[-1] if keys else None


def specs(tree: Any) -> Any:
    """The PartitionSpec of every leaf: that of the parameter whose name ends its path."""
    return jax.tree_util.tree_map_with_path(lambda *leaf: _cut_along(shard_dim(*leaf)), tree)


def _cut_along(dim: int | None) -> P:
    return REPLICATED if dim is None else P(*[None] * dim, AXIS)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The NamedSharding of every leaf."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(tree))


def with_shardings(shapes: Any, placed: Any) -> Any:
    """Shapes and dtypes with the shardings of the second tree."""
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        shapes,
        placed,
    )


# --- padding --------------------------------------------------------------------------------------


def pad_axis(array: jax.Array, dim: int, n_devices: int) -> jax.Array:
    """The array with zeros appended along a dimension until the devices divide it."""
    missing = -array.shape[dim] % n_devices
    widths = [(0, missing * (d == dim)) for d in range(array.ndim)]
    return jnp.pad(array, widths) if missing else array


def pad_tree(tree: Any, n_devices: int) -> Any:
    """Every leaf padded along the dimension it is cut along."""

    def pad(path, leaf):
        dim = shard_dim(path, leaf)
        return leaf if dim is None else pad_axis(leaf, dim, n_devices)

    return jax.tree_util.tree_map_with_path(pad, tree)


def logical_shardings(logical: Any, mesh: Mesh) -> Any:
    """How unpadded arrays lie on the mesh: as in training where the number of devices divides them,
    else cut along another dimension that it divides, else replicated."""

    def choose(path, leaf):
        dim = shard_dim(path, leaf)
        if dim is not None:
            candidates = (dim, *(d for d in range(leaf.ndim) if d != dim))
            divisible = (d for d in candidates if leaf.shape[d] % mesh.size == 0)
            dim = next(divisible, None)
        return NamedSharding(mesh, _cut_along(dim))

    return jax.tree_util.tree_map_with_path(choose, logical)


def make_to_logical(logical: Any, mesh: Mesh) -> Callable[[Any], Any]:
    """The function that strips the padding: values on the mesh -> arrays shaped as `logical`.

    Values without padding are returned as they are. Compiled at the first call only.
    """

    @partial(jax.jit, out_shardings=logical_shardings(logical, mesh))
    def cut(tree):
        return jax.tree.map(
            lambda x, want: jax.lax.slice(x, (0,) * x.ndim, want.shape), tree, logical
        )

    def to_logical(padded: Any) -> Any:
        same = jax.tree.map(lambda x, want: x.shape == want.shape, padded, logical)
        return padded if all(jax.tree.leaves(same)) else cut(padded)

    return to_logical


def from_logical(values: Any, mesh: Mesh) -> Any:
    """Adds the padding again and places the arrays for training on this mesh."""
    pad = jax.jit(lambda tree: pad_tree(tree, mesh.size), out_shardings=shardings(values, mesh))
    return pad(values)
