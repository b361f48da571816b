"""Two exchanges in a row, so that a model that only knows short talks learns to go on."""

import random

from nanochat_jax.tasks.arithmetic import draw_arithmetic
from nanochat_jax.tasks.identity import NAME, draw_identity, says_its_name
from nanochat_jax.tasks.spelling import draw_counting, draw_spelling
from nanochat_jax.tasks.synthetic import Drawn, split_of
from nanochat_jax.tasks.task import (
    Conversation,
    extract_answer,
    is_reference,
    is_reference_number,
    reference,
)

DRAWS = (draw_arithmetic, draw_identity, draw_counting, draw_spelling)


def draw_dialogue(rng: random.Random) -> Drawn:
    """Two questions of the same split; the key is that of the first."""
    first = rng.choice(DRAWS)(rng)
    while True:
        second = rng.choice(DRAWS)(rng)
        if split_of(second.key) == split_of(first.key):
            break
    messages = first.conversation["messages"] + second.conversation["messages"]
    return Drawn(first.key, {"messages": messages})


def is_last_answer(conversation: Conversation, completion: str) -> bool:
    """Judges an answer to the second question as the task it is of does."""
    wanted = reference(conversation)
    if extract_answer(wanted) is not None:
        return is_reference_number(conversation, completion)
    judge = says_its_name if NAME in wanted else is_reference
    return judge(conversation, completion)
