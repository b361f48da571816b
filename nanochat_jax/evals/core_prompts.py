"""From a question of CORE to tokens: examples before it, its options, and what of them is scored.

A prompt is the examples, each with its answer and a blank line after it, then the question with one
of its options. What is scored: of multiple choice the tokens in which the options differ, of a
schema the tokens in which they agree at the end, of language modelling the continuation.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nanochat_jax.evals.core_bundle import Question
from nanochat_jax.evals.scoring_rows import Span, common_length
from nanochat_jax.tokenizer import SPLIT_PATTERN, Tokenizer

FEWSHOT_SEED = 1234
GAP = "\n\n"  # between examples


def examples_for(index: int, n_questions: int, num_fewshot: int) -> list[int]:
    """Which other questions serve as examples for number `index`; all of them if there are fewer.

    Drawn with a seed of each question's own, among the others in their order.
    """
    rng = random.Random(FEWSHOT_SEED + index)
    drawn = rng.sample(range(n_questions - 1), min(num_fewshot, n_questions - 1))
    return [i + (i >= index) for i in drawn]  # numbers among the others -> among all


def example_text(question: Question, kind: str, delimiter: str) -> str:
    """A question with its right answer."""
    if kind == "multiple_choice":
        return question["query"] + delimiter + question["choices"][question["gold"]]
    if kind == "schema":
        context = question["context_options"][question["gold"]]
        return context + delimiter + question["continuation"]
    return question["context"].strip() + delimiter + question["continuation"]


def option_texts(question: Question, kind: str, delimiter: str) -> list[str]:
    """The question with each option; of language modelling without and with the continuation."""
    if kind == "multiple_choice":
        return [question["query"] + delimiter + choice for choice in question["choices"]]
    if kind == "schema":
        contexts = question["context_options"]
        return [context + delimiter + question["continuation"] for context in contexts]
    before = question["context"].strip() + delimiter
    # A space at the end would be a token of its own, and not the continuation's first.
    return [before.rstrip(), before + question["continuation"]]


def prompts(examples: Sequence[Question], question: Question, kind: str, delimiter: str):
    """The whole prompts, one for each option."""
    opening = "".join(example_text(example, kind, delimiter) + GAP for example in examples)
    texts = [opening + text for text in option_texts(question, kind, delimiter)]
    if kind == "language_modeling":  # an empty context leaves the blank line before it at the end
        texts[0] = texts[0].rstrip()
    return texts


# --- tokens ---------------------------------------------------------------------------------------


class Encoder:
    """Tokens of a task's prompts. A question's text as an example is encoded once.

    That is exact where the split pattern cuts behind a blank line, which it does if no white space
    follows; otherwise, and for tokenizers of another pattern, the whole prompt is encoded.
    """

    def __init__(
        self, tokenizer: Tokenizer, questions: Sequence[Question], kind: str, delimiter: str
    ):
        self._tokenizer, self._questions = tokenizer, questions
        self._kind, self._delimiter = kind, delimiter
        self._examples: dict[int, np.ndarray] = {}
        self._bos = np.array([tokenizer.bos_id], np.int32)

    def prompts(self, index: int, examples: Sequence[int]) -> list[np.ndarray]:
        """Tokens of the prompts of question `index`, each an int32 array with <|bos|> first."""
        question = self._questions[index]
        texts = option_texts(question, self._kind, self._delimiter)
        starts = [text[:1] for text in texts] + [self._example(i)[:1] for i in examples]
        if self._tokenizer.pattern == SPLIT_PATTERN and not any(map(_is_space_or_empty, starts)):
            opening = [self._bos, *(self._encoded_example(i) for i in examples)]
            return [np.concatenate([*opening, self._encode(text)]) for text in texts]
        shown = [self._questions[i] for i in examples]
        whole = prompts(shown, question, self._kind, self._delimiter)
        return [np.concatenate([self._bos, self._encode(text)]) for text in whole]

    def _example(self, index: int) -> str:
        return example_text(self._questions[index], self._kind, self._delimiter)

    def _encoded_example(self, index: int) -> np.ndarray:
        if index not in self._examples:
            self._examples[index] = self._encode(self._example(index) + GAP)
        return self._examples[index]

    def _encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text), np.int32)


def _is_space_or_empty(start: str) -> bool:
    return not start or start.isspace()


class Encoded(NamedTuple):
    """Prompts of one question, tokens[i][starts[i]:] being scored."""

    tokens: list[np.ndarray]
    starts: list[int]


def find_scored(tokens: Sequence[np.ndarray], kind: str) -> Encoded:
    """What of the prompts is scored.

    ValueError when the tokens before a continuation change with it: then nothing can be scored.
    """
    if kind == "language_modeling":
        without, whole = tokens
        if not len(without) < len(whole) or common_length(without, whole) < len(without):
            raise ValueError(
                "the tokens of the context are no prefix of those with the continuation"
            )
        return Encoded([whole], [len(without)])
    others = tokens[1:]
    if kind == "multiple_choice":
        common = min((common_length(tokens[0], other) for other in others), default=1)
        return Encoded(list(tokens), [common] * len(tokens))
    reverse = [row[::-1] for row in tokens]
    common = min((common_length(reverse[0], other) for other in reverse[1:]), default=1)
    return Encoded(list(tokens), [len(row) - common for row in tokens])


def spans(encoded: Encoded, max_length: int | None = None) -> list[Span]:
    """The prompts to score, cut on the left to `max_length` tokens.

    An option that has no token of its own, its tokens being the beginning of another's, is scored
    by its last token: every option has a loss, wherever it stands.
    """
    found = []
    for tokens, start in zip(encoded.tokens, encoded.starts, strict=True):
        surplus = max(0, len(tokens) - max_length) if max_length else 0
        last = len(tokens) - surplus - 1
        found.append(Span(tokens[surplus:], max(1, min(start - surplus, last))))
    return found
