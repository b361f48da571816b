"""A toy that learns sums of one digit in seconds: its questions, its tokenizer, and a model that a
little supervised training has taught the form of an answer, but not always the right one."""

import json
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np
from golden_optim import for_recipe

from nanochat_jax.checkpoint import Checkpoints, model_meta
from nanochat_jax.gpt import GPT, GPTConfig
from nanochat_jax.optim import make_optimizer
from nanochat_jax.sharding import make_mesh
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train import Batch, init_state, make_train_step, put_arrays

LENGTH = 16  # tokens of a question and its answer, padded
# Sums of one digit.
SUMS = [(f"{a}+{b}=", f"{a + b}") for a in range(10) for b in range(10 - a)]


def exchange(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write_questions(path: Path) -> None:
    lines = [json.dumps(exchange(*pair)) for pair in SUMS]
    np.random.default_rng(0).shuffle(lines)
    path.write_text("\n".join(lines), encoding="utf-8")


def toy_tokenizer() -> Tokenizer:
    return Tokenizer.train([f"{a}{b}" for a, b in SUMS], vocab_size=265)


def supervised_rows(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    inputs, targets = [], []
    for pair in SUMS:
        ids, mask = tokenizer.render_conversation({"messages": exchange(*pair)})
        padding = LENGTH + 1 - len(ids)
        ids, mask = np.pad(ids, (0, padding)), np.pad(mask, (0, padding))
        inputs.append(ids[:-1])
        targets.append(np.where(mask, ids, -1)[1:])
    return np.array(inputs, np.int32), np.array(targets, np.int32)


def save_supervised(folder: Path, steps: int, seed: int = 0) -> None:
    """Trains for so many steps, and leaves a run as scripts/sft.py does."""
    tokenizer = toy_tokenizer()
    config = GPTConfig(
        sequence_len=32,
        vocab_size=tokenizer.vocab_size,
        n_layer=2,
        n_head=2,
        n_kv_head=2,
        n_embd=64,
    )
    model, mesh = GPT(config), make_mesh(1)
    rates = {"embedding_lr": 0.2, "unembedding_lr": 0.02, "matrix_lr": 0.02, "scalar_lr": 0.1}
    optim_config = for_recipe("2026", steps, warmup_steps=0, **rates)
    optimizer = make_optimizer(config, optim_config)
    state = init_state(model, optimizer, mesh, jax.random.key(seed))
    step = make_train_step(model, optimizer, mesh)
    inputs, targets = supervised_rows(tokenizer)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        chosen = rng.choice(len(SUMS), 32)
        batch = Batch(*put_arrays((inputs[chosen], targets[chosen]), 1, mesh))
        state, _ = step(state, batch)
    identity = {"optimizer": asdict(optim_config)}
    meta = {"stage": "sft", "step": steps, "identity": identity, **model_meta(config)}
    tokenizer.save(folder / "tokenizer")
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(state, meta, None)
        checkpoints.wait()
