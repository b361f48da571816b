"""Writes the report card of a model, or compares several: Markdown and one HTML file.

    python scripts/report.py                    # the run that was written to last
    python scripts/report.py d24                # from its base to what was made of it
    python scripts/report.py d24 d26 d20_2025   # beside one another

One run's report goes into the folder of its last stage; a comparison into reports/.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from nanochat_jax.cli import run_script
from nanochat_jax.config import base_dir, parse
from nanochat_jax.report.chain import read_chain
from nanochat_jax.report.content import build
from nanochat_jax.report.page import write
from nanochat_jax.runs import default_run, run_folder


@dataclass(frozen=True)
class ReportConfig:
    """Which runs, and where to."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Names of runs, or their folders (the run written to last)."""
    out: str = ""
    """Folder to write into."""
    usd_per_gpu_hour: float = 3.0
    """Price of one device for an hour."""


def main() -> None:
    config = parse(ReportConfig, "report", description=__doc__)
    folders = [run_folder(name) for name in config.runs or (default_run(),)]
    chains = [read_chain(folder) for folder in folders]
    content = build(chains, config.usd_per_gpu_hour)
    if len(chains) == 1:
        out, name = chains[0][-1].folder, "report"
    else:
        out, name = base_dir() / "reports", "-".join(folder.name for folder in folders)
    for path in write(content, Path(config.out).expanduser() if config.out else out, name):
        print(path)


if __name__ == "__main__":
    run_script(main)
