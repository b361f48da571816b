"""What a stage does besides training steps: measure, write samples, save. The loop calls them.

Every process of a cluster run makes the same calls, since each of them starts with something that
all devices compute together.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import takewhile
from math import lcm
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from nanochat_jax.checkpoint import Checkpoints
from nanochat_jax.data.loader import Batch, merge_states, val_batches
from nanochat_jax.data.shards import Shards
from nanochat_jax.engine.engine import Engine
from nanochat_jax.evals.bits_per_byte import evaluate
from nanochat_jax.evals.samples import SAMPLING, complete, completion_engine
from nanochat_jax.gpt import GPT, Params
from nanochat_jax.loop import NonFiniteError, Progress
from nanochat_jax.runtime import gather_json, is_main_process
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train import (
    TrainState,
    make_eval_step,
    make_gather,
    make_state_to_logical,
    put_batch,
)

VAL_STREAMS = 8  # logical streams that validation text is divided into


def validation_rows(
    shards: Shards, tokenizer: Tokenizer, *, rows: int, sequence_len: int, n_tokens: int
) -> Iterator[np.ndarray]:
    """This process's validation rows, in batches of `rows` over all processes.

    Together `n_tokens`, rounded down to whole rounds of the streams: the same text on any number of
    devices, as long as nothing has to be rounded.
    """
    streams = lcm(VAL_STREAMS, jax.process_count())
    at_once = lcm(rows, streams)
    rounds = val_batches(
        shards,
        tokenizer,
        rows=at_once,
        sequence_len=sequence_len,
        n_batches=max(1, n_tokens // (at_once * sequence_len)),
        streams=streams,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return (part for whole in rounds for part in np.split(whole, at_once // rows))


def make_evaluate(
    model: GPT,
    mesh: Mesh,
    token_bytes: np.ndarray,
    rows: Callable[[], Iterable[Any]],
    stopped: Callable[[], bool] = lambda: False,
    put: Callable[[Any, int, Mesh], Batch] = put_batch,
) -> Callable[[Params], dict[str, float] | None]:
    """The function from a state's parameters to bits per byte over `rows()`; None when stopped.

    `rows` gives this process's rows of each batch, which `put` brings on the mesh; they must always
    be the same, and are read once. `stopped` is asked between batches; in a cluster it must always
    say no.
    """
    eval_step = make_eval_step(model, mesh)
    kept: list[Any] = []  # tokenising them again each time would cost more than the model

    def run(params: Params) -> dict[str, float] | None:
        if not kept:
            kept.extend(takewhile(lambda _: not stopped(), rows()))
        batches = (put(part, 1, mesh) for part in kept if not stopped())
        result = evaluate(eval_step, params, batches, token_bytes)
        if stopped():
            kept.clear()  # they may not be all
            return None
        return result

    return run


def make_sample(
    model: GPT,
    mesh: Mesh,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    n_tokens: int,
    seed: int,
    *,
    chat: bool = False,
) -> Callable[[Params], list[tuple[str, str]]]:
    """The function from a state's parameters to (prompt, completion) pairs; [] but on process 0.

    With `chat` the prompts are questions, and the completions the assistant's answers.
    """
    gather = make_gather(model, mesh)
    engines: list[Engine] = []  # made once: its programs are compiled once

    def run(params: Params) -> list[tuple[str, str]]:
        whole = gather(params)
        if not is_main_process():
            return []
        one_device = {name: array.addressable_data(0) for name, array in whole.items()}
        if engines:
            engines[0].use(one_device)
        else:
            engines.append(
                completion_engine(model, one_device, tokenizer, prompts, n_tokens, chat=chat)
            )
        engine = engines[0]
        sampling = replace(SAMPLING, seed=seed)
        texts = complete(
            engine, tokenizer, prompts, max_new_tokens=n_tokens, sampling=sampling, chat=chat
        )
        engine.release()  # its memory is the training's
        return list(zip(prompts, texts, strict=True))

    return run


def make_save(
    model: GPT,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    checkpoints: Checkpoints,
    loader_state: Callable[[], dict[str, Any]],
    describe: Callable[[int, Progress], dict[str, Any]],
) -> Callable[[TrainState, Progress], None]:
    """The function that begins to save a state, with what `describe(step, progress)` says of it.

    Parameters that are not finite are never saved: NonFiniteError.
    """
    to_logical = make_state_to_logical(model, optimizer, mesh)
    all_finite = jax.jit(lambda params: jnp.all(jnp.stack([jnp.isfinite(p).all() for p in params])))

    def run(state: TrainState, progress: Progress) -> None:
        step = int(state.step)
        if not all_finite(list(state.params.values())):
            raise NonFiniteError(step, "a parameter is not finite", loader_state())
        checkpoints.save(
            to_logical(state), describe(step, progress), merge_over_processes(loader_state())
        )

    return run


def merge_over_processes(loader_state: dict[str, Any]) -> dict[str, Any]:
    """The data states of all processes as one; every process must call it."""
    return merge_states(gather_json(loader_state))
