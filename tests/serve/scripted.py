"""A model of which one knows what it will say: after every token stand the ones that may follow.

All blocks add nothing, so the logits depend on the last token alone: its embedding is one dimension
of its own, by which the head points at its followers.
"""

from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.checkpoint import Checkpoints, model_meta
from nanochat_jax.gpt import GPTConfig, parameter_table
from nanochat_jax.runs import TOKENIZER_FOLDER
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train import TrainState

TOKENIZER = Tokenizer([bytes([byte]) for byte in range(256)])
CONTEXT = 4096
CONFIG = GPTConfig(
    sequence_len=CONTEXT,
    vocab_size=TOKENIZER.vocab_size,
    n_layer=1,
    n_head=2,
    n_kv_head=1,
    n_embd=272,
    window_pattern="L",
)

# What every chat says. The calculator's answer comes after the call; each byte occurs once.
ANSWER = "Hi 😀1+2."
ANSWER_PARTS = [
    {"type": "text", "text": "Hi 😀"},
    {"type": "python", "text": "1+2"},
    {"type": "python_output", "text": "3"},
    {"type": "text", "text": "."},
]
ANSWER_TEXT = "Hi 😀."
LETTERS = b"abcdefgh"


def followers() -> dict[int, list[int]]:
    """token -> those that may follow it, equally likely; after all others comes <|bos|>."""
    special = TOKENIZER.special_id
    said: list[int] = [special("<|assistant_start|>"), *"Hi 😀".encode()]
    said += [special("<|python_start|>"), *b"1+2", special("<|python_end|>")]
    answered = [special("<|output_end|>"), *b".", special("<|assistant_end|>")]
    after = {a: [b] for line in (said, answered) for a, b in pairwise(line)}
    after |= {ord(a): [ord(b)] for a, b in ("xy", "yz", "zx")}  # never ends
    after |= {ord("?"): list(LETTERS)} | {letter: [ord("?")] for letter in LETTERS}  # by chance
    after |= {ord("!"): [0xFF], ord("&"): [0xE2], 0xE2: [0x82]}  # no UTF-8, and half a character
    return after


def parameters() -> dict[str, np.ndarray]:
    params = {
        name: np.zeros(shape, np.float32) for name, (shape, _) in parameter_table(CONFIG).items()
    }
    params["resid_lambdas"][:] = 1
    after = followers()
    for token in range(CONFIG.vocab_size):
        params["wte"][token, token] = 1
        for follower in after.get(token, [TOKENIZER.bos_id]):
            params["lm_head"][follower, token] = 2
    return params


def write_run(folder: Path, stage: str) -> None:
    """A run's folder with this model as its checkpoint."""
    TOKENIZER.save(folder / TOKENIZER_FOLDER)
    state = TrainState(jnp.int32(7), jax.device_put(parameters()), {"none": jnp.zeros(1)})
    with Checkpoints(folder) as checkpoints:
        meta = model_meta(CONFIG) | {"stage": stage, "step": 7, "val_bpb": 1.25}
        checkpoints.save(state, meta, None)
