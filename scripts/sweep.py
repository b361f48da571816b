"""Experiments of many pretraining runs: scaling laws, a series of depths, a test over seeds.

    python scripts/sweep.py isoflop --flops 1e17,3e17 --depths 4,6,8,10 --eval-every 1000
    python scripts/sweep.py miniseries --depths 4,6,8 --config cpu --target-param-data-ratio 2
    python scripts/sweep.py seeds --seeds 1,2,3 --a "--depth 4" --b "--depth 4 --matrix-lr 0.04"

All flags but the sweep's own are those of pretrain.py, and go to every run. A run is an ordinary
one, runs/NAME/…; finished ones are skipped, interrupted ones resumed, a failed one is reported and
does not stop the others: repeat the command after any interruption. `--plan` prints what it will
cost and trains nothing. Tables, results.csv, results.json and the plots go to sweeps/NAME.
"""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import tyro
from rich.console import Console
from rich.table import Table

from nanochat_jax.cli import run_script
from nanochat_jax.config import base_dir, parse
from nanochat_jax.distributed import say
from nanochat_jax.stages.loop import stop_on_signals
from nanochat_jax.stages.settings import PretrainConfig
from nanochat_jax.sweep.fits import PowerLaw
from nanochat_jax.sweep.grid import (
    Run,
    RunResult,
    finished,
    isoflop_grid,
    miniseries_grid,
    numbers,
    plan_run,
    result_of,
    seeds_grid,
    split_flags,
    train_all,
)
from nanochat_jax.sweep.plots import compute_plot, isoflop_plots, seeds_plot
from nanochat_jax.sweep.results import (
    compare_seeds,
    fit_isoflop,
    fit_miniseries,
    results_csv,
    sentences,
    table,
)

DEFAULTS = ("--sample-every=0",)  # flags of the command line override it


@dataclass(frozen=True)
class Isoflop:
    """Which depth is best for a budget of FLOPs: every depth with every budget."""

    flops: str
    """Budgets, with commas between."""
    depths: str
    """Depths, with commas between; three or more show a minimum."""
    name: str = "isoflop"
    """Name of the sweep."""
    plan: bool = False
    """Only print what the runs will be."""


@dataclass(frozen=True)
class Miniseries:
    """A model of every depth, each as long as the recipe says."""

    depths: str
    """Depths, with commas between."""
    name: str = "miniseries"
    """Name of the sweep."""
    plan: bool = False
    """Only print what the runs will be."""


@dataclass(frozen=True)
class Seeds:
    """Whether b differs from a by more than luck: both with the same seeds, a paired test."""

    seeds: str
    """Seeds, with commas between; six or more for p < 0.05 by permutations."""
    a: str
    """Flags of the one variant, as one argument."""
    b: str
    """Flags of the other."""
    name: str = "seeds"
    """Name of the sweep."""
    plan: bool = False
    """Only print what the runs will be."""


Sweep = Isoflop | Miniseries | Seeds


def main() -> None:
    sweep, flags = read_command_line(sys.argv[1:])
    jax.config.update("jax_platforms", "cpu")  # the devices are for the runs
    runs = make_grid(sweep, flags)
    failures = announce(runs)
    if sweep.plan:
        return
    folder = base_dir() / "sweeps" / sweep.name
    folder.mkdir(parents=True, exist_ok=True)
    with stop_on_signals() as stop:
        train_all(runs, failures, folder, stop)
    results = [result_of(run, failures.get(run.name)) for run in runs]
    summary = conclude(sweep, results, folder)
    say(f"results are in {folder}")
    if stop.signal:
        say(f"stopped by {stop.signal}; the same command resumes")
    say(json.dumps(summary, ensure_ascii=False))
    sys.exit(1 if failures else 0)


def read_command_line(args: Sequence[str]) -> tuple[Sweep, list[str]]:
    """The sweep, and the flags that are not its own."""
    joined: list[str] = []
    for arg in args:  # a value may start with dashes: `--a "--depth 4"` becomes --a=…
        if joined and joined[-1] in ("--a", "--b"):
            joined[-1] += f"={arg}"
        else:
            joined.append(arg)
    return tyro.cli(
        Sweep,
        args=joined,
        description=__doc__,
        return_unknown_args=True,
        config=(tyro.conf.OmitArgPrefixes,),
    )


def make_grid(sweep: Sweep, flags: Sequence[str]) -> list[Run]:
    """All runs of a sweep; ValueError for impossible ones."""
    if not re.fullmatch(r"\w[\w.-]*", sweep.name):
        raise ValueError(f"--name is one of letters, digits, dots and dashes, not {sweep.name!r}")
    folder = base_dir() / "runs" / sweep.name

    def read(*more: str) -> PretrainConfig:
        return parse(PretrainConfig, "pretrain", [*DEFAULTS, *flags, *more])

    if isinstance(sweep, Seeds):
        a, b = read(*split_flags(sweep.a)), read(*split_flags(sweep.b))
        return seeds_grid(a, b, numbers(sweep.seeds, int, "--seeds"), folder)
    depths = numbers(sweep.depths, int, "--depths")
    if isinstance(sweep, Isoflop):
        return isoflop_grid(read(), numbers(sweep.flops, float, "--flops"), depths, folder)
    return miniseries_grid(read(), depths, folder)


def announce(runs: Sequence[Run]) -> dict[str, str]:
    """Says what the runs will be; returns why some cannot be. ValueError if that is all of them."""
    failures: dict[str, str] = {}
    rows, flops = [], 0
    for run in runs:
        try:
            plan = plan_run(run)
        except ValueError as error:
            failures[run.name] = str(error)
            continue
        flops += plan.total_flops
        sizes = (plan.scaling_params, plan.total_tokens, plan.num_iterations)
        rows.append([run.name, *(f"{size:,}" for size in sizes), f"{plan.total_flops:.3g}"])
    if len(failures) == len(runs):
        raise ValueError(next(iter(failures.values())))
    show(["run", "scaling parameters", "tokens", "steps", "FLOPs"], rows)
    say(f"{len(rows)} runs, {flops:.3g} FLOPs")
    for name, why in failures.items():
        say(f"{name} cannot be trained: {why}")
    return failures


def conclude(sweep: Sweep, results: Sequence[RunResult], folder: Path) -> dict[str, Any]:
    """Prints the table and what it says, writes both and the plots; returns the summary."""
    show(*table(results))
    if isinstance(sweep, Isoflop):
        isoflop = fit_isoflop(results)
        found, plots = isoflop.as_json(), isoflop_plots(isoflop, results)
    elif isinstance(sweep, Miniseries):
        found = fit_miniseries(results)
        law = found["laws"].get("bpb")
        plots = {"compute": compute_plot(results, PowerLaw(**law) if law else None)}
    else:
        found, plots = compare_seeds(results), {"seeds": seeds_plot(results)}
    for line in sentences(found):
        say(line)
    (folder / "results.csv").write_text(results_csv(results), encoding="utf-8")
    whole = {"settings": asdict(sweep), "runs": [result.row for result in results], **found}
    (folder / "results.json").write_text(json.dumps(whole, indent=1), encoding="utf-8")
    for name, svg in plots.items():
        (folder / f"{name}.svg").write_text(svg, encoding="utf-8")
    return {
        "sweep": sweep.name,
        "finished": len(finished(results)),
        "runs": len(results),
        "failed": {r.run: r.status for r in results if r.status.startswith("failed")},
        **found,
    }


def show(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    lines = Table(box=None, pad_edge=False)
    for index, title in enumerate(titles):
        lines.add_column(title, justify="left" if index in (0, len(titles) - 1) else "right")
    for row in rows:
        lines.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 140).print(lines)


if __name__ == "__main__":
    run_script(main)
