"""Downloads the data of all stages after pretraining, to be used here or copied elsewhere.

    python scripts/prefetch.py                      # everything, about 1 GB, mostly SmolTalk
    python scripts/prefetch.py --stages rl,eval     # only what these stages need
    python scripts/prefetch.py --tasks gsm8k:train,arc-easy:test
    python scripts/prefetch.py --offline            # no network: checks what is there

All goes to one folder, task_data in the base directory (or NANOCHAT_TASK_DATA), with a manifest of
sizes and sha256. For a machine without a network, copy the folder and run --offline there; with
HF_HUB_OFFLINE=1 the stages then never ask the hub. After an interruption, run the same command
again. scripts/download.py downloads the text for pretraining.
"""

from dataclasses import dataclass

from nanochat_jax.cli import run_script
from nanochat_jax.config import parse
from nanochat_jax.tasks.registry import source_of
from nanochat_jax.tasks.sources import (
    CORE_BUNDLE,
    Source,
    check,
    fetch,
    read_manifest,
    task_data_dir,
)

_MIXTURE = "smoltalk:train smoltalk:test mmlu-aux:train mmlu:test gsm8k:train gsm8k:test"
STAGES = {
    "midtrain": f"{_MIXTURE} identity:train spellingbee:train".split(),
    "sft": f"{_MIXTURE} identity:train spelling:train arc-easy:train arc-challenge:train".split(),
    "rl": ["gsm8k:train", "gsm8k:test"],
    "eval": [
        *("arc-easy:test", "arc-challenge:test", "mmlu:test"),
        *("gsm8k:test", "humaneval:test", "spellingbee:test"),
    ],
    "core": [],
}


@dataclass(frozen=True)
class PrefetchConfig:
    """What to fetch."""

    stages: str = ",".join(STAGES)
    """Stages whose data is wanted, with commas between."""
    tasks: str = ""
    """Tasks to fetch instead: NAME:SPLIT, with commas between."""
    offline: bool = False
    """Fetch nothing: compare what is there with the manifest."""
    workers: int = 8
    """Files fetched at the same time."""


def main() -> None:
    config = parse(PrefetchConfig, "prefetch", description=__doc__)
    sources = wanted_sources(config)
    if not config.offline:
        fetch(sources, workers=config.workers)
        sizes = [path.stat().st_size for source in sources for path in source.files()]
        print(f"{task_data_dir()}: {len(sizes)} files, {sum(sizes) / 1e6:,.1f} MB, complete")
        return
    wrong, unknown = check(sources)
    if unknown:
        print(f"there, but not in the manifest, so without a checksum: {', '.join(unknown)}")
    if wrong:
        raise ValueError(
            f"{task_data_dir()} is not complete: {'; '.join(wrong)}; run scripts/prefetch.py where "
            "there is a network, and copy the folder here"
        )
    print(f"{task_data_dir()}: complete; {len(read_manifest())} files are in the manifest")


def wanted_sources(config: PrefetchConfig) -> list[Source]:
    """The data of the stages, or of the single tasks, without repetition."""
    stages = [one.strip() for one in config.stages.split(",")]
    if config.tasks:
        stages, tasks = [], [one.strip() for one in config.tasks.split(",")]
    else:
        unknown = sorted(set(stages) - STAGES.keys())
        if unknown:
            raise ValueError(f"--stages knows {', '.join(STAGES)}, not {', '.join(unknown)}")
        tasks = [task for stage in stages for task in STAGES[stage]]
    found: list[Source | None] = [CORE_BUNDLE] if "core" in stages else []
    for task in tasks:
        name, _, split = task.rpartition(":")
        if not name:
            raise ValueError(f"--tasks wants NAME:SPLIT, for example gsm8k:train, not {task!r}")
        found.append(source_of(name, split))
    return list(dict.fromkeys(source for source in found if source is not None))


if __name__ == "__main__":
    run_script(main, "interrupted; run the same command again to continue")
