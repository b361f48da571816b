"""Multiple choice built from the local text, answered with a bare letter.

Which choice is a given word, which of four words occurs in a sentence, which word is missing from
it: what a small model can find in the question, or know from such text.
"""

import random
import re

from nanochat_jax.tasks.synthetic import Example
from nanochat_jax.tasks.task import LETTERS, exchange, multiple_choice
from nanochat_jax.tasks.words import find_sentences, find_words

GAP = "___"
MIN_LETTERS = 4  # of a word that is the answer: "the" fits anywhere
N_FREQUENT = 1500  # wrong choices are among so many of the most frequent words


def sample_choice(rng: random.Random) -> Example:
    """A question about a sentence or about a word, which is the key."""
    if rng.random() < 0.4:
        word = _common_word(rng)
        return _asked(rng, word, f"Which one is the word {word}?", word)
    sentence = rng.choice(find_sentences())
    word = rng.choice(_candidates(sentence))
    if rng.random() < 0.5:
        return _asked(rng, sentence, f"Which word is in this sentence? {sentence}", word)
    gapped = re.sub(rf"\b{word}\b", GAP, sentence, count=1)
    return _asked(rng, sentence, f"Which word is missing? {gapped}", word)


def _asked(rng: random.Random, key: str, question: str, right: str) -> Example:
    choices = [right, *_others(rng, f"{question} {right}")]
    rng.shuffle(choices)
    answer = LETTERS[choices.index(right)]
    choice = exchange(multiple_choice(question, LETTERS, choices), answer, letters=LETTERS)
    return Example(key, choice)


def _words_of(sentence: str) -> list[str]:
    return re.findall("[a-z]+", sentence.lower())


def _candidates(sentence: str) -> list[str]:
    words = _words_of(sentence)[1:]  # the first has a capital letter
    return [word for word in words if len(word) >= MIN_LETTERS] or [max(words, key=len)]


def _others(rng: random.Random, shown: str) -> list[str]:
    """Three different words that occur neither in the question nor in the answer."""
    inside = set(_words_of(multiple_choice(shown, (), ())))
    others: list[str] = []
    while len(others) < 3:
        word = _common_word(rng)
        if word not in inside and word not in others:
            others.append(word)
    return others


def _common_word(rng: random.Random) -> str:
    words = find_words()
    while len(word := words[rng.randrange(min(N_FREQUENT, len(words)))]) < MIN_LETTERS:
        pass
    return word
