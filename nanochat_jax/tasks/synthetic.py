"""Tasks that the program generates, on any machine, in any size, without a network.

Example i of a split is sampled with a generator seeded by task, split and i. Every example has a
key, the thing that it is about (a sum, a word, a question). A hash of the key assigns it to a
split, and examples of the other split are rejected: no key of the test split is trained on.
"""

import hashlib
import random
from collections.abc import Callable
from typing import NamedTuple

from nanochat_jax.tasks.task import Conversation, Kind, Task, check_index

SPLITS = ("train", "test")
SIZES = {"train": 8192, "test": 512}  # examples unless a limit asks for fewer or more
TEST_EVERY = 10  # one key in ten belongs to the test split
MAX_ATTEMPTS = 1000  # all of them of the wrong split has a probability of 1e-46


class Example(NamedTuple):
    """A conversation, and the key that decides which split it belongs to."""

    key: str
    conversation: Conversation


type Sampler = Callable[[random.Random], Example]
type Judge = Callable[[Conversation, str], bool]


class Synthetic(Task):
    """`size` examples of a split; `sampler` makes one, `judge` judges completions of it."""

    def __init__(
        self,
        name: str,
        kind: Kind,
        sampler: Sampler,
        judge: Judge,
        split: str,
        size: int | None = None,
    ) -> None:
        check_split(name, split)
        self.name, self.kind = name, kind
        self._sample, self._judge, self._split = sampler, judge, split
        self._size = SIZES[split] if size is None else size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, i: int) -> Conversation:
        check_index(i, len(self))
        rng = random.Random(f"{self.name} {self._split} {i}")
        for _ in range(MAX_ATTEMPTS):
            example = self._sample(rng)
            if split_of(example.key) == self._split:
                return example.conversation
        raise ValueError(f"{self.name} has nothing for {self._split}: its source is too small")

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return self._judge(conversation, completion)


def check_split(name: str, split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"{name} has the splits {' and '.join(SPLITS)}, not {split!r}")


def split_of(key: str) -> str:
    """The split that a key belongs to, the same on every machine."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") % TEST_EVERY == 0 else "train"
