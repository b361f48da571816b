"""What a report says: sections of a few kinds of blocks, which page.py turns into a page."""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat_jax.report import facts
from nanochat_jax.report.chain import (
    BPB,
    TALK_BPB,
    MetricValue,
    StageRecord,
    Totals,
    metric,
    scores,
    summary,
    totals,
)
from nanochat_jax.report.plots import Chain, Plot, plots
from nanochat_jax.runs import CONFIG_FILE

log = logging.getLogger(__name__)

TRANSCRIPTS = "transcripts.jsonl"
SHOWN_SAMPLES = 4
NOTHING = "–"


@dataclass(frozen=True)
class Cell:
    """A cell with a smaller note behind its text, or marked as the best."""

    text: str
    note: str = ""
    best: bool = False


@dataclass(frozen=True)
class Table:
    heads: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    numbers: bool = True  # all columns but the first are aligned to the right


@dataclass(frozen=True)
class Cards:
    """A few numbers worth a large font: (name, value, note)."""

    cards: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Plots:
    plots: Sequence[Plot]


@dataclass(frozen=True)
class Samples:
    """(label, prompt, continuation)"""

    samples: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class SourceText:
    """A text as it stands in a file."""

    name: str
    text: str


Block = Table | Cards | Plots | Samples | SourceText


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]
    folded: bool = False


@dataclass(frozen=True)
class Content:
    title: str
    subtitle: str
    sections: Sequence[Section]


def build(chains: Sequence[Chain], usd_per_gpu_hour: float) -> Content:
    """The report of one model, or of several side by side; ValueError for the same one twice."""
    names = _names(chains)
    if len({stage.folder for stage in _distinctive(chains)}) < len(chains):
        raise ValueError(
            f"some of the runs to compare are of the same model ({', '.join(names)}): name others; "
            "the report of a single run has all stages of its model"
        )
    costs = [totals(chain, usd_per_gpu_hour) for chain in chains]
    if len(chains) == 1:
        sections = _one(chains[0], costs[0])
        subtitle = f"From {' to '.join(dict.fromkeys(stage.title for stage in chains[0]))}."
    else:
        sections, subtitle = _several(chains, costs), "Runs side by side."
    return Content(" and ".join(names), subtitle, [s for s in sections if s.blocks])


def _distinctive(chains: Sequence[Chain]) -> list[StageRecord]:
    """Of each model the stage that distinguishes it: its base, or its last stage."""
    bases = [chain[0] for chain in chains]
    differ = len({stage.folder for stage in bases}) == len(chains)
    return bases if differ else [chain[-1] for chain in chains]


def _names(chains: Sequence[Chain]) -> list[str]:
    return [stage.name for stage in _distinctive(chains)]


def _one(chain: Chain, cost: Totals) -> Iterator[Section]:
    yield Section("", [Cards(list(_cards(chain, cost)))])
    heads, rows = summary(chain)
    metrics = [[name, *map(_score, row)] for name, row in rows]
    yield Section("Summary", [Table(["Metric", *heads], metrics)])
    yield Section("Curves", _plots([chain]))
    yield Section("Stages", [_stage_table(chain)])
    yield Section("In its own words", _samples(chain))
    yield Section("CORE, task by task", list(_core_tables(chain)), folded=True)
    yield Section("What the stages recorded", list(_recorded(chain)), folded=True)
    yield Section("Cost", [Table(["Total", ""], _cost_lines(cost))])
    yield Section("Code and machine", [_facts_table(chain)])
    yield Section("Data", list(_data(chain)), folded=True)
    yield Section("Configuration", list(_configurations(chain)), folded=True)


def _several(chains: Sequence[Chain], costs: Sequence[Totals]) -> Iterator[Section]:
    yield Section("Results", [_comparison(chains)])
    yield Section("Curves", _plots(chains))
    yield Section("What they took", [_costs(chains, costs)])
    yield Section("Settings that differ", _differences(chains))
    yield Section("Code and machine", [_facts_table(chains[0])])
    yield Section("Configuration", [b for c in chains for b in _configurations(c)], folded=True)


# --- results --------------------------------------------------------------------------------------


def _cards(chain: Chain, cost: Totals) -> Iterator[tuple[str, str, str]]:
    found = [scores(stage) for stage in chain]
    for name, note in (
        (BPB, "bits per byte of unseen text"),
        ("CORE", "22 tasks; GPT-2: 0.2565"),
        ("ChatCORE", "chat tasks above guessing"),
    ):
        values = [column[name].value for column in found if name in column]
        if values:
            yield name, f"{values[0 if name == BPB else -1]:.4f}", note
    plan = chain[0].meta.get("plan", {})
    if "params" in plan:
        yield "Parameters", big(plan["params"]["total"]), f"depth {plan.get('depth', '?')}"
    if cost.tokens:
        yield "Tokens", big(cost.tokens), f"{big(cost.flops)}FLOPs"
    yield "Time", duration(cost.seconds), f"on {cost.devices} × {cost.device}"
    if cost.usd is not None:
        yield "Price", f"${cost.usd:,.2f}", "of these devices for that time"
    if cost.kwh is not None:
        yield "Energy", f"{cost.kwh:.2f} kWh", "as the GPUs measure"


def _score(score: MetricValue | None, best: float | None = None) -> str | Cell:
    if score is None:
        return NOTHING
    note = f"{score.interval[0]:.3f} to {score.interval[1]:.3f}" if score.interval else ""
    return Cell(f"{score.value:.4f}", note, score.value == best)


def _comparison(chains: Sequence[Chain]) -> Table:
    """A column per run, a row per stage and metric, the best in bold."""
    found: dict[tuple[str, str], dict[int, MetricValue]] = {}
    for index, chain in enumerate(chains):
        heads, rows = summary(chain)
        for place, title in enumerate(heads):
            for name, row in rows:
                if (score := row[place]) is not None:
                    found.setdefault((title, name), {})[index] = score
    stages = list(dict.fromkeys(title for title, _ in found))
    table = []
    for (title, name), of_run in sorted(found.items(), key=lambda item: stages.index(item[0][0])):
        values = {score.value for score in of_run.values()}
        best = min(values) if name in (BPB, TALK_BPB) else max(values)
        best_of_several = best if len(values) > 1 else None
        cells = [_score(of_run.get(i), best_of_several) for i in range(len(chains))]
        table.append([Cell(name, title), *cells])
    return Table(["Metric", *_names(chains)], table)


def _core_tables(chain: Chain) -> Iterator[Block]:
    for stage in chain:
        rows = [
            [name, _score(metric(task.get, "accuracy")), f"{task['centred']:.4f}"]
            for name, task in (stage.find("core_tasks") or {}).items()
        ]
        if rows:
            yield Table([f"Task ({stage.title})", "Accuracy", "Centred"], rows)


def _plots(chains: Sequence[Chain]) -> list[Block]:
    found = plots(chains)
    return [Plots(found)] if found else []


# --- how it went ----------------------------------------------------------------------------------


def _stage_table(chain: Chain) -> Table:
    rows: list[list[str | Cell]] = []
    for stage in chain:
        speed = stage.series("train", "tokens_per_s")[1][1:]
        mfu = stage.series("train", "mfu")[1][1:]
        cropped = stage.series("train", "cropped_share")[1]
        rows.append(
            [
                Cell(stage.title, stage.name),
                f"{stage.meta.get('step', len(stage.series('train', 'loss')[0])):,}",
                big(stage.meta.get("plan", {}).get("total_tokens")),
                duration(stage.seconds),
                big(sum(speed) / len(speed)) if speed else NOTHING,
                f"{100 * sum(mfu) / len(mfu):.1f} %" if mfu else NOTHING,
                f"{100 * cropped[-1]:.1f} %" if cropped else NOTHING,
            ]
        )
    return Table(["Stage", "Steps", "Tokens", "Time", "Tokens/s", "MFU", "Cropped"], rows)


def _samples(chain: Chain) -> list[Block]:
    found = []
    for stage in chain:
        shown = [record["texts"] for record in stage.metrics if record["kind"] == "sample"]
        texts = stage.find("samples") or (shown[-1] if shown else [])
        pairs = [(pair[0], pair[1]) for pair in texts if len(pair) == 2]
        pairs += [(line["prompt"], line["completion"]) for line in _transcripts(stage.folder)]
        found += [(stage.title, prompt, text) for prompt, text in pairs[:SHOWN_SAMPLES]]
    return [Samples(found)] if found else []


def _transcripts(folder: Path) -> list[dict[str, Any]]:
    """The last answers of reinforcement learning, the best first."""
    path = folder / TRANSCRIPTS
    if not path.is_file():
        return []
    # A run that was killed may have left its last line unfinished.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    try:
        read = [json.loads(line) for line in lines[-SHOWN_SAMPLES:]]
        return [line for line in read if {"prompt", "completion"} <= line.keys()]
    except (ValueError, AttributeError):
        log.warning("%s is damaged: its last answers cannot be shown", path)
        return []


def _recorded(chain: Chain) -> Iterator[Block]:
    for stage in chain:
        for name, values in stage.sections.items():
            rows = [
                (key, plainly(value))
                for key, value in values.items()
                if isinstance(value, int | float | str)
            ]
            if rows:
                yield Table([f"{name} ({stage.title})", ""], rows)


# --- what it took ---------------------------------------------------------------------------------


def _cost_lines(cost: Totals) -> list[tuple[str, str]]:
    return [
        ("Time", duration(cost.seconds)),
        ("Devices", f"{cost.devices} × {cost.device}"),
        ("Price", f"${cost.usd:,.2f}" if cost.usd is not None else NOTHING),
        ("Energy", f"{cost.kwh:.3f} kWh" if cost.kwh is not None else NOTHING),
        ("Tokens", big(cost.tokens) if cost.tokens else NOTHING),
        ("FLOPs", f"{cost.flops:.3e}" if cost.flops else NOTHING),
    ]


def _costs(chains: Sequence[Chain], costs: Sequence[Totals]) -> Table:
    sizes = [chain[0].meta.get("plan", {}).get("params", {}).get("total") for chain in chains]
    commits = [chain[0].meta.get("provenance", {}).get("commit") or NOTHING for chain in chains]
    columns = [dict(_cost_lines(cost)) for cost in costs]
    rows = [
        ["Parameters", *map(big, sizes)],
        *([name, *(column[name] for column in columns)] for name in columns[0]),
        ["Commit", *(commit[:12] for commit in commits)],
    ]
    return Table(["", *_names(chains)], rows)


def _differences(chains: Sequence[Chain]) -> list[Block]:
    settings = [stage.meta.get("config", {}) for stage in _distinctive(chains)]
    keys = dict.fromkeys(key for config in settings for key in config)
    rows = [
        [key, *(plainly(config.get(key)) for config in settings)]
        for key in keys
        if key not in ("resume", "overwrite")
        and len({json.dumps(config.get(key)) for config in settings}) > 1
    ]
    return [Table(["Setting", *_names(chains)], rows)] if rows else []


# --- where it comes from --------------------------------------------------------------------------


def _facts_table(chain: Chain) -> Table:
    size, packages, here = facts.code_size(), facts.dependencies(), facts.machine()
    made_by = chain[0].meta.get("provenance", {})
    versions = made_by.get("packages", {})
    lines = {
        "Code": f"{size['files']} files, {size['lines']:,} lines, {big(size['characters'])} "
        f"characters, about {big(size['tokens'])} tokens (tests not counted)",
        "Dependencies": f"{packages['direct']} direct, {packages['locked']} in all"
        if {"direct", "locked"} <= packages.keys()
        else NOTHING,
        "Commit": made_by.get("commit") or NOTHING,
        "Trained on": f"{made_by.get('n_devices', '?')} × {made_by.get('device', 'unknown')}, "
        f"{made_by.get('n_processes', '?')} process(es)",
        "Versions": ", ".join(f"{n} {v}" for n, v in versions.items() if v) or NOTHING,
        "This machine": f"{here['processor']}, {here['cores']} cores, {here['memory']}, "
        f"{here['system']}, Python {here['python']}",
    }
    return Table(["", ""], list(lines.items()), numbers=False)


def _data(chain: Chain) -> Iterator[Block]:
    """What decides which data a stage saw, as its checkpoints have it."""
    for stage in chain:
        identity = stage.meta.get("identity", {})
        shown = {key: identity[key] for key in ("data", "task", "tokenizer") if key in identity}
        if shown:
            name = f"{stage.title}: {stage.meta.get('config', {}).get('dataset', stage.name)}"
            yield SourceText(name, json.dumps(shown, indent=1, ensure_ascii=False))


def _configurations(chain: Chain) -> Iterator[Block]:
    for stage in chain:
        path = stage.folder / CONFIG_FILE
        if path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace").strip()
            yield SourceText(f"{stage.title}: {stage.name}", text)


# --- numbers as texts -----------------------------------------------------------------------------


def big(value: float | None) -> str:
    """Three digits and a letter: 7.34 M, 901 k, 2.44e13 is 24.4 T."""
    if value is None:
        return NOTHING
    for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    if seconds <= 0:
        return NOTHING
    minutes, hours = seconds / 60, seconds / 3600
    if hours >= 1:
        return f"{int(hours)} h {int(minutes % 60):02d} min"
    return f"{int(minutes)} min {int(seconds % 60):02d} s" if minutes >= 1 else f"{seconds:.1f} s"


def plainly(value: Any) -> str:
    if value is None:
        return NOTHING
    return f"{value:.6g}" if isinstance(value, float) else str(value)
