"""What a task is: conversations by number, and a judge of completions.

A new verifiable task is one small class: inherit from Task, set `name` and `kind`, and write
`__len__`, `__getitem__` and, unless right means the reference word for word, `evaluate`. If it is
made with a split ("train" or "test") and a limit (of examples, or None), a line in registry.py's
MADE_HERE gives it a name on the command line.

A conversation is what the tokenizer renders, {"messages": [{"role": …, "content": …}, …]}, ending
with the assistant's message that is to be learned. That of a categorical task also has "letters":
the model's choice is the most likely (argmax) of them, each being one token.
"""

import logging
import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, Literal, NamedTuple, Protocol

from nanochat_jax.tokenizer import split_system

log = logging.getLogger(__name__)

type Conversation = dict[str, Any]
type Part = dict[str, str]
type Kind = Literal["categorical", "generative"]

LETTERS = ("A", "B", "C", "D")
MAX_NAMED = 20  # unusable rows that a warning names


class Skipped(NamedTuple):
    """A row that cannot be used."""

    where: str
    why: str


class Conversations(Protocol):
    """Conversations by number: what a model is trained on.

    `task[i]` raises IndexError outside 0 … len − 1. `where(i)` names the source of a conversation.
    `skipped` are the rows that were left out, `notes` lines for the log about what was read.
    """

    name: str
    skipped: Sequence[Skipped] = ()
    notes: Sequence[str] = ()

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Conversation: ...

    def where(self, i: int) -> str:
        return f"{self.name}, example {i}"


class Task(Conversations, Protocol):
    """Conversations with a judge: what a model is measured on, and rewarded for.

    A completion is the text of the assistant's message, with the markers of its tool calls.
    """

    kind: Kind

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether a completion is right: by default, whether it is the reference."""
        return is_reference(conversation, completion)

    def reward(self, conversation: Conversation, completion: str) -> float:
        """The reward of a completion in reinforcement learning; 1 and more means right."""
        return float(self.evaluate(conversation, completion))


# ---- making conversations --------------------------------------------------------------------


def exchange(question: str, answer: str | list[Part], **more: Any) -> Conversation:
    """A question and its answer; `more` are other keys of the conversation."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **more}


def text(content: str) -> Part:
    return {"type": "text", "text": content}


def python(expression: str, output: str) -> list[Part]:
    """A call of the calculator, and its output."""
    return [{"type": "python", "text": expression}, {"type": "python_output", "text": output}]


def multiple_choice(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """A question in the format of all multiple-choice tasks.

    The letter follows its choice without a space, so that it is the same token as in the answer.
    """
    lines = [f"- {choice}={letter}\n" for letter, choice in zip(letters, choices, strict=False)]
    return (
        f"Multiple Choice question: {question}\n{''.join(lines)}"
        "\nRespond only with the letter of the correct answer."
    )


# ---- judging ---------------------------------------------------------------------------------


def reference(conversation: Conversation) -> str:
    """The end of the assistant's last message: its text, or the text of its last part."""
    content = conversation["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def is_reference(conversation: Conversation, completion: str) -> bool:
    """The judge of letters, and of all answers with a single right wording."""
    return completion.strip() == reference(conversation).strip()


# ---- checking --------------------------------------------------------------------------------


def check_index(i: int, length: int) -> None:
    """IndexError outside 0 … length − 1, which also ends `for conversation in task`."""
    if not 0 <= i < length:
        raise IndexError(f"example {i} of {length}")


def check_answered(task: Task) -> None:
    """ValueError for the first conversation that does not end with a reference answer."""
    for i in range(len(task)):
        if task[i]["messages"][-1]["role"] != "assistant":
            raise ValueError(
                f"{task.where(i)}: the last message is not the assistant's, so there is no answer "
                "to judge others by; add one, or remove the line"
            )


def why_unusable(messages: Any) -> str | None:
    """What is wrong with a list of messages, or None.

    The tokenizer must be able to render them, none may be empty, and at least one must be the
    assistant's.
    """
    try:
        _, turns = split_system({"messages": messages})
    except ValueError as error:
        return str(error)
    if len(turns) < 2:
        return "no message of the assistant"
    if all(turn.get("weight") == 0 for turn in turns[1::2]):
        return "nothing to learn: the weight of all messages of the assistant is 0"
    for message in turns:
        content = message["content"]
        text = content if isinstance(content, str) else "".join(part["text"] for part in content)
        if not text.strip():
            return f"an empty message of the {message['role']}"
    return None


def report_skipped(name: str, skipped: Sequence[Skipped], total: int) -> None:
    """One warning for all rows that were left out; ValueError if no row is left."""
    if not skipped:
        return
    if len(skipped) == total:
        first = f"the first is {skipped[0].where}: {skipped[0].why}"
        raise ValueError(f"{name}: none of {total:,} rows can be used; {first}")
    lines = [f"{name}: {len(skipped)} of {total} rows cannot be used:"]
    lines += [f"  {row.where}: {row.why}" for row in skipped[:MAX_NAMED]]
    if len(skipped) > MAX_NAMED:
        lines.append(f"  and {len(skipped) - MAX_NAMED} more")
    log.warning("\n".join(lines))


# ---- numbers after "#### ": GSM8K, arithmetic and counting -----------------------------------

_ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")


def extract_answer(text: str) -> str | None:
    """What follows the first "#### ", without the commas between thousands."""
    found = _ANSWER.search(text)
    return found[1].replace(",", "") if found else None


def is_reference_number(conversation: Conversation, completion: str) -> bool:
    """Whether both answers are the same number: 72 is 72.0. A missing answer is wrong."""
    wanted, given = _number(reference(conversation)), _number(completion)
    return wanted is not None and wanted == given


def _number(text: str) -> Decimal | None:
    answer = extract_answer(text)
    try:
        return None if answer is None else Decimal(answer.rstrip("."))  # the end of a sentence
    except InvalidOperation:  # "1.2.3", "."
        return None
