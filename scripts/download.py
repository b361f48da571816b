"""Gets text to train on, as Parquet shards below the base directory.

    python scripts/download.py --dataset climbmix --shards 170     # the 2026 speedrun
    python scripts/download.py --dataset fineweb-edu --shards 240  # the 2025 speedrun
    python scripts/download.py --dataset local                     # needs no network
    python scripts/download.py --from ~/texts --name mine          # your own text

Shards from the hub are downloaded in parallel and verified, and what an earlier run has downloaded
is kept; the fixed validation shard always comes along. HF_ENDPOINT names another hub or a mirror.

Your own .parquet (column text), .jsonl or .json (key text), .txt and .md files, also as .gz or
.zst, are shuffled, deduplicated and divided into training and validation shards; then train with
--dataset NAME. Files named after splits (train-…, validation-…) stay in theirs, test-… is left out.
A folder of Parquet files is used where it lies, with --dataset PATH.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pyarrow.parquet as pq
import tyro

from nanochat_jax.cli import run_script
from nanochat_jax.config import parse
from nanochat_jax.data.corpus import convert_folder, make_local_dataset
from nanochat_jax.data.download import download_shards
from nanochat_jax.data.shards import HUB_DATASETS, LOCAL, dataset_folder, list_shards


@dataclass(frozen=True)
class DownloadConfig:
    """Which text to get."""

    dataset: str = "climbmix"
    """climbmix (2026), fineweb-edu (2025) or local (documentation found on this machine)."""
    shards: int = 8
    """Training shards from the hub, about 100 MB each; the validation shard comes on top."""
    source: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """A folder with .parquet, .jsonl, .json, .txt or .md files (or .gz, .zst of these)."""
    name: str | None = None
    """What to call the data set made with --from."""
    workers: int = 8
    """Files fetched at the same time."""
    verify: bool = False
    """Compare the shards that are already there with the hub's checksums."""


def main() -> None:
    config = parse(DownloadConfig, "download", description=__doc__)
    if config.source is not None:
        if config.name is None:
            raise ValueError("give the new data set a name: --from FOLDER --name NAME")
        if dataset_folder(config.name).exists():
            print(f"{config.name} is there already; delete its folder to make it again")
        folder = convert_folder(config.source, config.name)
    elif config.dataset == LOCAL:
        folder = make_local_dataset()
    elif config.dataset in HUB_DATASETS:
        folder = download_shards(
            config.dataset, config.shards, workers=config.workers, verify=config.verify
        )
    else:
        raise ValueError(
            f"there is no data set {config.dataset!r} to get; choose one of "
            f"{', '.join([*HUB_DATASETS, LOCAL])}, or --from FOLDER --name NAME"
        )
    report(folder)


def report(folder: Path) -> None:
    """One line about each half of the data set."""
    shards = list_shards(folder)
    print(folder)
    for half, paths in (("training", shards.train), ("validation", shards.val)):
        documents = sum(pq.read_metadata(path).num_rows for path in paths)
        size = sum(path.stat().st_size for path in paths)
        print(f"  {half}: {len(paths)} shards, {documents:,} documents, {size / 1e6:,.1f} MB")


if __name__ == "__main__":
    run_script(main, "interrupted; run the same command again to continue")
