"""Tasks that the program makes itself, on any machine, in any size, without a network.

Example i of a split is drawn with a generator seeded by task, split and i. Every drawn example has
a key, the thing that it is about (a sum, a word, a question); a hash of the key says which split it
belongs to, and others are drawn until it is the right one. So no key of the test is trained on.
"""

import hashlib
import random
from collections.abc import Callable
from typing import Literal, NamedTuple

from nanochat_jax.tasks.task import Conversation, Task, check_index

SPLITS = ("train", "test")
SIZES = {"train": 8192, "test": 512}  # examples unless a limit asks for fewer or more
TEST_EVERY = 10  # one key in ten is for testing
MAX_ATTEMPTS = 1000  # draws; that none of them is of the wanted split has a probability of 1e-46


class Example(NamedTuple):
    """An example, and the key that decides which split it is of."""

    key: str
    conversation: Conversation


type Sampler = Callable[[random.Random], Example]
type Judge = Callable[[Conversation, str], bool]


class Synthetic(Task):
    """`size` examples of a split; `draw` makes one, `judge` judges completions of it."""

    def __init__(
        self,
        name: str,
        kind: Literal["categorical", "generative"],
        draw: Sampler,
        judge: Judge,
        split: str,
        size: int | None = None,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"{name} has the splits {' and '.join(SPLITS)}, not {split!r}")
        self.name, self.kind = name, kind
        self._sample, self._judge, self._split = draw, judge, split
        self._size = SIZES[split] if size is None else size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, i: int) -> Conversation:
        check_index(i, len(self))
        rng = random.Random(f"{self.name} {self._split} {i}")
        for _ in range(MAX_ATTEMPTS):
            drawn = self._sample(rng)
            if split_of(drawn.key) == self._split:
                return drawn.conversation
        raise ValueError(f"{self.name} has nothing for {self._split}: its source is too small")

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return self._judge(conversation, completion)


def split_of(key: str) -> str:
    """The split that a key belongs to, the same on every machine."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") % TEST_EVERY == 0 else "train"
