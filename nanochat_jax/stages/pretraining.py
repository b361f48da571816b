"""Pretraining: a configuration becomes a run, from the dial to the last checkpoint.

scripts/pretrain.py is the command line of `pretrain`. `decide` makes the plan of a run
for whatever wants to look at one without training.
"""

import sys
from dataclasses import asdict, dataclass, fields, replace
from shlex import quote
from typing import Any, NamedTuple, Self, cast

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from nanochat_jax import scaling
from nanochat_jax.data.loader import choose_streams
from nanochat_jax.data.packing import LongDocuments
from nanochat_jax.data.shards import (
    HUB_DATASETS,
    Shards,
    dataset_folder,
    list_shards,
    survey_shards,
)
from nanochat_jax.data.text import TextLoader, cropped_share, train_loader
from nanochat_jax.distributed import say
from nanochat_jax.gpt import make_model
from nanochat_jax.optim import OptimConfig
from nanochat_jax.runs import check_fingerprint, digest, read_meta, read_metrics, run_folder
from nanochat_jax.sharding import make_mesh
from nanochat_jax.stages.loop import run
from nanochat_jax.stages.settings import PretrainConfig
from nanochat_jax.stages.stage import Stage, TrainStep, validation_rows
from nanochat_jax.tokenizer import Tokenizer, tokenizer_folder
from nanochat_jax.train import (
    Batch,
    Metrics,
    TrainState,
    init_state,
    make_train_step,
    put_arrays,
)

MUCH_CROPPED = 0.1  # worth a word about how not to

# --- deciding -------------------------------------------------------------------------------------


def decide(config: PretrainConfig, vocab_size: int, n_devices: int) -> scaling.Plan:
    """The plan of a configuration on so many devices; ValueError where it cannot be trained."""
    own = {field.name for field in fields(scaling.Recipe)} & {
        f.name for f in fields(PretrainConfig)
    }
    overrides = {name: getattr(config, name) for name in own}
    if (config.total_batch_size or 0) <= 0:
        overrides["total_batch_size"] = None
    return scaling.plan(
        config.depth,
        config.recipe,
        n_embd=config.n_embd,
        n_head=config.n_head,
        n_kv_head=config.n_kv_head,
        num_iterations=config.num_iterations,
        target_flops=config.target_flops,
        device_batch_size=config.device_batch_size,
        n_devices=n_devices,
        vocab_size=vocab_size,
        sequence_len=config.max_seq_len,
        **overrides,
    )


def make_stage(config: PretrainConfig) -> "PretrainStage":
    """Reads and decides all that the run needs; ValueErrors say what is missing."""
    tokenizer = Tokenizer.load(tokenizer_folder(config.tokenizer))
    shards = list_shards(config.dataset)
    mesh = make_mesh(config.n_devices)
    config = replace(config, run=config.run or f"d{config.depth}")
    plan = decide(config, tokenizer.vocab_size, mesh.size)
    if config.resume and (begun := read_meta(run_folder(config.run)).get("plan")):
        # The dial may have learned since the run began: it goes on with the rates it began with.
        plan = replace(plan, batch_lr_scale=begun["batch_lr_scale"])
    model = make_model(plan.config, config.dtype, config.attention)
    rows = plan.total_batch_size // plan.config.sequence_len
    streams = choose_streams(jax.process_count(), rows, config.data_streams)
    return PretrainStage(
        name="pretrain",
        config=replace(
            config,
            dtype=cast(Any, np.dtype(model.dtype).name),
            data_streams=streams,
            long_documents=choose_long_documents(config),
        ),
        model=model,
        tokenizer=tokenizer,
        mesh=mesh,
        optim_config=OptimConfig.from_plan(plan),
        num_steps=plan.num_iterations,
        tokens_per_step=plan.total_batch_size,
        flops_per_token=plan.flops_per_token,
        plan=plan,
        shards=shards,
        rows=rows,
        streams=streams,
    )


def choose_long_documents(config: PretrainConfig) -> LongDocuments:
    """What the run does, or the run that is resumed did, with documents longer than a row.

    ValueError where another thing is asked for than the run was begun with.
    """
    begun = read_meta(run_folder(config.run)) if config.resume else {}
    if not begun:
        return config.long_documents or usual_long_documents(config.dataset)
    then = long_documents_of(begun, config.dataset)
    now = config.long_documents or then
    check_fingerprint(run_folder(config.run), {"long_documents": then}, {"long_documents": now})
    return then


def usual_long_documents(dataset: str) -> LongDocuments:
    """The published data sets are cropped, as the original does; all other text continues."""
    published = [dataset_folder(name).resolve() for name in HUB_DATASETS]
    return "crop" if dataset_folder(dataset).resolve() in published else "continue"


def long_documents_of(meta: dict[str, Any], dataset: str) -> LongDocuments:
    """The setting that the run of a checkpoint was trained with.

    Runs from before it was one cropped; for those of other stages the data set says what is usual.
    """
    settings = meta.get("config", {})
    usual = "crop" if "dataset" in settings else usual_long_documents(dataset)
    return settings.get("long_documents") or usual


def pretrain(config: PretrainConfig) -> int:
    """Trains, or resumes; returns the exit code."""
    return run(make_stage(config))


# --- the stage ------------------------------------------------------------------------------------


class TextRows(NamedTuple):
    """This process's rows of a step, and tokens cropped so far for each token packed."""

    rows_RT: np.ndarray  # T+1 tokens
    cropped_ratio: float


class TextBatch(NamedTuple):
    """A batch, and the share cropped of all tokens read so far, over all processes."""

    batch: Batch
    cropped_share: Any


class CountingLoader:
    """A text loader whose rows come with how much has been cropped."""

    def __init__(self, loader: TextLoader):
        self._loader = loader
        self.get_state = loader.get_state

    def __next__(self) -> TextRows:
        rows_RT = next(self._loader)
        cropped, packed = self._loader.cropped_and_packed
        return TextRows(rows_RT, cropped / packed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._loader.close()


@jax.jit
def mean_cropped_share(ratio_AB: jax.Array) -> jax.Array:
    """Of the ratio of each row's process: all of them have packed equally much."""
    ratio = jnp.mean(ratio_AB)
    return ratio / (1 + ratio)


@dataclass(frozen=True, kw_only=True, eq=False)
class PretrainStage(Stage):
    config: PretrainConfig
    plan: scaling.Plan
    shards: Shards
    rows: int  # of a step, over all devices and micro-batches
    streams: int

    @property
    def long_documents(self) -> LongDocuments:
        assert self.config.long_documents is not None  # make_stage has decided
        return self.config.long_documents

    def fingerprint(self) -> dict[str, Any]:
        files = [*self.shards.train, *self.shards.val]
        # Runs from before this could be chosen cropped, and have no such entry.
        is_new = self.long_documents == "continue"
        continues = {"long_documents": "continue"} if is_new else {}
        return {
            **super().fingerprint(),
            "batch": {"tokens": self.plan.total_batch_size, "streams": self.streams, **continues},
            "data": {
                "training shards": len(self.shards.train),
                "validation shard": self.shards.val[0].name,
                "names and sizes": digest([[path.name, path.stat().st_size] for path in files]),
            },
        }

    def plan_record(self) -> dict[str, Any]:
        numbers = {f.name: getattr(self.plan, f.name) for f in fields(self.plan)}
        numbers["horizon"] = numbers.pop("length_rule")
        return {
            **{n: value for n, value in numbers.items() if isinstance(value, int | float | str)},
            "total_tokens": self.plan.total_tokens,
            "total_flops": self.plan.total_flops,
            "params": {**asdict(self.plan.params), "total": self.plan.params.total},
        }

    def announce(self) -> None:
        """The dial: every derived number with its formula."""
        table = Table(box=None, show_header=False, pad_edge=False)
        for column in scaling.explain(self.plan):
            table.add_row(*column)
        Console(width=None if sys.stdout.isatty() else 120).print(table)
        self.say_devices(f", {len(self.shards.train)} training shards, {self.streams} streams")
        say(
            "\n".join(
                [f"text of {self.config.dataset}:", *survey_shards(self.config.dataset).lines()]
            )
        )
        self.say_cropped()

    def say_cropped(self) -> None:
        if self.long_documents == "continue":
            say("cropped: 0.0 % of the tokens; long documents continue in rows of their own")
            return
        row = self.plan.config.sequence_len
        share = cropped_share(self.shards, self.tokenizer, row)
        say(f"cropped: {100 * share:.1f} % of the tokens of the first documents, to fill rows")
        if share > MUCH_CROPPED and usual_long_documents(self.config.dataset) != "crop":
            say(
                f"  the model never sees what follows a document's first {row} tokens or less: a "
                "run with --long-documents continue has all of the text"
            )

    def try_it(self) -> str:
        return f"python scripts/generate.py --run {quote(self.config.run)}"

    def initial_state(self) -> TrainState:
        key = jax.random.key(self.config.seed)
        return init_state(self.model, self.optimizer, self.mesh, key)

    def loader(self, state: dict[str, Any] | None) -> CountingLoader:
        loader = train_loader(
            self.shards,
            self.tokenizer,
            rows=self.rows,
            sequence_len=self.plan.config.sequence_len,
            streams=self.streams,
            long_documents=self.long_documents,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            state=state,
        )
        return CountingLoader(loader)

    def put(self, rows: TextRows) -> TextBatch:
        ratio_R = np.full(len(rows.rows_RT), rows.cropped_ratio, np.float32)
        arrays = (rows.rows_RT[:, :-1], rows.rows_RT[:, 1:], ratio_R)
        inputs, targets, ratio_AB = put_arrays(arrays, self.plan.grad_accum_steps, self.mesh)
        return TextBatch(Batch(inputs, targets), mean_cropped_share(ratio_AB))

    def train_step(self) -> TrainStep:
        grad_clip = self.optim_config.grad_clip
        step = make_train_step(self.model, self.optimizer, self.mesh, grad_clip=grad_clip)

        def counted_step(state: TrainState, counted: TextBatch) -> tuple[TrainState, Metrics]:
            state, metrics = step(state, counted.batch)
            return state, {**metrics, "cropped_share": counted.cropped_share}

        return counted_step

    def totals(self) -> dict[str, int | float]:
        shares = [r.get("cropped_share") for r in read_metrics(self.folder) if r["kind"] == "train"]
        return {"cropped_share": round(shares[-1], 4)} if shares and shares[-1] is not None else {}

    def validation_rows(self):
        return validation_rows(
            self.shards,
            self.tokenizer,
            rows=self.config.device_batch_size * self.mesh.size,
            sequence_len=self.plan.config.sequence_len,
            n_tokens=self.config.eval_tokens,
            long_documents=self.long_documents,
        )
