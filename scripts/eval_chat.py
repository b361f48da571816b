"""Measures a chat model: multiple choice, sums, programs, spelling; ChatCORE.

    python scripts/eval_chat.py --run d12-sft
    python scripts/eval_chat.py --run d12-sft --tasks gsm8k --n-samples 8 --temperature 1
    python scripts/eval_chat.py --run cpu-sft --tasks arithmetic,choice --max-problems 100

Results are printed, and written to runs/NAME/eval_chat.json as soon as a task is finished, beside
those of other tasks with the same checkpoint; the last line is the same as JSON. Without --tasks it
takes the tasks of ChatCORE and SpellingBee whose data is there (scripts/prefetch.py fetches it),
else those that need no data. Answers are sampled as scripts/rl.py samples its held-out ones: with
the same settings, pass@k is the same number.
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
from nanochat_jax.evals.chat import (
    CHAT_CORE,
    ChatResult,
    chat_json,
    chat_table,
    evaluate_categorical,
    evaluate_generative,
)
from nanochat_jax.evals.generation import make_sampler
from nanochat_jax.evals.scoring import Scorer
from nanochat_jax.runs import record_evaluation, run_folder
from nanochat_jax.sandbox.run import isolation
from nanochat_jax.sharding import make_mesh, own_mesh
from nanochat_jax.tasks.registry import JSON, make_task, missing, split_names
from nanochat_jax.tasks.task import Task, check_answered
from nanochat_jax.train import make_own_gather

DEFAULT_TASKS = (*CHAT_CORE, "spellingbee")
WITHOUT_DATA = ("choice", "arithmetic", "counting", "spelling-local", "identity-local")


@dataclass(frozen=True)
class EvalChatConfig:
    """What to measure, and how answers are sampled."""

    run: str = "d20-sft"
    """Name of the run, or its folder."""
    step: str = "last"
    """Which checkpoint: a step, last or best."""
    tasks: str = ""
    """Tasks, separated by commas (those of ChatCORE whose data is there)."""
    split: str = "test"
    """Which part of them."""
    max_problems: int | None = None
    """Questions of each task (all)."""
    n_samples: int = 1
    """Answers to each question; with more than one, also pass@k."""
    temperature: float = 0.0
    """0 takes the most likely token."""
    top_k: int = 50
    """Sample among the k most likely tokens; 0: all."""
    max_new_tokens: int = 512
    """Longest answer, in tokens; of longer questions the context keeps what it has room for."""
    slots: int = 32
    """Answers written side by side."""
    device_batch_size: int = 32
    """Rows of the trained length that a device scores together."""
    n_devices: int | None = None
    """Devices to use (all)."""
    seed: int = 42
    """Seed of the answers."""
    allow_unsandboxed: bool = False
    """Run programs that the model wrote where nothing can isolate them."""


def main() -> None:
    config = parse(EvalChatConfig, "eval_chat", description=__doc__)
    if config.n_samples < 1 or config.max_new_tokens < 1:
        raise ValueError("an answer needs at least one sample of one token")
    if config.n_samples > 1 and config.temperature == 0:
        raise ValueError(
            f"at temperature 0 all {config.n_samples} samples are the same; set --temperature"
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
    for result in evaluate(config, tasks, loaded, mesh):
        results.append(result)
        found = {"run": config.run, "step": loaded.meta["step"], **chat_json(results)}
        if is_main_process():
            record_evaluation(folder / "eval_chat.json", found)
    say(chat_table(found))
    say(json.dumps(found, ensure_ascii=False))


def which_tasks(config: EvalChatConfig) -> list[str]:
    """The names of the tasks; ValueError where one cannot be measured on this machine."""
    if config.tasks:
        names = list(dict.fromkeys(split_names(config.tasks)))
        if "humaneval" in names and not config.allow_unsandboxed:
            isolation()  # says now, and not after an hour, that there is none
        return names
    there = [name for name in DEFAULT_TASKS if not missing([(name, config.split)])]
    absent = [name for name in DEFAULT_TASKS if name not in there]
    if absent:
        say(f"left out, as their data is not there: {', '.join(absent)} (scripts/prefetch.py)")
    if "humaneval" in there and not config.allow_unsandboxed:
        try:
            isolation()
        except ValueError as error:
            say(f"humaneval is left out: {error}")
            there.remove("humaneval")
    if not there:
        say(f"measured instead on tasks that need no data: {', '.join(WITHOUT_DATA)}")
    return there or list(WITHOUT_DATA)


def evaluate(
    config: EvalChatConfig, tasks: list[Task], loaded: LoadedModel, mesh: Mesh
) -> Iterator[ChatResult]:
    """Results, those of categorical tasks first: then the engine has the memory to itself."""
    model, params, tokenizer, _ = loaded
    categorical = [task for task in tasks if task.kind == "categorical"]
    generative = [task for task in tasks if task.kind == "generative"]
    if categorical:
        budget = config.device_batch_size * model.config.sequence_len
        scorer = Scorer(model, mesh, params, tokens_per_device=budget)
        for task in categorical:
            with progress_bar(task.name) as progress:
                result = evaluate_categorical(scorer, tokenizer, task, progress)
            yield result
        del scorer
    if generative:
        sampler = make_sampler(
            model,
            make_own_gather(model, mesh)(params),
            tokenizer,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            n_slots=-(-config.slots // jax.process_count()),
            mesh=own_mesh(mesh),
        )
        for task in generative:
            with progress_bar(task.name) as bar:
                result = evaluate_generative(sampler, task, config.n_samples, config.seed, bar)
            yield result


if __name__ == "__main__":
    run_script(main, "interrupted; eval_chat.json has the tasks that were finished")
