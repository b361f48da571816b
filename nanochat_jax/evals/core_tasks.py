"""The CORE bundle on disk: which tasks, their questions, the chance of guessing, GPT-2's scores.

A folder or a zip file with core.yaml, eval_meta_data.csv, eval_data/** and CSV files of published
results, as https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip has them; the tasks
are those of DCLM (arXiv 2406.11794).
"""

import csv
import io
import json
import random
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml  # type: ignore[import-untyped]

from nanochat_jax.config import base_dir
from nanochat_jax.evals.scoring_batches import Span, common_length
from nanochat_jax.tasks.sources import CORE_BUNDLE, task_data_dir, verified
from nanochat_jax.tokenizer import SPLIT_PATTERN, Tokenizer

TASKS_FILE, BASELINES_FILE, DATA_FOLDER = "core.yaml", "eval_meta_data.csv", "eval_data"
SHUFFLE_SEED = 1337
# What a question of each type must have, and of which type that is.
FIELDS: dict[str, dict[str, type]] = {
    "multiple_choice": {"query": str, "choices": list, "gold": int},
    "schema": {"context_options": list, "continuation": str, "gold": int},
    "language_modeling": {"context": str, "continuation": str},
}
OPTIONS = {"multiple_choice": "choices", "schema": "context_options"}

type Question = dict[str, Any]


@dataclass(frozen=True)
class CoreTask:
    """One task; `folder` is a Path or a zipfile.Path."""

    label: str
    kind: str  # a key of FIELDS
    file: str
    num_fewshot: int
    delimiter: str  # between a question and its answer
    baseline: float  # accuracy of guessing, 0 to 1
    folder: Any

    def questions(self, at_most: int = -1) -> list[Question]:
        """In the order they are asked: shuffled, then cut to `at_most` (negative: all).

        ValueError names file and line of a question that cannot be used.
        """
        path = self.folder / DATA_FOLDER / self.file
        lines = _read(path).split("\n")  # not splitlines: a text may have other line ends
        questions = [
            _question(line, self.kind, f"{path}, line {number}")
            for number, line in enumerate(lines, start=1)
            if line.strip()
        ]
        random.Random(SHUFFLE_SEED).shuffle(questions)
        return questions[:at_most] if at_most >= 0 else questions


@dataclass(frozen=True)
class Published:
    """Results that others published: model name, and task -> (accuracy, centred)."""

    model: str
    scores: dict[str, tuple[float, float]]
    core: float


@dataclass(frozen=True)
class Bundle:
    tasks: list[CoreTask]
    published: list[Published]  # the weakest first


def find_bundle(path: str | None) -> Path | None:
    """Where the bundle is: `path`, else a folder or zip file in the base directory, or what
    prefetch.py fetched; None when none is there. ValueError when `path` is not there.
    """
    if path is None:
        names = ("eval_bundle", CORE_BUNDLE.name)
        usual = (folder / name for folder in (base_dir(), task_data_dir()) for name in names)
        found = next((candidate for candidate in usual if candidate.exists()), None)
        if found == CORE_BUNDLE.path:
            verified(CORE_BUNDLE)
        return found
    named = Path(path).expanduser()
    if not named.exists():
        raise ValueError(f"there is no CORE bundle at {named}; {how_to_get()}")
    return named


def how_to_get() -> str:
    return (
        f"fetch it with scripts/prefetch.py --stages core, or put {CORE_BUNDLE.name} into "
        f"{base_dir()}, or name it with --bundle"
    )


def read_bundle(path: Path) -> Bundle:
    """What the bundle holds; the questions themselves are read when they are wanted.

    ValueError when it is not a bundle, names a task of an unknown type, or lacks a baseline.
    """
    folder = _root(path)
    baselines = csv.DictReader(io.StringIO(_read(folder / BASELINES_FILE)))
    percent = {row["Eval Task"]: float(row["Random baseline"]) for row in baselines}
    tasks = [_task(entry, percent, folder) for entry in _entries(folder / TASKS_FILE)]
    results = (file for file in folder.iterdir() if file.name.endswith(".csv"))
    published = [_published(file) for file in results if file.name != BASELINES_FILE]
    return Bundle(tasks, sorted(published, key=lambda each: each.core))


def _root(path: Path) -> Any:
    """The folder that has core.yaml: at the top, or in the only folder there."""
    if path.is_file() and not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is neither a folder nor a zip file; {how_to_get()}")
    top: Any = path if path.is_dir() else zipfile.Path(path)
    inside = [top, *(entry for entry in top.iterdir() if entry.is_dir())]
    found = next((folder for folder in inside if (folder / TASKS_FILE).exists()), None)
    if found is None:
        raise ValueError(f"{path} is not a CORE bundle: it has no {TASKS_FILE}; {how_to_get()}")
    return found


def _read(path: Any) -> str:
    if not path.exists():
        raise ValueError(f"the CORE bundle is not whole: {path} is missing; fetch it again")
    return path.read_text(encoding="utf-8")


def _entries(path: Any) -> list[dict[str, Any]]:
    try:
        return yaml.safe_load(_read(path))["icl_tasks"]
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not list icl_tasks: {error}") from None


def _task(entry: dict[str, Any], percent: dict[str, float], folder: Any) -> CoreTask:
    label, kind = entry["label"], entry["icl_task_type"]
    if kind not in FIELDS:
        raise ValueError(f"CORE task {label} is of type {kind!r}; known are {', '.join(FIELDS)}")
    if label not in percent:
        raise ValueError(f"{folder / BASELINES_FILE} has no baseline for the task {label}")
    return CoreTask(
        label,
        kind,
        entry["dataset_uri"],
        entry["num_fewshot"][0],
        entry.get("continuation_delimiter", " "),
        percent[label] / 100,
        folder,
    )


def _published(path: Any) -> Published:
    rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(_read(path)))]
    scores = {label: (float(acc), float(centre)) for label, acc, centre in rows[1:] if acc}
    core = next(float(centre) for label, _, centre in rows if label == "CORE")
    name = path.name.removesuffix(".csv").removeprefix("openai-community-")
    return Published(name, scores, core)


def _question(line: str, kind: str, where: str) -> Question:
    try:
        question = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    for field, wanted in FIELDS[kind].items():
        if not isinstance(question, dict) or not isinstance(question.get(field), wanted):
            raise ValueError(f"{where} needs {field!r} as {wanted.__name__} for {kind}")
    if kind in OPTIONS and not 0 <= question["gold"] < len(question[OPTIONS[kind]]):
        raise ValueError(f"{where}: the right answer, {question['gold']}, is not among the options")
    return question


# --- from a question to text: the examples before it, and its options -----------------------------

FEWSHOT_SEED = 1234
GAP = "\n\n"  # between examples


def examples_for(index: int, n_questions: int, num_fewshot: int) -> list[int]:
    """Which other questions serve as examples for number `index`; all of them if there are fewer.

    Sampled from the others in their order, with a seed for each question.
    """
    rng = random.Random(FEWSHOT_SEED + index)
    chosen = rng.sample(range(n_questions - 1), min(num_fewshot, n_questions - 1))
    return [i + (i >= index) for i in chosen]  # numbers among the others -> among all


def example_text(question: Question, kind: str, delimiter: str) -> str:
    """A question with its right answer."""
    if kind == "multiple_choice":
        return question["query"] + delimiter + question["choices"][question["gold"]]
    if kind == "schema":
        context = question["context_options"][question["gold"]]
        return context + delimiter + question["continuation"]
    return question["context"].strip() + delimiter + question["continuation"]


def option_texts(question: Question, kind: str, delimiter: str) -> list[str]:
    """The question with each option; for language modelling, without and with the continuation."""
    if kind == "multiple_choice":
        return [question["query"] + delimiter + choice for choice in question["choices"]]
    if kind == "schema":
        contexts = question["context_options"]
        return [context + delimiter + question["continuation"] for context in contexts]
    before = question["context"].strip() + delimiter
    # A space at the end would be a separate token, and not part of the continuation's first.
    return [before.rstrip(), before + question["continuation"]]


def prompts(examples: Sequence[Question], question: Question, kind: str, delimiter: str):
    """The complete prompts, one for each option."""
    opening = "".join(example_text(example, kind, delimiter) + GAP for example in examples)
    texts = [opening + text for text in option_texts(question, kind, delimiter)]
    if kind == "language_modeling":  # an empty context leaves the blank line before it at the end
        texts[0] = texts[0].rstrip()
    return texts


# --- tokens ---------------------------------------------------------------------------------------


class PromptEncoder:
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
        if self._tokenizer.pattern == SPLIT_PATTERN and all(start.strip() for start in starts):
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


def find_scored(tokens: Sequence[np.ndarray], kind: str) -> list[Span]:
    """The part of each prompt that is scored; see `clip` for what may be missing.

    ValueError when the tokens before a continuation change with it: then nothing can be scored.
    """
    if kind == "language_modeling":
        without, whole = tokens
        if not len(without) < len(whole) or common_length(without, whole) < len(without):
            raise ValueError(
                "the tokens of the context are no prefix of those with the continuation"
            )
        return [Span(whole, len(without))]
    others = tokens[1:]
    if kind == "multiple_choice":
        common = min((common_length(tokens[0], other) for other in others), default=1)
        return [Span(row, common) for row in tokens]
    reverse = [row[::-1] for row in tokens]
    common = min((common_length(reverse[0], other) for other in reverse[1:]), default=1)
    return [Span(row, len(row) - common) for row in tokens]


def clip(span: Span, max_length: int | None = None) -> Span:
    """The span of a prompt that is cut on the left to `max_length` tokens.

    An option without a token that the others lack, its tokens being the beginning of another's, is
    scored by its last token, so every option has a loss whatever the order of the options.
    """
    surplus = max(0, len(span.tokens) - max_length) if max_length else 0
    last = len(span.tokens) - surplus - 1
    return Span(span.tokens[surplus:], max(1, min(span.start - surplus, last)))
