"""Models whose answers are known: after every token stand the ones that may follow.

All blocks add nothing, so the logits depend on the last token alone: each token has its own
dimension in the embedding, by which the head points at its followers. Both models have the same
shapes, so that their programs are compiled once: one says short things, in tokens of one byte, and
the other what the page is to show.
"""

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.checkpoint import Checkpoints, model_meta, tokenizer_fingerprint
from nanochat_jax.gpt import GPTConfig, parameter_table
from nanochat_jax.runs import TOKENIZER_FOLDER
from nanochat_jax.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat_jax.train import TrainState

# What every chat says. The calculator's answer comes after the call; each byte occurs once.
ANSWER = "Hi 😀1+2."
ANSWER_PARTS = [
    {"type": "text", "text": "Hi 😀"},
    {"type": "python", "text": "1+2"},
    {"type": "python_output", "text": "3"},
    {"type": "text", "text": "."},
]
ANSWER_TEXT = "Hi 😀."
LETTERS = "abcdefgh"
SHORT = [
    ("<|assistant_start|>", *"Hi ", *"😀".encode(), "<|python_start|>", *"1+2", "<|python_end|>"),
    ("<|output_end|>", ".", "<|assistant_end|>"),
    "xyzx",  # never ends
    *(f"?{letter}?" for letter in LETTERS),  # by chance
    ("!", 0xFF),  # no UTF-8
    ("&", 0xE2, 0x82),  # half a character
]

# What every chat on the page says: one of two words, equally likely, and then the rest, in which
# two tokens cut the emoji. The 36 between the two chains is the calculator's.
FIRST_WORDS = ("Good", "Nice")
HOSTILE = "<img src=x onerror=alert(1)>"
BEFORE = (" day ", HOSTILE, "\n", "<|python_start|>", "12*3", "<|python_end|>")
AFTER = (" is it", b" \xf0\x9f", b"\x98\x80:\n", "```py\n", "print(36)", "\n```\n", "Bye.")
PAGE_TEXT = f" day {HOSTILE}\n is it 😀:\n```py\nprint(36)\n```\nBye."
PAGE_SHOWN = f" day {HOSTILE}\nCalculator: 12*3=Result: 36 is it 😀:\nprint(36)\nBye."
PAGE = [
    *(("<|assistant_start|>", word, *BEFORE) for word in FIRST_WORDS),
    ("<|output_end|>", *AFTER, "<|assistant_end|>"),
    # A base model continues a text that ends in "o" until the context is full.
    ("o", " on", " and", " on"),
]

WORDS = dict.fromkeys(
    word if isinstance(word, bytes) else word.encode()
    for chain in PAGE
    for word in chain
    if len(word) > 1 and word not in SPECIAL_TOKENS
)
TOKENIZER = Tokenizer([*(bytes([byte]) for byte in range(256)), *WORDS])
CONTEXT = 4096
CONFIG = GPTConfig(
    sequence_len=CONTEXT,
    vocab_size=TOKENIZER.vocab_size,
    n_layer=1,
    n_head=2,
    n_kv_head=1,
    n_embd=288,
    window_pattern="L",
)


def token_of(word: str | bytes | int) -> int:
    if isinstance(word, int):
        return word
    if word in SPECIAL_TOKENS:
        return TOKENIZER.special_id(word)
    return TOKENIZER.ranks.index(word if isinstance(word, bytes) else word.encode())


def parameters(chains: Iterable[Iterable[str | bytes | int]]) -> dict[str, np.ndarray]:
    """Of a model in which the tokens of a chain follow each other, and <|bos|> all others."""
    after: dict[int, list[int]] = {}
    for chain in chains:
        for word, following in pairwise(chain):
            after.setdefault(token_of(word), []).append(token_of(following))
    params = {
        name: np.zeros(shape, np.float32) for name, (shape, _) in parameter_table(CONFIG).items()
    }
    params["resid_lambdas"][:] = 1
    for token in range(CONFIG.vocab_size):
        params["wte"][token, token] = 1
        params["lm_head"][after.get(token, [TOKENIZER.bos_id]), token] = 2
    return params


def write_run(folder: Path, stage: str = "sft", chains=SHORT) -> None:
    """A run's folder with this model as its checkpoint."""
    TOKENIZER.save(folder / TOKENIZER_FOLDER)
    state = TrainState(jnp.int32(7), jax.device_put(parameters(chains)), {"none": jnp.zeros(1)})
    with Checkpoints(folder) as checkpoints:
        identity = {"tokenizer": tokenizer_fingerprint(TOKENIZER)}
        about = {"stage": stage, "step": 7, "val_bpb": 1.25, "identity": identity}
        meta = model_meta(CONFIG) | about
        checkpoints.save(state, meta, None)
