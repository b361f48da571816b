"""What a stage of training is: the base class that pretraining, fine-tuning and RL fill in.

A stage says what is trained, on what, and how it is measured; loop.py runs it. Making one reads and
decides, and writes nothing: a ValueError says what is missing or does not fit.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import takewhile
from math import lcm
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from nanochat_jax.checkpoint import (
    choose_step,
    model_meta,
    naming_a_whole_one,
    open_checkpoints,
    tokenizer_fingerprint,
)
from nanochat_jax.data.loader import choose_streams
from nanochat_jax.data.packing import LongDocuments
from nanochat_jax.data.shards import Shards
from nanochat_jax.data.text import val_batches
from nanochat_jax.devices import peak_flops
from nanochat_jax.distributed import is_main_process, say
from nanochat_jax.engine.engine import Engine
from nanochat_jax.evals.bits_per_byte import evaluate
from nanochat_jax.evals.generation import PROMPTS, SAMPLING, complete, completion_engine
from nanochat_jax.gpt import GPT, GPTConfig, Params
from nanochat_jax.optim import OptimConfig, lr_multiplier, make_optimizer
from nanochat_jax.runs import default_run, run_folder
from nanochat_jax.stages.settings import RunSettings, TrainSettings
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train import Batch, Metrics, TrainState, make_eval_step, make_gather, put_batch


class Loader(Protocol):
    """What a stage's batches are made from; used in a `with`."""

    def __next__(self) -> Any: ...
    def get_state(self) -> dict[str, Any]: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *exc: object) -> None: ...


type TrainStep = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


@dataclass(frozen=True)
class Source:
    """The checkpoint whose model is trained further."""

    name: str
    folder: Path
    step: int
    meta: dict[str, Any]

    @property
    def gpt_config(self) -> GPTConfig:
        return GPTConfig(**self.meta["model"])

    @property
    def optim_config(self) -> OptimConfig:
        return OptimConfig(**self.meta["identity"]["optimizer"])


@dataclass(frozen=True, kw_only=True, eq=False)
class Stage:
    """What every stage has. A subclass says what is trained, on what, and how it is measured."""

    prompts: ClassVar[Sequence[str]] = PROMPTS  # that `sample` completes
    chat: ClassVar[bool] = False  # whether they are questions to an assistant

    name: str  # of the script, and in the meta of checkpoints
    config: RunSettings  # resolved: a run started from it decides the same again
    model: GPT
    tokenizer: Tokenizer
    mesh: Mesh
    optim_config: OptimConfig
    num_steps: int
    tokens_per_step: int | None = None  # None: it varies, the metrics of a step have "tokens"
    flops_per_token: float = 0.0  # 0: no MFU
    defer_metrics: bool = True  # read a step's metrics only once the next step is dispatched
    source: Source | None = None

    @cached_property
    def folder(self) -> Path:
        return run_folder(self.config.run)

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """The optax chain; made once, since compiled programs and shapes are cached by it."""
        return make_optimizer(self.model.config, self.optim_config, self.model.dtype)

    @cached_property
    def peak_flops(self) -> float | None:
        """Of all devices together; None for a device that devices.py does not list."""
        peak = peak_flops(self.mesh.devices.flat[0].device_kind)
        return peak * self.mesh.size if peak else None

    # --- each stage answers these ---

    def plan_record(self) -> dict[str, Any]:
        """The numbers of the run: the first record of metrics.jsonl."""
        raise NotImplementedError

    def announce(self) -> None:
        """Prints what will be trained."""
        raise NotImplementedError

    def try_it(self) -> str:
        """The command to try the finished model with."""
        raise NotImplementedError

    def initial_state(self) -> TrainState:
        raise NotImplementedError

    def loader(self, state: dict[str, Any] | None) -> Loader:
        """The rows of every step, from a saved state on."""
        raise NotImplementedError

    def put(self, rows: Any) -> Any:
        """Rows of the loader as a batch on the mesh."""
        raise NotImplementedError

    def train_step(self) -> TrainStep:
        """The function (state, batch) -> (state, metrics); the state given in is donated."""
        raise NotImplementedError

    def validation_rows(self) -> Iterable[Any]:
        """This process's validation rows, batch by batch; the same at every call."""
        raise NotImplementedError

    # --- shared, to be extended or overridden ---

    def fingerprint(self) -> dict[str, Any]:
        """All that a run's results depend on; equal before and after a resume."""
        source = {"source": self.source_meta} if self.source else {}
        return {
            **model_meta(self.model.config),
            **source,
            "optimizer": asdict(self.optim_config),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "seed": self.config.seed,
            "dtype": np.dtype(self.model.dtype).name,
        }

    @property
    def source_meta(self) -> dict[str, Any]:
        """What a checkpoint says of the run it was trained from."""
        assert self.source is not None
        return {"run": self.source.name, "step": self.source.step}

    def lr_multiplier(self, step: int) -> float:
        return lr_multiplier(self.optim_config, step)

    def put_validation(self, rows: Any, accumulation: int, mesh: Mesh) -> Batch:
        return put_batch(rows, accumulation, mesh)

    def evaluate(self, params: Params, stopped: Callable[[], bool]) -> dict[str, float] | None:
        """Bits per byte of the validation rows; None when stopped before the end."""
        return self._evaluate(params, stopped)

    @cached_property
    def _evaluate(self):
        token_bytes = self.tokenizer.token_bytes()
        return make_evaluate(
            self.model, self.mesh, token_bytes, self.validation_rows, self.put_validation
        )

    def sample(self, params: Params) -> list[tuple[str, str]]:
        """(prompt, completion) pairs."""
        return self._sample(params)

    @cached_property
    def _sample(self):
        config = self.config
        assert isinstance(config, TrainSettings)
        return make_sample(
            self.model,
            self.mesh,
            self.tokenizer,
            self.prompts,
            config.sample_tokens,
            config.seed,
            chat=self.chat,
        )

    def totals(self) -> dict[str, int | float]:
        """More to say at the end of the run: what all steps together have done."""
        return {}

    def say_devices(self, more: str = "") -> None:
        kind = self.mesh.devices.flat[0].device_kind
        say(
            f"{self.mesh.size} × {kind}, {np.dtype(self.model.dtype).name}, attention "
            f"{self.model.attention}{more}"
        )
        say(f"everything is kept in {self.folder}")


# --- what stages decide alike ---------------------------------------------------------------------


def find_source(name: str, step: str, stages: Sequence[str]) -> Source:
    """The checkpoint asked for; without a name, that of the newest run of one of the `stages`."""
    name = name or default_run(stages)
    folder = run_folder(name)
    with open_checkpoints(folder) as checkpoints:
        chosen = choose_step(checkpoints, step)
        with naming_a_whole_one(checkpoints, chosen):
            meta = checkpoints.meta(chosen, "model", "identity")
        return Source(name, folder, chosen, meta)


# --- measuring and sampling -----------------------------------------------------------------------


def validation_rows(
    shards: Shards,
    tokenizer: Tokenizer,
    *,
    rows: int,
    sequence_len: int,
    n_tokens: int,
    long_documents: LongDocuments,
) -> Iterator[np.ndarray]:
    """This process's validation rows, in batches of `rows` over all processes.

    Together `n_tokens`, rounded down to whole rounds of the streams: the same text on any number of
    devices, as long as nothing has to be rounded.
    """
    streams = choose_streams(jax.process_count())
    round_rows = lcm(rows, streams)
    rounds = val_batches(
        shards,
        tokenizer,
        rows=round_rows,
        sequence_len=sequence_len,
        n_batches=max(1, n_tokens // (round_rows * sequence_len)),
        streams=streams,
        long_documents=long_documents,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return (part for whole in rounds for part in np.split(whole, round_rows // rows))


def make_evaluate(
    model: GPT,
    mesh: Mesh,
    token_bytes: np.ndarray,
    rows: Callable[[], Iterable[Any]],
    put: Callable[[Any, int, Mesh], Batch] = put_batch,
) -> Callable[..., dict[str, float] | None]:
    """The function (params, stopped) -> bits per byte over `rows()`; None when stopped.

    `rows` gives this process's rows of each batch, which `put` brings on the mesh; they must always
    be the same, and are read once. `stopped` is asked between batches; in a cluster it must always
    say no.
    """
    eval_step = make_eval_step(model, mesh)
    kept: list[Any] = []  # tokenising them again each time would cost more than the model

    def run(params: Params, stopped: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        if not kept:
            kept.extend(takewhile(lambda _: not stopped(), rows()))
        batches = (put(part, 1, mesh) for part in kept if not stopped())
        result = evaluate(eval_step, params, batches, token_bytes)
        if stopped():
            kept.clear()  # they may be incomplete
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
            engines[0].load_weights(one_device)
        else:
            engines.append(
                completion_engine(model, one_device, tokenizer, prompts, n_tokens, chat=chat)
            )
        engine = engines[0]
        sampling = replace(SAMPLING, seed=seed)
        texts = complete(
            engine, tokenizer, prompts, max_new_tokens=n_tokens, sampling=sampling, chat=chat
        )
        engine.free()  # its memory is the training's
        return list(zip(prompts, texts, strict=True))

    return run
