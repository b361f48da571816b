"""Measures a chat model: multiple choice, sums, programs, spelling; ChatCORE.

    python scripts/eval_chat.py --run d12-sft
    python scripts/eval_chat.py --run d12-sft --tasks gsm8k --n-samples 8 --temperature 1
    python scripts/eval_chat.py --run cpu-sft --tasks arithmetic,choice --max-problems 100

What it finds is printed, written to runs/NAME/eval_chat.json as soon as a task is finished, beside
what was found of other tasks with the same checkpoint, and is its last line as JSON. Without
--tasks it takes the tasks of ChatCORE and SpellingBee whose data is there (scripts/prefetch.py
fetches it), else those that the program makes itself.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from nanochat_jax.checkpoint import LoadedModel, load_model
from nanochat_jax.cli import progress_bar, run_script
from nanochat_jax.config import parse
from nanochat_jax.distributed import is_main_process, say, start
from nanochat_jax.engine.engine import make_engine
from nanochat_jax.engine.scheduler import Scheduler
from nanochat_jax.evals.chat import (
    CHAT_CORE,
    ChatResult,
    chat_json,
    chat_table,
    evaluate_categorical,
    evaluate_generative,
)
from nanochat_jax.evals.generation import Drawing, capacity_for
from nanochat_jax.evals.scoring import Scorer
from nanochat_jax.runs import record_evaluation, run_folder
from nanochat_jax.sandbox.run import isolation
from nanochat_jax.sharding import make_mesh, own_mesh
from nanochat_jax.tasks.registry import JSON, make_task, missing
from nanochat_jax.tasks.task import Task, check_answered
from nanochat_jax.train import make_own_gather

USUAL = (*CHAT_CORE, "spellingbee")
MADE_HERE = ("choice", "arithmetic", "counting", "spelling-local", "identity-local")


@dataclass(frozen=True)
class EvalChatConfig:
    """What to measure, and how answers are drawn."""

    run: str = "d20-sft"
    """Name of the run, or its folder."""
    step: str = "last"
    """Which checkpoint: a step, last or best."""
    tasks: str = ""
    """Tasks, with commas between (those of ChatCORE whose data is there)."""
    split: str = "test"
    """Which part of them."""
    max_problems: int | None = None
    """Questions of each task (all)."""
    n_samples: int = 1
    """Answers to each question; more than one also give pass@k."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_k: int = 50
    """Tokens to choose among; 0: all."""
    max_new_tokens: int = 512
    """Tokens of an answer at most."""
    slots: int = 32
    """Answers that are written at once."""
    device_batch_size: int = 32
    """Rows of the trained length that a device scores at once."""
    n_devices: int | None = None
    """Devices to use (all)."""
    seed: int = 42
    """Seed of the answers."""
    allow_unsandboxed: bool = False
    """Run programs that the model wrote where nothing can isolate them."""


def main() -> None:
    config = parse(EvalChatConfig, "eval_chat", description=__doc__)
    drawing = Drawing(
        config.n_samples, config.max_new_tokens, config.temperature, config.top_k, config.seed
    )
    tasks = [
        make_task(
            name,
            "train" if name.startswith(JSON) else config.split,  # a file has one split
            limit=config.max_problems,
            allow_unsandboxed=config.allow_unsandboxed,
        )
        for name in which_tasks(config)
    ]
    for task in tasks:
        if task.name.startswith(JSON):
            check_answered(task)
    start()
    folder = run_folder(config.run)
    mesh = make_mesh(config.n_devices)
    loaded = load_model(folder, config.step, mesh=mesh)
    say(f"{folder}, step {loaded.meta['step']}")
    results = []
    for result in evaluate(config, drawing, tasks, loaded, mesh):
        results.append(result)
        found = {"run": config.run, "step": loaded.meta["step"], **chat_json(results)}
        if is_main_process():
            record_evaluation(folder / "eval_chat.json", found)
    say(chat_table(found))
    say(json.dumps(found, ensure_ascii=False))


def which_tasks(config: EvalChatConfig) -> list[str]:
    """The names of the tasks; ValueError where one cannot be measured on this machine."""
    if config.tasks:
        names = list(dict.fromkeys(name.strip() for name in config.tasks.split(",")))
        if "humaneval" in names and not config.allow_unsandboxed:
            isolation()  # says now, and not after an hour, that there is none
        return names
    there = [name for name in USUAL if not missing([(name, config.split)])]
    absent = [name for name in USUAL if name not in there]
    if absent:
        say(f"left out, as their data is not there: {', '.join(absent)} (scripts/prefetch.py)")
    if "humaneval" in there and not _can_run_programs(config):
        there.remove("humaneval")
    if not there:
        say(f"measured instead on what the program makes itself: {', '.join(MADE_HERE)}")
    return there or list(MADE_HERE)


def _can_run_programs(config: EvalChatConfig) -> bool:
    try:
        return config.allow_unsandboxed or bool(isolation())
    except ValueError as error:
        say(f"humaneval is left out: {error}")
        return False


def evaluate(
    config: EvalChatConfig, drawing: Drawing, tasks: list[Task], loaded: LoadedModel, mesh: Mesh
) -> Iterator[ChatResult]:
    """Results, those of categorical tasks first: the engine then has the memory for itself."""
    categorical = [task for task in tasks if task.kind == "categorical"]
    generative = [task for task in tasks if task.kind == "generative"]
    if categorical:
        scorer = make_scorer(config, loaded, mesh)
        for task in categorical:
            with progress_bar(task.name) as progress:
                result = evaluate_categorical(scorer, loaded.tokenizer, task, progress)
            yield result
        del scorer
    if generative:
        scheduler = make_scheduler(config, drawing, generative, loaded, mesh)
        for task in generative:
            with progress_bar(task.name) as progress:
                result = evaluate_generative(scheduler, loaded.tokenizer, task, drawing, progress)
            yield result


def make_scorer(config: EvalChatConfig, loaded: LoadedModel, mesh: Mesh) -> Scorer:
    budget = config.device_batch_size * loaded.model.config.sequence_len
    return Scorer(loaded.model, mesh, loaded.params, tokens_per_device=budget)


def make_scheduler(
    config: EvalChatConfig, drawing: Drawing, tasks: list[Task], loaded: LoadedModel, mesh: Mesh
) -> Scheduler:
    engine = make_engine(
        loaded.model,
        make_own_gather(loaded.model, mesh)(loaded.params),
        capacity=capacity_for(loaded.tokenizer, tasks, drawing),
        n_slots=-(-config.slots // jax.process_count()),
        mesh=own_mesh(mesh),
    )
    return Scheduler(engine, loaded.tokenizer)


if __name__ == "__main__":
    run_script(main, "interrupted; eval_chat.json has the tasks that were finished")
