"""Words and sentences for the synthetic tasks, from the text on this machine.

That is the data set `local` if it has been made, else the texts of Python's help(), which come with
every Python.
"""

import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from nanochat_jax.config import base_dir
from nanochat_jax.data.prose import clean, texts_of
from nanochat_jax.data.reader import read_documents
from nanochat_jax.data.shards import LOCAL, list_shards

MAX_CHARS = 4_000_000  # of text that is searched
MAX_WORDS, MIN_WORDS = 4096, 500
MAX_SENTENCES, MIN_SENTENCES = 20_000, 100
LENGTHS = range(3, 11)  # letters of a word

_WORD = re.compile(r"(?<![\w.])[A-Za-z]?[a-z]+(?![\w.(])")
_SENTENCE = re.compile(r"(?:^|(?<=\. ))[A-Z][a-z]*(?:,? [a-z]+){5,13}\.(?=\s|$)")


def find_words() -> list[str]:
    """The most frequent words of three to ten letters, in lower case, most frequent first."""
    return _words(base_dir())


def sample_word(rng: random.Random) -> str:
    """A word of the text or, equally often, the beginning of one and the end of another.

    There are so few words that a model would memorise them; made-up ones force it to read.
    """
    words = find_words()
    if rng.random() < 0.5:
        return rng.choice(words)
    while True:
        first, second = rng.choice(words), rng.choice(words)
        word = first[: rng.randint(1, len(first))] + second[rng.randrange(len(second)) :]
        if len(word) in LENGTHS:
            return word


def find_sentences() -> list[str]:
    """Plain sentences of six to fourteen words, no two alike."""
    return _sentences(base_dir())


@cache
def _words(base: Path) -> list[str]:
    found = Counter(word.lower() for text in _texts(base) for word in _WORD.findall(text))
    usable = [word for word in found if len(word) in LENGTHS]
    frequent = sorted(usable, key=lambda word: (-found[word], word))[:MAX_WORDS]
    return _enough(frequent, MIN_WORDS, "words")


@cache
def _sentences(base: Path) -> list[str]:
    joined = (" ".join(text.split()) for text in _texts(base))
    found = dict.fromkeys(one for text in joined for one in _SENTENCE.findall(text))
    return _enough(list(found)[:MAX_SENTENCES], MIN_SENTENCES, "sentences")


def _enough(found: list[str], least: int, what: str) -> list[str]:
    if len(found) < least:
        raise ValueError(
            f"the text of the data set {LOCAL} has only {len(found)} {what} for the tasks made of "
            f"it, and {least} are needed; delete it and run scripts/download.py --dataset {LOCAL}"
        )
    return found


def _texts(base: Path) -> Iterator[str]:
    """Documents until there is enough."""
    chars = 0
    for text in _documents(base):
        yield text
        chars += len(text)
        if chars > MAX_CHARS:
            return


def _documents(base: Path) -> Iterator[str]:
    if not (base / "base_data" / LOCAL).is_dir():
        topics = Path(sysconfig.get_paths()["stdlib"], "pydoc_data", "topics.py")
        yield from map(clean, texts_of(topics))
        return
    for path in list_shards(base / "base_data" / LOCAL).train:
        yield from read_documents(path)
