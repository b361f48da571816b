"""Reinforcement learning as a stage: a fine-tuned run becomes one that earns more reward.

scripts/rl.py is the command line of `reinforce`. One step: questions are asked with the present
weights, several answers each; the task's judge rewards them; the policy is updated with the same
sharded step as in pretraining (train.py), but for its loss (rl.py).
"""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from shlex import quote
from time import perf_counter
from typing import Any, cast

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from nanochat_jax.attention import attention_kernel
from nanochat_jax.checkpoint import load_model, model_meta
from nanochat_jax.cli import progress_bar
from nanochat_jax.distributed import is_main_process, say
from nanochat_jax.engine.engine import Engine, make_engine
from nanochat_jax.gpt import GPT, Params, compute_dtype
from nanochat_jax.optim import OptimConfig, lr_multiplier, make_optimizer
from nanochat_jax.runs import cut_metrics, run_folder
from nanochat_jax.sharding import make_mesh, own_mesh
from nanochat_jax.stages import policy
from nanochat_jax.stages.rollouts import (
    Answered,
    Interview,
    Question,
    Questions,
    measure,
    rewards_of,
    summary,
    transcripts,
)
from nanochat_jax.stages.settings import RlConfig
from nanochat_jax.stages.stage import (
    Evaluate,
    Sample,
    Stage,
    find_source,
    loop_config,
    run_stage,
    tokenizer_identity,
    tokenizer_of,
)
from nanochat_jax.tasks.registry import JSON, make_task
from nanochat_jax.tasks.task import Task, check_answered
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train import TrainState, init_state, make_own_gather, make_train_step

TRANSCRIPTS_FILE = "transcripts.jsonl"
MOMENTUM = 0.95  # of Muon, from the first step to the last
ROW_WIDTHS = {"cudnn": (128,), "blocked": (16, 32, 64, 128)}  # what rows are padded to
SHOWN = 2  # held-out questions whose answers are shown

type Lend = Callable[[Params], AbstractContextManager[None]]


@dataclass(frozen=True)
class Job:
    """Everything of a run that does not change while it goes on."""

    config: RlConfig
    folder: Path
    source_meta: dict[str, Any]  # of the checkpoint that training begins with
    model: GPT
    tokenizer: Tokenizer
    optimizer: optax.GradientTransformation
    optim_config: OptimConfig
    mesh: Mesh
    train_task: Task
    test_task: Task
    num_steps: int
    interview: Interview

    def identity(self) -> dict[str, Any]:
        """All that decides the numbers of the run; equal before and after a resume."""
        config = self.config
        drawing = ("questions_per_step", "samples", "max_new_tokens", "temperature", "top_k")
        return {
            **model_meta(self.model.config),
            "source": {"run": config.source, "step": self.source_meta["step"]},
            "optimizer": asdict(self.optim_config),
            "objective": asdict(config.objective()),
            "updates": config.updates,
            "answers": {name: getattr(config, name) for name in drawing},
            "task": {"name": config.task, "questions": len(self.train_task)},
            "tokenizer": tokenizer_identity(self.tokenizer),
            "seed": config.seed,
            "dtype": np.dtype(self.model.dtype).name,
        }


def reinforce(config: RlConfig) -> int:
    """Trains, or goes on training; returns the exit code."""
    return run_stage(_stage(prepare(config)))


# --- deciding -------------------------------------------------------------------------------------


def prepare(config: RlConfig) -> Job:
    """Reads and decides all that the run needs, and writes nothing; ValueErrors say what lacks."""
    train_task, test_task = _tasks(config)
    source = find_source(config.source, config.source_step, ("sft",))
    meta, gpt_config = source.meta, source.gpt_config
    mesh, dtype = make_mesh(config.n_devices), compute_dtype(config.dtype)
    kernel = attention_kernel(config.attention, dtype, gpt_config.sequence_len, gpt_config.head_dim)
    model = GPT(gpt_config, dtype, kernel)
    tokenizer = tokenizer_of(source)
    num_steps = config.num_iterations or max(
        1, config.epochs * len(train_task) // config.questions_per_step
    )
    optim_config = inherit(meta, config, num_steps)
    decided = replace(
        config,
        run=config.run or f"{source.folder.name.removesuffix('-sft')}-rl",
        source=source.name,
        source_step=str(source.step),
        num_iterations=num_steps,
        dtype=cast(Any, np.dtype(dtype).name),
    )
    return Job(
        config=decided,
        folder=run_folder(decided.run),
        source_meta=meta,
        model=model,
        tokenizer=tokenizer,
        optimizer=make_optimizer(gpt_config, optim_config, dtype),
        optim_config=optim_config,
        mesh=mesh,
        train_task=train_task,
        test_task=test_task,
        num_steps=num_steps,
        interview=Interview(
            _engine(config, model, mesh),
            tokenizer,
            config.max_new_tokens,
            config.temperature,
            config.top_k,
        ),
    )


def _engine(config: RlConfig, model: GPT, mesh: Mesh) -> Engine:
    """Each process has its own."""
    slots = -(-config.slots // jax.process_count())
    return make_engine(model, n_slots=slots, mesh=own_mesh(mesh))


def _tasks(config: RlConfig) -> tuple[Task, Task]:
    name = config.eval_task or config.task
    split = "train" if name.startswith(JSON) else "test"  # a file has one split
    tasks = make_task(config.task), make_task(name, split, limit=config.eval_questions)
    for task in tasks:
        if task.name.startswith(JSON):
            check_answered(task)
    return tasks


def inherit(meta: dict[str, Any], config: RlConfig, num_steps: int) -> OptimConfig:
    """The source's learning rates, which are its base model's, with this stage's schedule."""
    return replace(
        OptimConfig(**meta["identity"]["optimizer"]),
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


def _stage(job: Job) -> Stage:
    config, identity, lend = job.config, job.identity(), make_lender(job)
    return Stage(
        name="rl",
        config=config,
        folder=job.folder,
        model=job.model,
        optimizer=job.optimizer,
        mesh=job.mesh,
        tokenizer=job.tokenizer,
        loop=loop_config(
            config,
            job.mesh,
            num_steps=job.num_steps,
            tokens_per_step=None,
            at_once=True,
            lr_multiplier=lambda step: lr_multiplier(job.optim_config, step * config.updates),
        ),
        identity=identity,
        plan={"num_iterations": job.num_steps, **identity["objective"], **identity["answers"]},
        announce=partial(_announce, job),
        fresh_state=partial(_fresh_state, job),
        loader=partial(_questions, job),
        put=lambda questions: questions,
        train_step=partial(make_step, job, lend),
        evaluate=partial(_evaluate, job, lend),
        sample=partial(_sample, job, lend),
        try_it=f"python scripts/chat.py --run {quote(config.run)}",
        meta={"source": identity["source"]},
    )


def _announce(job: Job) -> None:
    config = job.config
    say(
        f"{job.num_steps} steps: {config.questions_per_step} questions of {job.train_task.name} "
        f"({len(job.train_task):,}) × {config.samples} answers of at most {config.max_new_tokens} "
        f"tokens, from {config.source}, step {config.source_step}"
    )
    if (config.eval_task or config.task) == config.task and config.task.startswith(JSON):
        say("measured on the same questions, as a file has no test part; --eval-task names others")
    say(f"{job.mesh.size} × {job.mesh.devices.flat[0].device_kind}, {config.objective()}")
    say(f"everything is kept in {job.folder}")


def _fresh_state(job: Job) -> TrainState:
    """The source's weights and an optimizer that knows nothing yet."""
    fresh = init_state(job.model, job.optimizer, job.mesh, jax.random.key(0))
    return replace(fresh, params=_source_params(job))


def _source_params(job: Job) -> Params:
    step = job.source_meta["step"]
    return load_model(run_folder(job.config.source), step, mesh=job.mesh).params


def _questions(job: Job, state: dict[str, Any] | None) -> Questions:
    """From the saved place on; what was told of questions beyond it is cut off."""
    config = job.config
    position = state["position"] if state else 0
    step = position // config.questions_per_step
    if is_main_process():
        cut_metrics(job.folder, lambda record: record["step"] < step, TRANSCRIPTS_FILE)
    return Questions(len(job.train_task), config.questions_per_step, config.seed, position)


# --- the step -------------------------------------------------------------------------------------


def make_step(
    job: Job, lend: Lend
) -> Callable[[TrainState, list[Question]], tuple[TrainState, dict[str, Any]]]:
    """The function (state, questions) -> (state, metrics): answers, rewards, updates.

    The state given in is donated.
    """
    config, objective = job.config, job.config.objective()
    interview, task = job.interview, job.train_task
    update = make_updates(job)

    def step(state: TrainState, questions: list[Question]) -> tuple[TrainState, dict[str, Any]]:
        began = perf_counter()
        number = int(state.step)
        with lend(state.params):
            answered = interview.ask(task, questions, config.samples, task.reward)
        told = {**summary(answered), "rollout_seconds": perf_counter() - began}
        if is_main_process():
            _write_transcripts(job, number, answered)
        rollouts = [rollout for a in answered for rollout in a.rollouts]
        rows = policy.make_rows(rollouts, job.tokenizer.bos_id, ROW_WIDTHS[job.model.attention])
        at_once = config.device_batch_size * job.mesh.size
        batch = policy.make_batch(rows, rewards_of(answered), objective, at_once)
        state, metrics = update(state, batch)
        return state, {**metrics, **told}

    return step


def make_lender(job: Job) -> Lend:
    """The function that lets the engine have a state's weights; its memory is the training's."""
    gather, engine = make_own_gather(job.model, job.mesh), job.interview.engine

    @contextmanager
    def lend(params: Params) -> Iterator[None]:
        engine.load_weights(gather(params))
        try:
            yield
        finally:
            engine.free()

    return lend


def make_updates(
    job: Job,
) -> Callable[[TrainState, policy.RolloutBatch], tuple[TrainState, dict[str, Any]]]:
    """The function that makes all updates of a step, which together count as one.

    Told is the loss of the first, and how far the policy was from the sampler before the first
    ("mismatch") and before the last ("drift").
    """
    config, model, objective = job.config, job.model, job.config.objective()
    loss = partial(policy.policy_loss, objective)
    update = make_train_step(model, job.optimizer, job.mesh, config.grad_clip, loss)
    logprobs = policy.make_logprobs(model, job.mesh)
    reference_params = _source_params(job) if objective.kl > 0 else None

    def run(state: TrainState, batch: policy.RolloutBatch) -> tuple[TrainState, dict[str, Any]]:
        after = jax.device_put(np.int32(int(state.step) + 1), state.step.sharding)
        placed = policy.put_rollouts(batch, job.mesh)
        if reference_params is not None:
            reference = logprobs(reference_params, placed)
            batch = batch._replace(reference_logprobs_ABT=reference)
            placed = placed._replace(
                reference_logprobs_ABT=policy.put_rollouts(reference, job.mesh)
            )
        told = policy.compare(logprobs(state.params, placed), batch)
        first = None
        for index in range(config.updates):
            if 0 < index == config.updates - 1:
                told["drift"] = policy.compare(logprobs(state.params, placed), batch)["mismatch"]
            state, metrics = update(state, placed)
            first = first or metrics
        return replace(state, step=after), {**(first or {}), **told}

    return run


def _write_transcripts(job: Job, step: int, answered: list[Answered]) -> None:
    records = transcripts(answered, job.tokenizer, job.config.transcripts)
    with (job.folder / TRANSCRIPTS_FILE).open("a", encoding="utf-8") as file:
        for record in records:
            line = {"kind": "transcript", "step": step, **record}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


# --- looking at it --------------------------------------------------------------------------------


def _evaluate(job: Job, lend: Lend, stopped: Callable[[], bool]) -> Evaluate:
    config = job.config
    at_once, n = config.questions_per_step, config.eval_samples

    def evaluate(params: Params) -> dict[str, float] | None:
        with lend(params), progress_bar("pass@k") as bar:
            return measure(job.interview, job.test_task, config.seed, n, at_once, stopped, bar)

    return evaluate


def _sample(job: Job, lend: Lend) -> Sample:
    """The likeliest answers to the first held-out questions."""
    interview = replace(job.interview, temperature=0.0)
    task = job.test_task
    questions = [Question(i, 0) for i in range(min(SHOWN, len(task)))]

    def sample(params: Params) -> list[tuple[str, str]]:
        with lend(params):
            answered = interview.ask(task, questions, 1, task.reward)
        decode = interview.tokenizer.decode
        return [(decode(r.prompt), decode(r.tokens)) for a in answered for r in a.rollouts]

    return sample
