"""Letters of words: counting them and spelling.

A model sees tokens, not letters, so these are hard for it. `spellingbee` and `spelling` sample from
a list of 370,099 English words (dwyl/english-words) exactly as nanochat's SpellingBee and
SimpleSpelling do, with other wording. `counting` and `spelling-local` sample from the words of the
local text and made-up ones; they are short, and no word of the test split is trained on.
"""

import random
from functools import cache
from pathlib import Path
from string import ascii_lowercase

from nanochat_jax.tasks.synthetic import Example, check_split
from nanochat_jax.tasks.task import (
    Conversation,
    Part,
    Task,
    check_index,
    exchange,
    is_reference_number,
    python,
    text,
)
from nanochat_jax.tasks.words import sample_word

SIZE = 1000  # examples unless a limit asks for fewer or more
TEST_SEEDS = 10_000_000  # plus i is the seed of example i of the test split
SHUFFLE_SEED = 42

# A word in single quotes at the beginning of a line becomes the same tokens as in the call.
COUNT_QUESTIONS = (
    "'{word}'\nHow many {letter} are in this word?",
    "'{word}': how many times does it have the letter {letter}?",
    "Count the letter {letter} in this word:\n'{word}'",
    "How many {letter} are in {word}?",
    "How many {letter} are there in the word {word}?",
    "How many times does the letter {letter} occur in {word}?",
)
BEE_QUESTIONS = (
    *COUNT_QUESTIONS,
    "How many '{letter}' does '{word}' have?",
    "how often does {letter} come up in {word}",
    "In {word}, how many letters are {letter}?",
    "Tell me the number of {letter} in the word {word}.",
    "Wie viele {letter} hat das Wort {word}?",
    "Combien de {letter} y a-t-il dans {word} ?",
    "¿Cuántas veces aparece {letter} en {word}?",
)
SPELL_QUESTIONS = ("Spell {word}.", "How do you spell {word}?", "Please spell the word {word}.")


class WordTask(Task):
    """Questions about the words of a list; example i has its own random seed."""

    kind = "generative"

    def __init__(self, words: list[str], split: str = "train", size: int | None = None) -> None:
        check_split(self.name, split)
        self._words, self._first = words, 0 if split == "train" else TEST_SEEDS
        self._size = SIZE if size is None else size

    def about(self, word: str, rng: random.Random) -> Conversation:
        """The example about a word."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, i: int) -> Conversation:
        check_index(i, len(self))
        rng = random.Random(self._first + i)
        return self.about(rng.choice(self._words), rng)


class SpellingBee(WordTask):
    """How many times a letter occurs in a word: counted by hand, then by the calculator."""

    name = "spellingbee"

    def about(self, word: str, rng: random.Random) -> Conversation:
        letter = rng.choice(word) if rng.random() < 0.9 else rng.choice(ascii_lowercase)
        question = rng.choice(BEE_QUESTIONS).format(word=word, letter=letter)
        return exchange(question, count_by_hand(word, letter))

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return is_reference_number(conversation, completion)


class SimpleSpelling(WordTask):
    """A word and its letters: "word:w,o,r,d"."""

    name = "spelling"

    def __init__(self, words: list[str], split: str = "train", size: int | None = None) -> None:
        shuffled = list(words)
        random.Random(SHUFFLE_SEED).shuffle(shuffled)
        super().__init__(shuffled, split, size)

    def about(self, word: str, rng: random.Random) -> Conversation:
        question = rng.choice(SPELL_QUESTIONS).format(word=word)
        return exchange(question, f"{word}:{','.join(word)}")


def count_by_hand(word: str, letter: str) -> list[Part]:
    """Goes through the letters, then asks the calculator and trusts it."""
    lines, count = [], 0
    for number, one in enumerate(word, start=1):
        count += one == letter
        lines.append(f"{number}:{one} yes, {count}" if one == letter else f"{number}:{one}")
    by_hand = (
        f"The letters of '{word}' are\n{word}:{','.join(word)}\n\nOne by one, for '{letter}':\n"
    )
    return [
        text(by_hand + "\n".join(lines) + f"\n\nI counted {count}."),
        text("\n\nThe calculator says:\n\n"),
        *count_call(word, letter),
        text(f"\n\nSo the answer is\n\n#### {word.count(letter)}"),
    ]


def count_call(word: str, letter: str) -> list[Part]:
    return python(f"'{word}'.count('{letter}')", str(word.count(letter)))


def sample_counting(rng: random.Random) -> Example:
    """The calculator counts a letter of a word, or of a made-up one; the key is the word."""
    word = sample_word(rng)
    letter = rng.choice(word) if rng.random() < 0.85 else rng.choice(ascii_lowercase)
    question = rng.choice(COUNT_QUESTIONS).format(word=word, letter=letter)
    count = word.count(letter)
    answer = [*count_call(word, letter), text(f"I count {count}.\n#### {count}")]
    return Example(word, exchange(question, answer))


def sample_spelling(rng: random.Random) -> Example:
    """A word, or a made-up one, and its letters separated by spaces, each of them one token."""
    word = sample_word(rng)
    return Example(word, exchange(rng.choice(SPELL_QUESTIONS).format(word=word), " ".join(word)))


@cache
def read_words(path: Path) -> list[str]:
    """A list of words, one a line."""
    try:
        words = path.read_text(encoding="utf-8-sig").split()
    except UnicodeDecodeError:
        words = []
    if not words:
        raise ValueError(f"{path} is no list of words; delete it and run scripts/prefetch.py")
    return words
