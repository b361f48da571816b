"""The engine: a fixed number of rows on the devices, and the compiled programs that work on them.

It knows token ids, not text, and nothing about requests: scheduler.py decides what runs in which
row. Rows are sharded over the mesh's data axis; each device holds its own rows and a copy of the
weights.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nanochat_jax.engine import decode as programs
from nanochat_jax.engine.cache import can_rewind, empty_cache
from nanochat_jax.engine.decode import (
    DecodeInputs,
    EngineState,
    ForwardChunk,
    PrefillInputs,
    Sampled,
)
from nanochat_jax.gpt import GPT, Params
from nanochat_jax.sharding import AXIS, make_mesh, parameter_name, shard_map

# Lengths that prompt chunks are padded to: one program each, whatever a prompt's length.
BUCKETS = (16, 64, 256, 512)


class Chunk(NamedTuple):
    """The tokens of one row, of which all but the first `start` are to be appended."""

    row: int
    start: int
    tokens: Sequence[int]


class Engine:
    """`n_slots` rows of at most `capacity` tokens.

    `forward`, `prepare` (parameters to weights) and `empty` (an empty cache) are the model with a
    cache (decode.py); `make_engine` passes them. Every call is one compiled program on all devices.
    """

    def __init__(
        self,
        forward: ForwardChunk,
        prepare: Callable[[Any], Any],
        empty: Callable[[int], Any],
        *,
        vocab_size: int,
        capacity: int,
        can_rewind: Callable[[int, int], bool],
        n_slots: int = 8,
        chunk: int = 16,
        mesh: Mesh | None = None,
    ):
        mesh = mesh or make_mesh(1)
        if n_slots < 1 or chunk < 1:
            raise ValueError(f"an engine needs a slot and a token a chunk: {n_slots=}, {chunk=}")
        self.vocab_size, self.capacity, self.chunk = vocab_size, capacity, chunk
        self.n_devices = mesh.size
        self.n_slots = -(-n_slots // mesh.size) * mesh.size
        self.can_rewind = can_rewind
        self.buckets = [b for b in BUCKETS if b <= capacity] or [BUCKETS[0]]
        rows, whole = P(AXIS), P()
        self._sharding, self._whole = NamedSharding(mesh, rows), NamedSharding(mesh, whole)
        self._prepare = jax.jit(prepare, out_shardings=self._whole)
        compiled = partial(_compile, mesh)
        self._prefill = compiled(partial(programs.prefill, forward), (whole, rows, rows), rows, 1)
        self._decode = compiled(
            partial(programs.decode, forward, chunk),
            (whole, rows, rows, whole, whole),
            (rows, rows),
            1,
        )
        self._copy = compiled(partial(programs.copy_row, axis=AXIS), (rows,) * 3, rows, 0)

        def empty_state() -> EngineState:
            shape = (self.n_slots, vocab_size)
            logits, seen = jnp.zeros(shape, jnp.float32), jnp.zeros(shape, bool)
            return EngineState(empty(self.n_slots), logits, seen)

        self._empty_state = jax.jit(empty_state, out_shardings=self._sharding)
        self._weights: Any = None
        self._state: EngineState | None = None

    def load_weights(self, params: Any) -> None:
        """Takes parameters (whole, on one device or the host) and starts with empty rows."""
        self._weights = self._prepare(jax.device_put(params, self._whole))
        self.reset()

    def reset(self) -> None:
        """Empties all rows."""
        self._state = self._empty_state()

    def free(self) -> None:
        """Frees the devices' memory until the next `load_weights`; the compiled programs stay."""
        self._weights = self._state = None

    def device_of(self, row: int) -> int:
        return row // (self.n_slots // self.n_devices)

    def bucket(self, remaining: int) -> int:
        """The size of the next chunk of a prompt with `remaining` tokens: at most half padding."""
        fitting = next((b for b in self.buckets if b >= remaining), self.buckets[-1])
        smaller = [b for b in self.buckets if b < fitting and fitting > 2 * remaining]
        return max(smaller, default=fitting)

    def prefill(self, chunks: Sequence[Chunk]) -> None:
        """Appends at most one chunk per device; none longer than the largest bucket."""
        n, per_device = self.n_devices, self.n_slots // self.n_devices
        width = next(b for b in self.buckets if b >= max(len(c.tokens) - c.start for c in chunks))
        rows, starts, lasts, counts = (np.zeros(n, np.int32) for _ in range(4))
        rows[:] = per_device  # out of range: nothing to do for that device
        tokens, seen = np.zeros((n, width), np.int32), np.zeros((n, self.vocab_size), bool)
        for c in chunks:
            d, new = self.device_of(c.row), c.tokens[c.start :]
            rows[d], starts[d], counts[d] = c.row % per_device, c.start, len(new)
            lasts[d] = c.tokens[c.start - 1] if c.start else 0
            tokens[d, : len(new)] = new
            seen[d, np.asarray(c.tokens)] = True
        inputs = PrefillInputs(rows, starts, lasts, tokens, counts, seen)
        self._state = self._prefill(self._weights, self._state, self._put(inputs))

    def copy(self, source: int, target: int) -> None:
        """Makes row `target` a copy of row `source`."""
        per_device = self.n_slots // self.n_devices
        ends = np.full((2, self.n_devices), per_device, np.int32)
        for end, row in zip(ends, (source, target), strict=True):
            end[self.device_of(row)] = row % per_device
        self._state = self._copy(self._state, *self._put(tuple(ends)))

    def decode(self, inputs: DecodeInputs, limit: int, logprobs: bool = False) -> Sampled:
        """Samples up to `limit` tokens for every running row; the results are NumPy arrays."""
        args = self._put(inputs), np.int32(limit), np.bool_(logprobs)
        self._state, sampled = self._decode(self._weights, self._state, *args)
        return jax.device_get(sampled)

    def bytes_per_token(self) -> int:
        """Bytes a device must read for one token of all its rows: weights and cache, once each.

        Of the embedding tables only the rows looked up are read; they are left out.
        """
        assert self._state is not None
        leaves = jax.tree_util.tree_flatten_with_path(self._weights)[0]
        tables = ("wte", "ve_table")
        weights = sum(w.nbytes for path, w in leaves if parameter_name(path) not in tables)
        return weights + sum(x.nbytes for x in jax.tree.leaves(self._state.cache)) // self.n_devices

    def warm_up(self, progress: Callable[[str], object] = lambda _: None) -> None:
        """Compiles all programs, so that no request waits for a compiler."""
        for bucket in self.buckets:
            progress(f"compiling for prompts of {bucket} tokens")
            self.prefill([Chunk(0, 0, [0] * bucket)])
        progress("compiling the decode loop")
        inputs = DecodeInputs.empty(self.n_slots)
        inputs.running[0], inputs.remaining[0] = True, 1
        self.decode(inputs, 1)
        if self.n_slots > 1:
            self.copy(0, 1)
        self.reset()

    def lowered(self, params: Any) -> dict[str, Any]:
        """The traced "decode" program and the "prefill" one for chunks of the largest bucket, to be
        compiled for devices that need not exist. `params` may be shapes only.
        """
        n, width = self.n_devices, self.buckets[-1]
        weights = _shapes(jax.eval_shape(self._prepare, params), self._whole)
        state = _shapes(jax.eval_shape(self._empty_state), self._sharding)
        inputs = _shapes(DecodeInputs.empty(self.n_slots), self._sharding)
        ints, scalars = np.zeros(n, np.int32), (np.int32(1), np.bool_(False))
        tokens, seen = np.zeros((n, width), np.int32), np.zeros((n, self.vocab_size), bool)
        prompt = _shapes(PrefillInputs(ints, ints, ints, tokens, ints, seen), self._sharding)
        return {
            "decode": self._decode.lower(weights, state, inputs, *scalars),
            "prefill": self._prefill.lower(weights, state, prompt),
        }

    def _put(self, tree: Any) -> Any:
        return jax.device_put(tree, self._sharding)


def make_engine(
    model: GPT,
    params: Params | None = None,
    *,
    capacity: int | None = None,
    n_slots: int = 8,
    chunk: int = 16,
    mesh: Mesh | None = None,
) -> Engine:
    """The engine of a model; without `params` it waits for `load_weights`.

    `params` are whole (unpadded), on one device or the host. `capacity` (default: the length the
    model was trained on) is the longest that a row may become, prompt and answer together; `chunk`
    the number of tokens sampled in one call, before the host sees them.
    """
    config = model.config
    length = config.sequence_len if capacity is None else capacity
    engine = Engine(
        partial(programs.forward_chunk, config, model.dtype),
        partial(programs.decode_weights, model),
        lambda rows: empty_cache(config, rows, length, model.dtype),
        vocab_size=config.vocab_size,
        capacity=length,
        can_rewind=partial(can_rewind, config, length),
        n_slots=n_slots,
        chunk=chunk,
        mesh=mesh,
    )
    if params is not None:
        engine.load_weights(params)
    return engine


def _shapes(tree: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def _compile(mesh: Mesh, function: Callable, specs_in: Any, specs_out: Any, donated: int):
    """The per-device program over the mesh; the engine's state is updated in place."""
    mapped = shard_map(function, mesh=mesh, in_specs=specs_in, out_specs=specs_out)
    # Explicit, since on one device the compiler would call the rows replicated: another argument
    # type for the next call, and a second compilation.
    placed = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs_out)
    return jax.jit(mapped, donate_argnums=donated, out_shardings=placed)
