"""The input pipeline: shards → blocks of text → token ids → packed rows, prepared by threads.

The text is divided among a fixed number S of logical streams: stream s reads the blocks s, s+S,
s+2S, … of the endless repetition of all training blocks, and gives rows s·R/S … (s+1)·R/S−1 of each
step of R rows. Process p of P owns the p-th contiguous part of the streams. So the rows depend on
the data, the tokenizer, R, T and S, and never on the number of processes.

grain supplies the plumbing: a MapDataset of blocks, tokenised one block ahead by a thread per
stream; an IterDataset with exact state that packs them; a thread that keeps a few steps ready. The
state names the next document of each stream and the documents in its packing buffer, not their
text: restoring reads and tokenises them again, and exactly the same rows follow.
"""

import math
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import grain
import numpy as np

from nanochat_jax.data.shards import DocumentBlocks, Shards, read_footer
from nanochat_jax.data.streams import (
    BlockEncoder,
    Encoder,
    Layout,
    Stream,
    stream_text,
)


class Batch(NamedTuple):
    """One optimizer step: A micro-batches of B rows of T tokens, int32; target −1 is ignored."""

    inputs_ABT: Any
    targets_ABT: Any


# ---- all streams of one process --------------------------------------------------------------


class PackedRows(grain.IterDataset):
    """A dataset whose elements are one process's rows of a step, (rows, T+1) int32."""

    def __init__(
        self,
        blocks: DocumentBlocks,
        encode: BlockEncoder,
        layout: Layout,
        owned: range,
        passes: bool = False,
    ) -> None:
        # A pass may end soon: its blocks are tokenised when needed, by all threads of the encoder.
        ahead = 0 if passes else 1
        options = grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)
        parents = []
        for index in owned:
            text = stream_text(blocks, index, layout.streams, passes)
            parents.append(text.map(encode).to_iter_dataset(options))
        super().__init__(parents)
        self.counters = Counters()
        self._owned = owned
        self._stream_arguments = (layout, blocks, encode)
        self._passes = passes

    def __iter__(self) -> "PackedRowsIterator":
        encoded = [parent.__iter__() for parent in self.parents]
        streams = {
            index: Stream(index, *self._stream_arguments, blocks_of_stream, self._passes)
            for index, blocks_of_stream in zip(self._owned, encoded, strict=True)
        }
        return PackedRowsIterator(encoded, streams, self.counters)


@dataclass
class Counters:
    """What the packing thread has done; written there, read by the consumer."""

    seconds: float = 0.0  # spent making rows, waiting for tokens included
    used_tokens: int = 0
    cropped_tokens: int = 0


class PackedRowsIterator(grain.DatasetIterator):
    """Lets every stream of this process give its rows, step by step, and stacks them."""

    def __init__(
        self,
        encoded: Sequence[grain.DatasetIterator],
        streams: Mapping[int, Any],
        counters: Counters,
        stack: Callable[[list[Any]], Any] = np.stack,
    ) -> None:
        super().__init__(encoded)
        self._streams = streams
        self._counters = counters
        self._stack = stack
        self._step = 0

    def __next__(self) -> Any:
        started = time.perf_counter()
        streams = self._streams.values()
        rows = self._stack([row for stream in streams for row in stream.rows()])
        self._step += 1
        self._counters.seconds += time.perf_counter() - started
        self._counters.used_tokens = sum(stream.used_tokens for stream in streams)
        self._counters.cropped_tokens = sum(stream.cropped_tokens for stream in streams)
        return rows

    def get_state(self) -> dict[str, Any]:
        """Steps made, and a state (with `to_json`) for each stream."""
        return {
            "step": self._step,
            "streams": {str(index): stream.state() for index, stream in self._streams.items()},
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Accepts what `get_state` gave, the streams' states as they are or as JSON."""
        missing = [index for index in self._streams if str(index) not in state["streams"]]
        if missing:
            raise ValueError(
                f"the saved data state lacks stream {missing[0]}; it must hold those of all "
                "processes, see merge_states"
            )

        def restore(item: tuple[int, Any]) -> None:
            index, stream = item
            saved = state["streams"][str(index)]
            stream.restore(saved if isinstance(saved, Mapping) else saved.to_json())

        with ThreadPoolExecutor(len(self._streams)) as pool:
            list(pool.map(restore, self._streams.items()))
        self._step = state["step"]

    def close(self) -> None:
        """Waits for the blocks that are being tokenised, too, which grain leaves running."""
        if not self._closed:
            super().close()
            for parent in self._parents:
                if (executor := getattr(parent, "_executor", None)) is not None:
                    executor.shutdown(wait=True, cancel_futures=True)


class RowLoader(Iterator[Any]):
    """Hands out one process's rows of each step: of text (rows // process_count, T+1) int32, of
    conversations as conversations.py says.

    A thread keeps `prefetch` steps ready. `get_state()` describes what comes after the last step
    handed out, whatever has been prepared beyond it. Close it, or use it in a `with`.
    """

    def __init__(self, dataset: grain.IterDataset, identity: dict[str, Any], prefetch: int) -> None:
        self._counters = dataset.counters
        self._identity = identity
        self._prefetch = prefetch
        prefetched = grain.experimental.ThreadPrefetchIterDataset(
            dataset, prefetch_buffer_size=prefetch
        )
        self._open = [prefetched.__iter__()]  # emptied when closed
        self._close = weakref.finalize(self, _close_all, self._open)  # runs at exit, too
        self._steps = 0
        self._waited = 0.0

    def start(self) -> None:
        """Begins preparing steps now rather than at the first `next`."""
        if self._prefetch:
            self._iterator.start_prefetch()

    @property
    def _iterator(self) -> grain.DatasetIterator:
        if not self._open:
            raise ValueError("this data loader is closed")
        return self._open[0]

    def __next__(self) -> Any:
        started = time.perf_counter()
        try:
            rows = next(self._iterator)
        except Exception:
            self.close()  # what follows an error would not be the next step
            raise
        self._waited += time.perf_counter() - started
        self._steps += 1
        return rows

    @property
    def step(self) -> int:
        """Steps handed out since the very beginning, those before a restored state included.

        With the data, the layout and the tokenizer this names the next step's rows.
        """
        return self._iterator.get_state()["step"]

    def get_state(self) -> dict[str, Any]:
        """What comes next, as a JSON-able dict; see `merge_states` for several processes.

        Takes milliseconds (thousands of documents are named): for checkpoints, not for each step.
        """
        state = self._iterator.get_state()
        streams = {index: stream.to_json() for index, stream in state["streams"].items()}
        return {**self._identity, "step": state["step"], "streams": streams}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues as `get_state` described it, on any number of processes; else ValueError."""
        for key, value in self._identity.items():
            if state.get(key) != value:
                raise ValueError(
                    f"the saved data state was made with {key} = {state.get(key)}, this run has "
                    f"{value}: resume with the same data and batch layout"
                )
        self._iterator.set_state({"step": state["step"], "streams": state["streams"]})

    def stats(self) -> dict[str, float]:
        """Since the start: steps handed out, seconds the consumer waited for them, tokens per
        second that the pipeline makes while it works, share of the tokens read that was cropped.
        """
        used, cropped = self._counters.used_tokens, self._counters.cropped_tokens
        return {
            "steps": self._steps,
            "wait_s": self._waited,
            "tokens_per_s": used / max(self._counters.seconds, 1e-9),
            "cropped_share": cropped / max(used + cropped, 1),
        }

    def close(self) -> None:
        """Stops the threads; can be called twice."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _close_all(iterators: list[grain.DatasetIterator]) -> None:
    while iterators:
        iterators.pop().close()


# ---- what the training loop calls ------------------------------------------------------------


def train_loader(
    shards: Shards,
    tokenizer: Encoder,
    *,
    rows: int,
    sequence_len: int,
    streams: int = 8,
    buffer_docs: int = 1000,
    process_index: int = 0,
    process_count: int = 1,
    state: Mapping[str, Any] | None = None,
    prefetch: int = 3,
    threads: int | None = None,
) -> RowLoader:
    """Endless training rows, (rows // process_count, T+1) int32 a step.

    `rows` counts the whole optimizer step over all processes and micro-batches; it must be a
    multiple of `streams`, and that a multiple of `process_count`. `state` comes from `get_state`
    (or `merge_states`). Raises ValueError for a layout that does not divide, an unreadable shard,
    or a state of other data.
    """
    layout = Layout(rows, sequence_len, streams, buffer_docs)
    loader = _row_loader(
        shards.train, tokenizer, layout, process_index, process_count, False, prefetch, threads
    )
    if state is not None:
        loader.set_state(state)
    loader.start()
    return loader


def val_batches(
    shards: Shards,
    tokenizer: Encoder,
    *,
    rows: int,
    sequence_len: int,
    n_batches: int,
    streams: int = 8,
    buffer_docs: int = 1000,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 3,
    threads: int | None = None,
) -> Iterator[np.ndarray]:
    """The first `n_batches` batches of validation rows, (rows // process_count, T+1) int32 each.

    Always the same ones. A pass takes every document into account once before the text repeats; the
    first n rows are the same set of rows for every batch size that is a multiple of `streams`, and
    for every number of processes. Where `rows` is no multiple of `streams`, or there are fewer
    documents than streams, the largest common divisor that suits is used instead.
    """
    streams = _val_streams(shards, math.gcd(rows, streams))
    layout = Layout(rows, sequence_len, streams, buffer_docs)
    loader = _row_loader(
        shards.val, tokenizer, layout, process_index, process_count, True, prefetch, threads
    )
    with loader:
        for _ in range(n_batches):
            yield next(loader)


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The states of all processes after the same step as one, from which any number can resume."""
    first = dict(states[0])
    if all(state == first for state in states):
        return first
    common = {key: value for key, value in first.items() if key != "streams"}
    streams: dict[str, Any] = {}
    for state in states:
        if {key: value for key, value in state.items() if key != "streams"} != common:
            raise ValueError("these data states are of different runs or different steps")
        streams |= state["streams"]
    return {**common, "streams": dict(sorted(streams.items(), key=lambda item: int(item[0])))}


def _val_streams(shards: Shards, at_most: int) -> int:
    documents = sum(read_footer(path).num_rows for path in shards.val)
    return max(s for s in range(1, at_most + 1) if at_most % s == 0 and s <= documents)


def _row_loader(
    paths: Sequence[Path],
    tokenizer: Encoder,
    layout: Layout,
    process_index: int,
    process_count: int,
    passes: bool,
    prefetch: int,
    threads: int | None,
) -> RowLoader:
    owned = layout.owned_streams(process_index, process_count)
    blocks = DocumentBlocks(paths, min_blocks=layout.streams)
    at_once = 1 if passes else len(owned)  # blocks that are tokenised side by side
    threads = max(1, (threads or _cpus()) // at_once)
    encode = BlockEncoder(tokenizer, layout.sequence_len + 1, threads)
    identity = {"version": 1, "layout": asdict(layout), "data": blocks.fingerprint}
    return RowLoader(PackedRows(blocks, encode, layout, owned, passes), identity, prefetch)


def _cpus() -> int:
    """The cores this process may use, where the system can tell (macOS cannot)."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
