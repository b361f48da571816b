"""Two exchanges in a row, so that a model learns to continue after the first answer."""

import random

from nanochat_jax.tasks.arithmetic import sample_arithmetic
from nanochat_jax.tasks.identity import NAME, sample_identity, says_its_name
from nanochat_jax.tasks.spelling import sample_counting, sample_spelling
from nanochat_jax.tasks.synthetic import Example, split_of
from nanochat_jax.tasks.task import (
    Conversation,
    extract_answer,
    is_reference,
    is_reference_number,
    reference,
)

SAMPLERS = (sample_arithmetic, sample_identity, sample_counting, sample_spelling)


def sample_dialogue(rng: random.Random) -> Example:
    """Two questions of one split; the key is that of the first."""
    first = rng.choice(SAMPLERS)(rng)
    while True:
        second = rng.choice(SAMPLERS)(rng)
        if split_of(second.key) == split_of(first.key):
            break
    messages = first.conversation["messages"] + second.conversation["messages"]
    return Example(first.key, {"messages": messages})


def is_last_answer(conversation: Conversation, completion: str) -> bool:
    """Judges an answer to the second question as its own task does."""
    wanted = reference(conversation)
    if extract_answer(wanted) is not None:
        return is_reference_number(conversation, completion)
    judge = says_its_name if NAME in wanted else is_reference
    return judge(conversation, completion)
