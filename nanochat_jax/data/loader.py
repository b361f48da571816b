"""The input pipeline: shards → blocks of text → token ids → packed rows, prepared by threads.

The text is divided among a fixed number S of logical streams: stream s reads the blocks s, s+S,
s+2S, … of the endless repetition of all training blocks, and fills rows s·R/S … (s+1)·R/S−1 of
each step of R rows. Process p of P owns the p-th contiguous part of the streams. So the rows depend
on the data, the tokenizer, R, T and S, but not on the number of processes.

grain supplies the plumbing: a MapDataset of blocks, tokenised one block ahead by a thread per
stream; an IterDataset with exact state that packs them; a thread that keeps a few steps ready. The
state names the next document of each stream and the documents in its packing buffer, not their
text: restoring reads and tokenises them again, and exactly the same rows follow.
"""

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import grain
import numpy as np

PREFETCH_STEPS = 3

STREAMS = 8
MIN_EXAMPLES = 16  # of a stream


class PackedRowsDataset(grain.IterDataset):
    """A dataset whose elements are one process's rows of a step.

    `inputs` are what the streams read, by their numbers; `make_stream` makes a stream of a number
    and an iterator; `stack` makes one element of the streams' rows.
    """

    def __init__(
        self,
        inputs: Mapping[int, grain.IterDataset],
        make_stream: Callable[[int, grain.DatasetIterator], Any],
        stack: Callable[[list[Any]], Any] = np.stack,
    ) -> None:
        super().__init__(list(inputs.values()))
        self._numbers, self._make_stream, self._stack = list(inputs), make_stream, stack

    def __iter__(self) -> "PackedRowsIterator":
        iterators = [parent.__iter__() for parent in self.parents]
        numbered = zip(self._numbers, iterators, strict=True)
        streams = {number: self._make_stream(number, iterator) for number, iterator in numbered}
        return PackedRowsIterator(iterators, streams, self._stack)


class PackedRowsIterator(grain.DatasetIterator):
    """Collects the rows of this process's streams, step by step, and stacks them."""

    def __init__(
        self,
        inputs: Sequence[grain.DatasetIterator],
        streams: Mapping[int, Any],
        stack: Callable[[list[Any]], Any],
    ) -> None:
        super().__init__(inputs)
        self._streams = streams
        self._stack = stack
        self._step = 0

    def __next__(self) -> Any:
        rows = self._stack([row for stream in self._streams.values() for row in stream.rows()])
        self._step += 1
        return rows

    def get_state(self) -> dict[str, Any]:
        """The number of steps made, and a state (with `to_json`) for each stream."""
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
        """Also waits for the blocks that are being tokenised, which grain leaves running."""
        if not self._closed:
            super().close()
            for parent in self._parents:
                if (executor := getattr(parent, "_executor", None)) is not None:
                    executor.shutdown(wait=True, cancel_futures=True)


class RowLoader(Iterator[Any]):
    """Hands out one process's rows of each step: of text (rows // process_count, T+1) int32, of
    conversations as conversations.py says.

    A thread keeps a few steps ready, from now on. `get_state()` describes what comes after the last
    step handed out, whatever has been prepared beyond it. `state` is such a state, made with the
    same `identity`; else ValueError. Close the loader, or use it in a `with`.
    """

    def __init__(
        self,
        dataset: grain.IterDataset,
        identity: dict[str, Any],
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self._identity = identity
        prefetched = grain.experimental.ThreadPrefetchIterDataset(
            dataset, prefetch_buffer_size=PREFETCH_STEPS
        )
        self._open = [prefetched.__iter__()]  # emptied when closed
        self._close = weakref.finalize(self, _close_all, self._open)  # runs at exit, too
        if state is not None:
            self._set_state(state)
        self._iterator.start_prefetch()

    @property
    def _iterator(self) -> grain.DatasetIterator:
        if not self._open:
            raise ValueError("this data loader is closed")
        return self._open[0]

    def __next__(self) -> Any:
        try:
            return next(self._iterator)
        except Exception:
            self.close()  # what follows an error would not be the next step
            raise

    @property
    def step(self) -> int:
        """Steps handed out since the beginning of the run, before resuming included.

        With the data, the layout and the tokenizer this determines the next step's rows.
        """
        return self._iterator.get_state()["step"]

    def get_state(self) -> dict[str, Any]:
        """What comes next, as a JSON-able dict; see `merge_states` for several processes.

        Takes milliseconds (thousands of documents are named): for checkpoints, not for each step.
        """
        state = self._iterator.get_state()
        streams = {index: stream.to_json() for index, stream in state["streams"].items()}
        return {**self._identity, "step": state["step"], "streams": streams}

    def _set_state(self, state: Mapping[str, Any]) -> None:
        for key, value in self._identity.items():
            if state.get(key) != value:
                raise ValueError(
                    f"the saved data state was made with {key} = {state.get(key)}, this run has "
                    f"{value}: resume with the same data and batch layout"
                )
        self._iterator.set_state({"step": state["step"], "streams": state["streams"]})

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


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merges the states of all processes after one step; any number of processes can resume."""
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


@dataclass(frozen=True)
class Layout:
    """Everything the rows depend on, besides the data and the tokenizer."""

    rows: int  # of one step, over all processes and micro-batches
    sequence_len: int
    streams: int
    buffer_docs: int

    def owned_streams(self, process_index: int, process_count: int) -> range:
        """The streams of one process; ValueError when rows, streams and processes do not divide."""
        if self.rows % self.streams:
            raise ValueError(
                f"{self.rows} rows a step cannot be divided among {self.streams} streams; "
                f"use {math.gcd(self.rows, self.streams)} streams, or another batch size"
            )
        if self.streams % process_count:
            raise ValueError(
                f"{self.streams} streams cannot be divided among {process_count} processes; "
                "use a number of streams that is a multiple of the number of processes"
            )
        owned = self.streams // process_count
        return range(process_index * owned, (process_index + 1) * owned)


def choose_streams(
    process_count: int,
    rows: int | None = None,
    asked: int | None = None,
    n_examples: int | None = None,
) -> int:
    """Logical streams for a step of so many rows: STREAMS, where rows and processes allow it.

    Of few examples fewer, since a stream meets the same ones again and again: it should have at
    least MIN_EXAMPLES. `asked` goes before all of this; ValueError where it does not divide.
    """
    most = math.lcm(STREAMS, process_count)
    if rows is not None:
        most = math.gcd(most, rows)
    if n_examples is not None:
        fitting = [s for s in range(1, most + 1) if most % s == 0 and s % process_count == 0]
        enough = [s for s in fitting if s * MIN_EXAMPLES <= n_examples]
        most = max(enough, default=process_count)
    streams = asked or most
    if rows is not None:
        Layout(rows, 1, streams, 0).owned_streams(0, process_count)
    return streams
