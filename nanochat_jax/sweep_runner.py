"""Trains the runs of a sweep, one after the other, each in its own process."""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from nanochat_jax.config import to_toml
from nanochat_jax.loop import StopRequest
from nanochat_jax.runtime import SCRIPTS, progress_bar, say
from nanochat_jax.sweep_results import result_of
from nanochat_jax.sweeps import Run, is_finished, read_run

STEP = re.compile(r"step (\d+)/(\d+) ")  # of the loop's progress lines


def train_all(
    runs: Sequence[Run], failures: dict[str, str], folder: Path, stop: StopRequest
) -> None:
    """Trains what is not finished; adds to `failures` why runs failed."""
    finished = {run.name: is_finished(read_run(run)) for run in runs}  # says first what is amiss
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
    """Trains one run, or goes on training it, in its own process; returns why it failed, or None.

    If this process is killed, the run ends too, at its next line: nobody reads it.
    """
    settings, log = folder / f"{run.name}.toml", folder / f"{run.name}.log"
    settings.write_text(to_toml(run.config), encoding="utf-8")
    command = [sys.executable, str(SCRIPTS / "pretrain.py"), "--config", str(settings), "--resume"]
    last, told = "no output", False
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
            if stop.signal and not told:
                child.terminate()  # it saves, and ends
                told = True
    if child.returncode == 0 or stop.signal:  # asked to stop before it could listen: no failure
        return None
    return last.removeprefix("error: ") + f" (exit code {child.returncode}, {log})"
