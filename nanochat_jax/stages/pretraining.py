"""Pretraining: a configuration becomes a run, from the dial to the last checkpoint.

scripts/pretrain.py is the command line of `pretrain`. `decide` makes the plan of a run
for whatever wants to look at one without training.
"""

import sys
from dataclasses import asdict, dataclass, fields, replace
from shlex import quote
from typing import Any, cast

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from nanochat_jax import scaling
from nanochat_jax.data.loader import RowLoader, choose_streams
from nanochat_jax.data.shards import Shards, list_shards
from nanochat_jax.data.text import train_loader
from nanochat_jax.gpt import make_model
from nanochat_jax.optim import OptimConfig
from nanochat_jax.runs import digest, read_meta, run_folder
from nanochat_jax.sharding import make_mesh
from nanochat_jax.stages.loop import run
from nanochat_jax.stages.settings import PretrainConfig
from nanochat_jax.stages.stage import Stage, TrainStep, validation_rows
from nanochat_jax.tokenizer import Tokenizer, tokenizer_folder
from nanochat_jax.train import Batch, TrainState, init_state, make_train_step, put_batch

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


def pretrain(config: PretrainConfig) -> int:
    """Trains, or resumes; returns the exit code."""
    return run(make_stage(config))


# --- the stage ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class PretrainStage(Stage):
    config: PretrainConfig
    plan: scaling.Plan
    shards: Shards
    rows: int  # of a step, over all devices and micro-batches
    streams: int

    def fingerprint(self) -> dict[str, Any]:
        files = [*self.shards.train, *self.shards.val]
        return {
            **super().fingerprint(),
            "batch": {"tokens": self.plan.total_batch_size, "streams": self.streams},
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

    def try_it(self) -> str:
        return f"python scripts/generate.py --run {quote(self.config.run)}"

    def initial_state(self) -> TrainState:
        key = jax.random.key(self.config.seed)
        return init_state(self.model, self.optimizer, self.mesh, key)

    def loader(self, state: dict[str, Any] | None) -> RowLoader:
        return train_loader(
            self.shards,
            self.tokenizer,
            rows=self.rows,
            sequence_len=self.plan.config.sequence_len,
            streams=self.streams,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            state=state,
        )

    def put(self, rows: np.ndarray) -> Batch:
        return put_batch(rows, self.plan.grad_accum_steps, self.mesh)

    def train_step(self) -> TrainStep:
        grad_clip = self.optim_config.grad_clip
        return make_train_step(self.model, self.optimizer, self.mesh, grad_clip=grad_clip)

    def validation_rows(self):
        return validation_rows(
            self.shards,
            self.tokenizer,
            rows=self.config.device_batch_size * self.mesh.size,
            sequence_len=self.plan.config.sequence_len,
            n_tokens=self.config.eval_tokens,
        )
