"""The runs of a sweep: which they are, what they cost, which are done; trains them one by one.

A sweep is a grid of ordinary pretraining runs, runs/<sweep>/<name>.
"""

import math
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from nanochat_jax.cli import SCRIPTS, progress_bar
from nanochat_jax.config import to_toml
from nanochat_jax.data.shards import list_shards
from nanochat_jax.distributed import say
from nanochat_jax.report.chain import StageRecord, read_stage
from nanochat_jax.runs import METRICS_FILE
from nanochat_jax.scaling import Plan
from nanochat_jax.stages.loop import StopRequest
from nanochat_jax.stages.pretraining import decide, long_documents_of, usual_long_documents
from nanochat_jax.stages.settings import PretrainConfig
from nanochat_jax.tokenizer import Tokenizer, tokenizer_folder

# May differ between a run and its repetition: these settings do not change what is compared.
FREE = {
    *("run", "resume", "overwrite", "device_batch_size", "n_devices", "attention", "wandb"),
    *("sample_every", "sample_tokens", "save_every", "keep_last"),
}
DECIDED_BY_THE_RUN = {"dtype": "auto", "data_streams": None}  # where they have these values


@dataclass(frozen=True)
class Run:
    """One run of a sweep; `place` is where it stands in the grid: flops, depth, variant, seed."""

    name: str
    place: dict[str, Any]
    config: PretrainConfig

    @property
    def folder(self) -> Path:
        return Path(self.config.run)


# --- the grids ------------------------------------------------------------------------------------


def isoflop_grid(
    base: PretrainConfig, budgets: Sequence[float], depths: Sequence[int], folder: Path
) -> list[Run]:
    """Every depth, trained until every budget of FLOPs is spent; the cheapest first."""
    runs = []
    for flops in sorted(budgets):
        for depth in sorted(depths):
            config = replace(base, depth=depth, target_flops=flops, num_iterations=None)
            place = {"budget": flops, "depth": depth}
            runs.append(_run(f"{flops_name(flops)}-d{depth}", place, config, folder))
    return runs


def miniseries_grid(base: PretrainConfig, depths: Sequence[int], folder: Path) -> list[Run]:
    """Every depth, as long as its recipe's tokens per parameter say."""
    base = replace(base, target_flops=None, num_iterations=None)
    return [
        _run(f"d{depth}", {"depth": depth}, replace(base, depth=depth), folder)
        for depth in sorted(depths)
    ]


def seeds_grid(
    a: PretrainConfig, b: PretrainConfig, seeds: Sequence[int], folder: Path
) -> list[Run]:
    """Two variants with every seed; the pairs one after the other."""
    runs = []
    for seed in seeds:
        for variant, config in (("a", a), ("b", b)):
            place = {"variant": variant, "seed": seed}
            runs.append(_run(f"{variant}-seed{seed}", place, replace(config, seed=seed), folder))
    return runs


def _run(name: str, place: dict[str, Any], config: PretrainConfig, folder: Path) -> Run:
    if config.resume or config.overwrite:
        raise ValueError(
            "a sweep skips finished runs and resumes others by itself: leave out --resume and "
            f"--overwrite; to start again, delete {folder} or choose another --name"
        )
    if config.eval_every <= 0:
        raise ValueError("a sweep compares validation text: eval_every must be positive")
    return Run(name, place, replace(config, run=str(folder / name)))


def flops_name(flops: float) -> str:
    """1e15 for 1e+15: short, and fit for a file name."""
    return re.sub(r"e\+0*", "e", f"{flops:g}")


def numbers[N: (int, float)](text: str, kind: Callable[[str], N], what: str) -> list[N]:
    """Numbers with commas between; ValueError for anything else, and for the same one twice."""
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{what} are numbers with commas between, not {text!r}") from None
    if len(set(found)) < len(found):
        raise ValueError(f"{what} are the same twice in {text!r}")
    if not all(math.isfinite(number) and number >= 0 for number in found):
        raise ValueError(f"{what} cannot be negative or infinite: {text!r}")
    return found


def split_flags(text: str) -> list[str]:
    """Flags in one string, as a shell would split them."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ValueError(f"cannot read the flags {text!r}: {error}") from None


# --- before and after -----------------------------------------------------------------------------


def plan_run(run: Run) -> Plan:
    """What a run will be; ValueError, saying why, where it cannot be trained."""
    list_shards(run.config.dataset)
    vocab_size = Tokenizer.load(tokenizer_folder(run.config.tokenizer)).vocab_size
    return decide(run.config, vocab_size, run.config.n_devices or 1)


def read_run(run: Run) -> StageRecord | None:
    """What a run left behind, None where nothing.

    ValueError where it was made with other settings: its numbers would not be of this sweep.
    """
    if not (run.folder / METRICS_FILE).is_file():
        return None
    stage = read_stage(run.folder)
    then, now, dataset = stage.meta.get("config", {}), asdict(run.config), run.config.dataset
    if then:  # a run from before this was a setting cropped
        then = then | {"long_documents": long_documents_of(stage.meta, dataset)}
        now["long_documents"] = now["long_documents"] or usual_long_documents(dataset)
    changed = [
        f"{name} was {then[name]}, now {value}"
        for name, value in now.items()
        if name in then and name not in FREE and then[name] != value
        if not (name in DECIDED_BY_THE_RUN and value == DECIDED_BY_THE_RUN[name])
    ]
    if changed:
        raise ValueError(
            f"{run.folder} was made with other settings: {'; '.join(changed)}. Choose another "
            "--name, or delete that run"
        )
    return stage


def is_finished(stage: StageRecord | None) -> bool:
    """Whether the last step has been saved, and measured."""
    if stage is None or not stage.meta:
        return False
    steps, _ = stage.series("val", "bpb")
    return stage.meta["step"] == stage.meta["plan"]["num_iterations"] == max(steps, default=0)


@dataclass(frozen=True)
class RunResult:
    """What became of a run. `place` is that of the run in its grid."""

    run: str
    place: dict[str, Any]
    status: str  # finished, unfinished, or failed: why
    values: dict[str, Any] = field(default_factory=dict)  # empty unless it finished

    @property
    def row(self) -> dict[str, Any]:
        """Flat, for a table."""
        return {"run": self.run, **self.place, "status": self.status, **self.values}


def result_of(run: Run, failure: str | None = None) -> RunResult:
    """What became of a run, given why it failed, if it did."""
    stage = read_run(run)
    if stage is None or not is_finished(stage):
        return RunResult(run.name, run.place, f"failed: {failure}" if failure else "unfinished")
    plan = stage.meta["plan"]
    values = {
        "depth": plan["depth"],
        "params": plan["scaling_params"],  # what the recipe counts tokens against
        "total_params": plan["params"]["total"],
        "tokens": plan["total_tokens"],
        "flops": float(plan["total_flops"]),
        "steps": plan["num_iterations"],
        "bpb": stage.series("val", "bpb")[1][-1],
        "loss": stage.series("val", "loss")[1][-1],
        "seconds": stage.seconds,
    }
    return RunResult(run.name, run.place, "finished", values)


def finished(results: Iterable[RunResult]) -> list[RunResult]:
    """Those that have numbers."""
    return [result for result in results if result.values]


# --- training: one run after the other, each in its own process -----------------------------------

STEP = re.compile(r"step (\d+)/(\d+) ")  # of the loop's progress lines


def train_all(
    runs: Sequence[Run], failures: dict[str, str], folder: Path, stop: StopRequest
) -> None:
    """Trains what is not finished; adds to `failures` why runs failed."""
    finished = {run.name: is_finished(read_run(run)) for run in runs}  # first, as it may raise
    for index, run in enumerate(runs):
        title = f"[{index + 1}/{len(runs)}] {run.name}"
        if run.name in failures or stop.signal:
            continue
        if finished[run.name]:
            say(f"{title}: finished already")
            continue
        why = train(run, folder, title, stop)
        if why is not None:
            failures[run.name] = why
        result = result_of(run, why)
        bpb = f", {result.values['bpb']:.6f} bits per byte" if result.values else ""
        say(f"{title}: {result.status}{bpb}")


def train(run: Run, folder: Path, title: str, stop: StopRequest) -> str | None:
    """Trains or resumes one run in its own process; returns why it failed, or None.

    If this process is killed, the run ends too: the next line that it prints has no reader.
    """
    settings, log = folder / f"{run.name}.toml", folder / f"{run.name}.log"
    settings.write_text(to_toml(run.config), encoding="utf-8")
    command = [sys.executable, str(SCRIPTS / "pretrain.py"), "--config", str(settings), "--resume"]
    last, terminated = "no output", False
    with (
        log.open("a", encoding="utf-8") as file,
        progress_bar(title) as bar,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        ) as child,
    ):
        assert child.stdout is not None
        for line in child.stdout:
            file.write(line)
            file.flush()
            last = line.strip() or last
            if step := STEP.match(line):
                bar(int(step[1]) + 1, int(step[2]))
            if stop.signal and not terminated:
                child.terminate()  # it saves, and ends
                terminated = True
    if child.returncode == 0 or stop.signal:  # asked to stop before it could listen: no failure
        return None
    return last.removeprefix("error: ") + f" (exit code {child.returncode}, {log})"
