"""Experiments of many runs: which runs they are, what they will be, whether they are there already.

A sweep is a grid of ordinary pretraining runs, runs/<sweep>/<name>; scripts/sweep.py is its command
line. sweep_runner.py trains them one after the other, sweep_results.py reads what became of them
and what that means together, sweep_fits.py has the mathematics, sweep_plots.py the pictures.
"""

import math
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nanochat_jax.config import PretrainConfig
from nanochat_jax.data.shards import list_shards
from nanochat_jax.pretraining import decide
from nanochat_jax.report import Stage, read_stage
from nanochat_jax.scaling import Plan
from nanochat_jax.tokenizer import Tokenizer, tokenizer_folder
from nanochat_jax.tracking import FILE

# What may differ between a run and its repetition: it does not change what is compared.
FREE = {
    *("run", "resume", "overwrite", "device_batch_size", "n_devices", "attention", "wandb"),
    *("sample_every", "sample_tokens", "save_every", "keep_last"),
}
DECIDED_BY_THE_RUN = {"dtype": "auto", "data_streams": None}  # and what it decides them for


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
    return [
        _run(
            f"{flops_name(flops)}-d{depth}",
            {"budget": flops, "depth": depth},
            replace(base, depth=depth, target_flops=flops, num_iterations=None),
            folder,
        )
        for flops in sorted(budgets)
        for depth in sorted(depths)
    ]


def miniseries_grid(base: PretrainConfig, depths: Sequence[int], folder: Path) -> list[Run]:
    """Every depth, as long as its recipe's tokens per parameter say."""
    return [
        _run(
            f"d{depth}",
            {"depth": depth},
            replace(base, depth=depth, target_flops=None, num_iterations=None),
            folder,
        )
        for depth in sorted(depths)
    ]


def seeds_grid(
    a: PretrainConfig, b: PretrainConfig, seeds: Sequence[int], folder: Path
) -> list[Run]:
    """Two variants with every seed; the pairs one after the other."""
    return [
        _run(
            f"{variant}-seed{seed}",
            {"variant": variant, "seed": seed},
            replace(config, seed=seed),
            folder,
        )
        for seed in seeds
        for variant, config in (("a", a), ("b", b))
    ]


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


def read_run(run: Run) -> Stage | None:
    """What a run left behind, None where nothing.

    ValueError where it was made with other settings: its numbers would not be of this sweep.
    """
    if not (run.folder / FILE).is_file():
        return None
    stage = read_stage(run.folder)
    then = stage.meta.get("config", {})
    changed = [
        f"{name} was {then[name]}, now {value}"
        for name, value in asdict(run.config).items()
        if name in then and name not in FREE and then[name] != value
        if not (name in DECIDED_BY_THE_RUN and value == DECIDED_BY_THE_RUN[name])
    ]
    if changed:
        raise ValueError(
            f"{run.folder} was made with other settings: {'; '.join(changed)}. Choose another "
            "--name, or delete that run"
        )
    return stage


def is_finished(stage: Stage | None) -> bool:
    """Whether the last step has been saved, and measured."""
    if stage is None or not stage.meta:
        return False
    steps, _ = stage.series("val", "bpb")
    return stage.meta["step"] == stage.meta["plan"]["num_iterations"] == max(steps, default=0)
