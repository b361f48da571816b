"""The answer after "#### ", which arithmetic, counting and GSM8K share, and its judge."""

import re
from decimal import Decimal, InvalidOperation

from nanochat_jax.tasks.task import Conversation, reference

_ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")


def extract_answer(text: str) -> str | None:
    """What follows the first "#### ", without the commas between thousands."""
    found = _ANSWER.search(text)
    return found[1].replace(",", "") if found else None


def is_reference_number(conversation: Conversation, completion: str) -> bool:
    """Whether both answers are the same number: 72 is 72.0. No answer never matches."""
    wanted, given = _number(reference(conversation)), _number(completion)
    return wanted is not None and wanted == given


def _number(text: str) -> Decimal | None:
    answer = extract_answer(text)
    try:
        return None if answer is None else Decimal(answer.rstrip("."))  # the end of a sentence
    except InvalidOperation:  # "1.2.3", "."
        return None
