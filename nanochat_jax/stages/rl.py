"""Reinforcement learning as a stage: a fine-tuned run becomes one that earns more reward.

scripts/rl.py is the command line of `reinforce`. One step: the present weights answer questions,
several times each (rollouts.py); the task's judge rewards the answers; the policy is updated with
the same sharded step as in pretraining (train.py), but for its loss (policy.py).
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from shlex import quote
from time import perf_counter
from typing import Any, cast

import jax
import numpy as np

from nanochat_jax.checkpoint import load_model, load_tokenizer
from nanochat_jax.cli import progress_bar
from nanochat_jax.distributed import is_main_process, say
from nanochat_jax.engine.engine import make_engine
from nanochat_jax.evals.generation import (
    RolloutGroup,
    RolloutPrompt,
    RolloutSampler,
    rewards_of,
)
from nanochat_jax.gpt import Params, make_model
from nanochat_jax.optim import OptimConfig, lr_multiplier
from nanochat_jax.runs import cut_metrics
from nanochat_jax.sharding import make_mesh, own_mesh
from nanochat_jax.stages import policy
from nanochat_jax.stages.loop import run
from nanochat_jax.stages.rollouts import PromptLoader, measure, summary, transcripts
from nanochat_jax.stages.settings import Objective, RlConfig
from nanochat_jax.stages.stage import Source, Stage, TrainStep, find_source
from nanochat_jax.tasks.registry import JSON, make_task
from nanochat_jax.tasks.task import Task, check_answered
from nanochat_jax.train import TrainState, init_state, make_own_gather, make_train_step

TRANSCRIPTS_FILE = "transcripts.jsonl"
MOMENTUM = 0.95  # of Muon, from the first step to the last
ROW_WIDTHS = {"cudnn": (128,), "blocked": (16, 32, 64, 128)}  # what rows are padded to
N_SHOWN = 2  # held-out questions whose answers are shown
SAMPLING_SETTINGS = ("questions_per_step", "samples", "max_new_tokens", "temperature", "top_k")

# --- deciding -------------------------------------------------------------------------------------


def make_stage(config: RlConfig) -> "RLStage":
    """Reads and decides all that the run needs; ValueErrors say what is missing."""
    train_task, test_task = make_tasks(config)
    source = find_source(config.source, config.source_step, ("sft",))
    mesh = make_mesh(config.n_devices)
    model = make_model(source.gpt_config, config.dtype, config.attention)
    tokenizer = load_tokenizer(source.folder, source.meta)
    num_steps = config.num_iterations or max(
        1, config.epochs * len(train_task) // config.questions_per_step
    )
    optim_config = rl_optimizer(source, config, num_steps)
    slots = -(-config.slots // jax.process_count())  # each process has an engine of its own
    return RLStage(
        name="rl",
        config=replace(
            config,
            run=config.run or f"{source.folder.name.removesuffix('-sft')}-rl",
            source=source.name,
            source_step=str(source.step),
            num_iterations=num_steps,
            dtype=cast(Any, np.dtype(model.dtype).name),
        ),
        model=model,
        tokenizer=tokenizer,
        mesh=mesh,
        optim_config=optim_config,
        num_steps=num_steps,
        defer_metrics=False,
        source=source,
        train_task=train_task,
        test_task=test_task,
        sampler=RolloutSampler(
            make_engine(model, n_slots=slots, mesh=own_mesh(mesh)),
            tokenizer,
            config.max_new_tokens,
            config.temperature,
            config.top_k,
        ),
    )


def make_tasks(config: RlConfig) -> tuple[Task, Task]:
    """The questions to learn from, and the held-out ones."""
    name = config.eval_task or config.task
    split = "train" if name.startswith(JSON) else "test"  # a file has one split
    tasks = make_task(config.task), make_task(name, split, limit=config.eval_questions)
    for task in tasks:
        if task.name.startswith(JSON):
            check_answered(task)
    for note in dict.fromkeys([*tasks[0].notes, *tasks[1].notes]):
        say(note)
    return tasks


def rl_optimizer(source: Source, config: RlConfig, num_steps: int) -> OptimConfig:
    """The source's learning rates, which are its base model's, with this stage's schedule."""
    return replace(
        source.optim_config,
        num_iterations=num_steps * config.updates,
        lr_frac=config.lr_frac,
        warmup_steps=0,
        warmdown_ratio=1.0,
        final_lr_frac=0.0,
        weight_decay=0.0,
        grad_clip=config.grad_clip,
        momentum_start=MOMENTUM,
        momentum_peak=MOMENTUM,
        momentum_final=MOMENTUM,
        momentum_warmup_steps=0,
    )


def reinforce(config: RlConfig) -> int:
    """Trains, or resumes; returns the exit code."""
    return run(make_stage(config))


# --- the stage ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class RLStage(Stage):
    config: RlConfig
    source: Source
    train_task: Task
    test_task: Task
    sampler: RolloutSampler

    def fingerprint(self) -> dict[str, Any]:
        return {
            **super().fingerprint(),
            "objective": self._objective(),
            "updates": self.config.updates,
            "answers": self._settings(SAMPLING_SETTINGS),
            "task": {"name": self.config.task, "questions": len(self.train_task)},
        }

    def plan_record(self) -> dict[str, Any]:
        sampling = self._settings(SAMPLING_SETTINGS)
        return {"num_iterations": self.num_steps, **self._objective(), **sampling}

    def _objective(self) -> dict[str, Any]:
        return self._settings(field.name for field in fields(Objective))

    def _settings(self, names) -> dict[str, Any]:
        return {name: getattr(self.config, name) for name in names}

    def announce(self) -> None:
        config = self.config
        say(
            f"{self.num_steps} steps: {config.questions_per_step} questions of "
            f"{self.train_task.name} ({len(self.train_task):,}) × {config.samples} answers of at "
            f"most {config.max_new_tokens} tokens, from {config.source}, step {config.source_step}"
        )
        if (config.eval_task or config.task) == config.task and config.task.startswith(JSON):
            say("measured on the same questions, as a file has no test part; see --eval-task")
        objective = self._objective().items()
        say(", ".join(f"{name} {value}" for name, value in objective if value is not None))
        self.say_devices()

    def try_it(self) -> str:
        return f"python scripts/chat.py --run {quote(self.config.run)}"

    def lr_multiplier(self, step: int) -> float:
        return lr_multiplier(self.optim_config, step * self.config.updates)

    def initial_state(self) -> TrainState:
        """The source's weights, and an optimizer without moments."""
        fresh = init_state(self.model, self.optimizer, self.mesh, jax.random.key(0))
        return replace(fresh, params=self._source_params())

    def _source_params(self) -> Params:
        return load_model(self.source.folder, self.source.step, mesh=self.mesh).params

    def loader(self, state: dict[str, Any] | None) -> PromptLoader:
        """From the saved place on; transcripts of what comes after it are cut off."""
        config = self.config
        position = state["position"] if state else 0
        step = position // config.questions_per_step
        if is_main_process():
            cut_metrics(self.folder, lambda record: record["step"] < step, TRANSCRIPTS_FILE)
        return PromptLoader(len(self.train_task), config.questions_per_step, config.seed, position)

    def put(self, questions: list[RolloutPrompt]) -> list[RolloutPrompt]:
        return questions

    # --- the step ---

    def train_step(self) -> TrainStep:
        """The function (state, questions) -> (state, metrics): answers, rewards, updates."""
        config, widths = self.config, ROW_WIDTHS[self.model.attention]
        update = self._make_updates()

        def step(state: TrainState, questions: list[RolloutPrompt]) -> tuple[TrainState, dict]:
            began, number = perf_counter(), int(state.step)
            with self.synced_weights(state.params):
                answered = self.sampler.sample(self.train_task, questions, config.samples)
            summed = {**summary(answered), "rollout_seconds": perf_counter() - began}
            if is_main_process():
                self._write_transcripts(number, answered)
            rollouts = [rollout for a in answered for rollout in a.rollouts]
            rows = policy.make_rows(rollouts, self.tokenizer.bos_id, widths)
            micro_batch = config.device_batch_size * self.mesh.size
            batch = policy.make_batch(rows, rewards_of(answered), config, micro_batch)
            state, metrics = update(state, batch)
            return state, {**metrics, **summed}

        return step

    @contextmanager
    def synced_weights(self, params: Params) -> Iterator[None]:
        """The engine has the trainer's weights inside; outside its memory is the training's."""
        self.sampler.engine.load_weights(self._gather(params))
        try:
            yield
        finally:
            self.sampler.engine.free()

    @cached_property
    def _gather(self):
        return make_own_gather(self.model, self.mesh)

    def _make_updates(
        self,
    ) -> Callable[[TrainState, policy.RolloutBatch], tuple[TrainState, dict[str, Any]]]:
        """The function that makes all updates of a step, which together count as one.

        Its metrics are those of the first update, and how far the policy was from the sampler
        before the first ("mismatch") and before the last ("drift").
        """
        config, mesh = self.config, self.mesh
        loss = partial(policy.policy_loss, config)
        update = make_train_step(self.model, self.optimizer, mesh, config.grad_clip, loss)
        logprobs = policy.make_logprobs(self.model, mesh)
        reference_params = self._source_params() if config.kl > 0 else None

        def updates(state: TrainState, batch: policy.RolloutBatch) -> tuple[TrainState, dict]:
            after = jax.device_put(np.int32(int(state.step) + 1), state.step.sharding)
            placed = policy.put_rollouts(batch, mesh)
            if reference_params is not None:
                reference = logprobs(reference_params, placed)
                batch = batch._replace(reference_logprobs_ABT=reference)
                placed = placed._replace(
                    reference_logprobs_ABT=policy.put_rollouts(reference, mesh)
                )
            compared = policy.compare(logprobs(state.params, placed), batch)
            first = None
            for index in range(config.updates):
                if 0 < index == config.updates - 1:
                    last = policy.compare(logprobs(state.params, placed), batch)
                    compared["drift"] = last["mismatch"]
                state, metrics = update(state, placed)
                first = first or metrics
            return replace(state, step=after), {**(first or {}), **compared}

        return updates

    def _write_transcripts(self, step: int, answered: list[RolloutGroup]) -> None:
        records = transcripts(answered, self.tokenizer, self.config.transcripts)
        with (self.folder / TRANSCRIPTS_FILE).open("a", encoding="utf-8") as file:
            for record in records:
                line = {"kind": "transcript", "step": step, **record}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    # --- looking at it ---

    def evaluate(self, params: Params, stopped: Callable[[], bool]) -> dict[str, float] | None:
        """pass@k of the held-out questions; None when stopped before the end."""
        config, task = self.config, self.test_task
        n, per_round = config.eval_samples, config.questions_per_step
        with self.synced_weights(params), progress_bar("pass@k") as bar:
            return measure(self.sampler, task, config.seed, n, per_round, stopped, bar)

    def sample(self, params: Params) -> list[tuple[str, str]]:
        """The most likely answers to the first held-out questions."""
        sampler, task = replace(self.sampler, temperature=0.0), self.test_task
        questions = [RolloutPrompt(i, 0) for i in range(min(N_SHOWN, len(task)))]
        with self.synced_weights(params):
            answered = sampler.sample(task, questions, 1)
        decode = self.tokenizer.decode
        return [(decode(r.prompt), decode(r.tokens)) for a in answered for r in a.rollouts]
