"""Reads what every stage of a model's life left behind, and chains the stages together.

    runs/<name>/report/<stage>.json     what a stage or an evaluation recorded (runs.record)
    runs/<name>/metrics.jsonl           its curves

A model's life is a chain of runs: every fine-tuned run names the run it came from in the meta of
its checkpoints.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat_jax.config import base_dir
from nanochat_jax.runs import (
    METRICS_FILE,
    REPORT_FOLDER,
    Record,
    read_meta,
    read_metrics,
    read_sound,
)

TITLES = {"pretrain": "BASE", "midtrain": "MID", "sft": "SFT", "rl": "RL"}
ORIGINAL_ROWS = ("CORE", "ARC-Challenge", "ARC-Easy", "GSM8K", "HumanEval", "MMLU", "ChatCORE")
BPB = "Validation bpb"
TALK_BPB = "Validation bpb, conversations"  # of other data: not comparable with BPB
EVALUATIONS = ("eval_base.json", "eval_chat.json")  # beside metrics.jsonl


# --- reading --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MetricValue:
    """A measured number and its interval of 95 % confidence, where there is one."""

    value: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class StageRecord:
    """One run of the chain."""

    folder: Path
    meta: dict[str, Any] = field(default_factory=dict)  # of its last checkpoint
    metrics: list[Record] = field(default_factory=list)
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def kind(self) -> str:
        return self.meta.get("stage", "pretrain")

    @property
    def title(self) -> str:
        return TITLES.get(self.kind, self.kind.upper())

    def series(self, kind: str, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one number of metrics.jsonl."""
        found = [
            (record["step"], record[key])
            for record in self.metrics
            if record["kind"] == kind and isinstance(record.get(key), int | float)
        ]
        return [step for step, _ in found], [value for _, value in found]

    def find(self, key: str) -> Any:
        """A value of any section, or None."""
        return next((s[key] for s in self.sections.values() if s.get(key) is not None), None)

    @property
    def seconds(self) -> float:
        """Of the whole stage if it was recorded, else of training."""
        recorded = self.find("seconds")
        if recorded is not None:
            return float(recorded)
        return float(self.meta.get("progress", {}).get("train_seconds", 0.0)) or max(
            self.series("train", "train_seconds")[1], default=0.0
        )


def read_stage(folder: Path) -> StageRecord:
    """Everything in a run's folder. ValueError where there is no run."""
    if not (folder / METRICS_FILE).is_file():
        raise ValueError(f"there is no run in {folder}: it has no {METRICS_FILE}")
    recorded = sorted((folder / REPORT_FOLDER).glob("*.json"))
    sections = {
        path.stem: values
        for path in (*recorded, *(folder / name for name in EVALUATIONS))
        if (values := read_sound(path))
    }
    return StageRecord(folder, read_meta(folder), read_metrics(folder), sections)


# --- the chain ------------------------------------------------------------------------------------


def read_chain(folder: Path) -> list[StageRecord]:
    """The stages of a model, from its base to what was made of it last.

    Backwards along the sources; forwards, where several runs came from one, along the newest.
    """
    chain = [read_stage(folder)]
    while (source := _source(chain[0].folder, chain[0].meta)) is not None:
        if not (source / METRICS_FILE).is_file() or source in [stage.folder for stage in chain]:
            break
        chain.insert(0, read_stage(source))
    while (child := _newest_child(chain[-1].folder)) is not None:
        if child in [stage.folder for stage in chain]:
            break
        chain.append(read_stage(child))
    return chain


def _source(folder: Path, meta: dict[str, Any]) -> Path | None:
    """The run that a run came from: a name stands for a folder beside it, or below runs/."""
    named = (meta.get("source") or {}).get("run")
    if not named:
        return None
    if "/" in named:
        return Path(named).expanduser()
    beside = folder.parent / named
    return beside if beside.is_dir() else base_dir() / "runs" / named


def _newest_child(folder: Path) -> Path | None:
    others = [
        path.parent for path in folder.parent.glob(f"*/{METRICS_FILE}") if path.parent != folder
    ]
    children = [other for other in others if _source(other, read_meta(other)) == folder]
    return max(children, key=lambda path: (path / METRICS_FILE).stat().st_mtime, default=None)


# --- the summary ----------------------------------------------------------------------------------


def scores(stage: StageRecord) -> dict[str, MetricValue]:
    """The metrics of a stage by the names of the summary table."""
    names = {BPB: "bpb", "CORE": "core", "ChatCORE": "chatcore"}
    found = {name: metric(stage.find, key) for name, key in names.items()}
    if curve := stage.series("val", "bpb")[1]:
        last = BPB if stage.kind == "pretrain" else TALK_BPB
        found[last] = found.get(last) or MetricValue(curve[-1])
    row_names = {name.lower(): name for name in ORIGINAL_ROWS}
    for name, accuracy in chat_tasks(stage).items():
        found[row_names.get(name.lower(), name)] = accuracy
    if passes := stage.series("val", "pass@1")[1]:
        task = stage.meta.get("identity", {}).get("task", {}).get("name", "its own task")
        found[f"pass@1, {task}"] = MetricValue(passes[-1])
    return {name: value for name, value in found.items() if value is not None}


def chat_tasks(stage: StageRecord) -> dict[str, MetricValue]:
    """The accuracy of every chat task."""
    tasks = (stage.find("chat_tasks") or {}).items()
    values = {name: task if isinstance(task, dict) else {"accuracy": task} for name, task in tasks}
    found = {name: metric(value.get, "accuracy") for name, value in values.items()}
    return {name: value for name, value in found.items() if value is not None}


def metric(get: Callable[[str], Any], key: str) -> MetricValue | None:
    """get(key) with get(key + "_interval"), where there is one."""
    value, interval = get(key), get(f"{key}_interval")
    if not isinstance(value, int | float):
        return None
    return MetricValue(float(value), (float(interval[0]), float(interval[1])) if interval else None)


def summary(
    chain: Sequence[StageRecord],
) -> tuple[list[str], list[tuple[str, list[MetricValue | None]]]]:
    """The original's table: headings of the stages, and rows of (metric, a score per stage)."""
    columns = [scores(stage) for stage in chain]
    found = {name for column in columns for name in column}
    first = [name for name in (BPB, TALK_BPB, *ORIGINAL_ROWS) if name in found]
    names = [*first, *sorted(found - {*first})]
    rows = [(name, [column.get(name) for column in columns]) for name in names]
    return titles(chain), rows


def titles(chain: Sequence[StageRecord]) -> list[str]:
    """The stages' titles, with the run's name where one has come before."""
    plain = [stage.title for stage in chain]
    return [
        f"{title} {stage.name}" if title in plain[:index] else title
        for index, (title, stage) in enumerate(zip(plain, chain, strict=True))
    ]


@dataclass(frozen=True)
class Totals:
    """What a model's whole life took. `usd` and `kwh` are None where they are unknown."""

    seconds: float
    devices: int
    device: str
    usd: float | None
    kwh: float | None
    tokens: int
    flops: float


def totals(chain: Sequence[StageRecord], usd_per_gpu_hour: float) -> Totals:
    made_by = chain[0].meta.get("provenance", {})
    device, devices = made_by.get("device", "unknown"), made_by.get("n_devices", 1)
    seconds = sum(stage.seconds for stage in chain)
    is_gpu = device not in ("cpu", "unknown")
    kwh = [stage.find("kwh") for stage in chain if stage.find("kwh") is not None]
    plans = [stage.meta.get("plan", {}) for stage in chain]
    return Totals(
        seconds=seconds,
        devices=devices,
        device=device,
        usd=seconds / 3600 * devices * usd_per_gpu_hour if is_gpu else None,
        kwh=sum(kwh) if kwh else None,
        tokens=sum(int(plan.get("total_tokens", 0)) for plan in plans),
        flops=sum(float(plan.get("total_flops", 0.0)) for plan in plans),
    )
