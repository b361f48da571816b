"""The curves of a report, as SVG that takes its colours and its font from the page around it."""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("agg")
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from nanochat_jax.report.chain import StageRecord, titles

CONVERSATIONS = "Validation on conversations"
POINTS = 600  # of a curve; longer ones are averaged down to these
DASHES = ("-", "--", ":", "-.")
SERIES = 8  # colours of the page, --series-0 …
_INK, _LINE = "#010203", "#040506"  # stand for the page's variables until the SVG is written
_COLOURS = [f"#0a0b{index:02x}" for index in range(SERIES)]
_SIZE = (6.2, 3.1)  # inches; the page scales it


class Plot(NamedTuple):
    title: str
    caption: str
    svg: str


Chain = Sequence[StageRecord]
Bars = dict[str, tuple[float, Sequence[float] | None]]


def plots(chains: Sequence[Chain]) -> list[Plot]:
    """All plots that the runs have numbers for. Several chains share their axes, for comparison."""
    makers: list[Callable[[Sequence[Chain]], Plot | None]] = [
        *(lambda c, kind=kind: _loss(c, kind) for kind in _kinds(chains)),
        partial(_bits_per_byte, "Validation", lambda stage: stage.kind == "pretrain"),
        partial(_bits_per_byte, CONVERSATIONS, lambda stage: stage.kind != "pretrain"),
        _core,
        _chat,
        _reward,
        _pass_at_k,
        _throughput,
        _gradients,
    ]
    return [plot for plot in (make(chains) for make in makers) if plot is not None]


def _kinds(chains: Sequence[Chain]) -> list[str]:
    """Stages that have a loss worth a curve: not that of RL, which means nothing by itself."""
    found = dict.fromkeys(stage.kind for chain in chains for stage in chain)
    return [kind for kind in found if kind != "rl"]


# --- curves ---------------------------------------------------------------------------------------


class Curve(NamedTuple):
    label: str
    colour: int
    steps: Sequence[float]
    values: Sequence[float]
    dashes: str = "-"


def _curves(
    chains: Sequence[Chain],
    kind: str,
    key: str,
    of: Callable[[StageRecord], bool] = lambda stage: True,
) -> list[Curve]:
    """One per stage that has the number. Stages differ by colour; where several runs are compared,
    those do, and their stages differ by dashes."""
    found = []
    for i, j, stage, label in _stages(chains):
        steps, values = stage.series(kind, key)
        if of(stage) and len(values) > 1:
            colour = i if len(chains) > 1 else j
            dashes = DASHES[j % len(DASHES)] if len(chains) > 1 else "-"
            found.append(Curve(label, colour, steps, values, dashes))
    return found


def _stages(chains: Sequence[Chain]) -> Iterator[tuple[int, int, StageRecord, str]]:
    """Chain, place in it, stage and label; a stage that several chains share comes once."""
    seen = set()
    for i, chain in enumerate(chains):
        labels = titles(chain) if len(chains) == 1 else [stage.name for stage in chain]
        for j, (stage, label) in enumerate(zip(chain, labels, strict=True)):
            if stage.folder not in seen:
                yield i, j, stage, label
            seen.add(stage.folder)


def _loss(chains: Sequence[Chain], kind: str) -> Plot | None:
    raw = _curves(chains, "train", "loss", lambda stage: stage.kind == kind)
    smooth = _curves(chains, "train", "smoothed_loss", lambda stage: stage.kind == kind)
    if not smooth:
        return None
    figure, axes = _axes("step", "nats per token")
    for curve in raw:
        _draw(axes, curve, alpha=0.25, linewidth=1, linestyle="-", label=None)
    for curve in smooth:
        _draw(axes, curve, linestyle="-")
    for curve in _curves(chains, "val", "loss", lambda stage: stage.kind == kind):
        _draw(axes, curve, label=None, linestyle="", marker="o", markersize=4)
    # The first steps fall from far above and would flatten all else.
    lows = [min(curve.values) for curve in smooth]
    highs = [float(np.quantile(curve.values, 0.98)) for curve in smooth]
    axes.set_ylim(min(lows) - 0.08 * (max(highs) - min(lows)), max(highs))
    names = {"pretrain": "Pretraining", "midtrain": "Mid-training", "sft": "Fine-tuning"}
    caption = "Smoothed over the raw loss of every step; dots: validation."
    return _finish(figure, axes, f"{names.get(kind, kind)} loss", caption, len(smooth) > 1)


def _bits_per_byte(
    title: str, of: Callable[[StageRecord], bool], chains: Sequence[Chain]
) -> Plot | None:
    curves = _curves(chains, "val", "bpb", of)
    if not curves:
        return None
    figure, axes = _axes("step", "bits per byte")
    for curve in curves:
        _draw(axes, curve, marker="o", markersize=4)
    stages = (stage for chain in chains for stage in chain if of(stage))
    gzip = next((found for stage in stages if (found := stage.find("gzip_bpb"))), None)
    caption = "Of text that was never trained on; lower is better."
    if gzip is not None and gzip < 1.5 * max(max(curve.values) for curve in curves):
        axes.axhline(gzip, color=_INK, alpha=0.5, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            "gzip -9", (1, gzip), (0, 4), ("axes fraction", "data"), "offset points",
            ha="right", color=_INK, alpha=0.7,
        )  # fmt: skip
    return _finish(figure, axes, title, caption, len(curves) > 1)


def _reward(chains: Sequence[Chain]) -> Plot | None:
    return _simple(
        chains,
        "reward",
        "Reward",
        "mean reward",
        "Mean over the answers of each step.",
        of=lambda stage: stage.kind == "rl",
    )


def _throughput(chains: Sequence[Chain]) -> Plot | None:
    return _simple(
        chains,
        "tokens_per_s",
        "Throughput",
        "tokens per second",
        "Tokens trained on in a second; the first step, which compiles, left out.",
        from_zero=True,
        skip=1,
    )


def _gradients(chains: Sequence[Chain]) -> Plot | None:
    caption = "Global norm before clipping."
    return _simple(chains, "grad_norm", "Gradient norm", "norm", caption, skip=1)


def _simple(
    chains: Sequence[Chain],
    key: str,
    title: str,
    unit: str,
    caption: str,
    *,
    from_zero: bool = False,
    skip: int = 0,
    of: Callable[[StageRecord], bool] = lambda stage: True,
) -> Plot | None:
    curves = [
        curve._replace(steps=curve.steps[skip:], values=curve.values[skip:])
        for curve in _curves(chains, "train", key, of)
    ]
    if not curves:
        return None
    figure, axes = _axes("step", unit)
    for curve in curves:
        _draw(axes, curve)
    if from_zero:
        axes.set_ylim(0, 1.1 * max(float(np.quantile(curve.values, 0.99)) for curve in curves))
    return _finish(figure, axes, title, caption, len(curves) > 1)


def _pass_at_k(chains: Sequence[Chain]) -> Plot | None:
    """pass@k over the steps, one curve per k (of the last run, where several are compared)."""
    stages = [stage for chain in chains for stage in chain if stage.kind == "rl"]
    keys = [key for key in _pass_keys(stages) if stages[-1].series("val", key)[1]]
    if not keys:
        return None
    figure, axes = _axes("step", "share of questions")
    for index, key in enumerate(keys):
        _draw(axes, Curve(key, index, *stages[-1].series("val", key)), marker="o", markersize=4)
    axes.set_ylim(0, 1)
    caption = f"Held-out questions with a right answer among k samples ({stages[-1].name})."
    return _finish(figure, axes, "pass@k", caption, len(keys) > 1)


def _pass_keys(stages: Sequence[StageRecord]) -> list[str]:
    keys = {k for s in stages for r in s.metrics if r["kind"] == "val" for k in r if "pass@" in k}
    ordered = sorted(keys, key=lambda key: int(key.partition("@")[2]))
    return [key for key in ordered if int(key.partition("@")[2]) in (1, 2, 4, 8, 16)]


# --- bars -----------------------------------------------------------------------------------------


def _core(chains: Sequence[Chain]) -> Plot | None:
    tasks = [(stage, stage.find("core_tasks")) for _, _, stage, _ in _stages(chains)]
    found: list[tuple[str, Bars]] = [
        (stage.name, {name: (task["centred"], None) for name, task in of_stage.items()})
        for stage, of_stage in tasks
        if of_stage
    ]
    caption = "Accuracy above guessing, of what is there to win: 0 is chance, 1 is perfect."
    return _bars(found, "CORE, task by task", "centred accuracy", caption)


def _chat(chains: Sequence[Chain]) -> Plot | None:
    tasks = [(label, stage.find("chat_tasks")) for _, _, stage, label in _stages(chains)]
    found = [
        (label, {name: _accuracy(task) for name, task in of_stage.items()})
        for label, of_stage in tasks
        if of_stage
    ]
    caption = "Share of questions answered rightly, with the interval of 95 % confidence."
    return _bars(found, "Chat tasks", "accuracy", caption)


def _accuracy(task: Any) -> tuple[float, Sequence[float] | None]:
    if isinstance(task, dict):
        return task["accuracy"], task.get("accuracy_interval")
    return float(task), None


def _bars(groups: Sequence[tuple[str, Bars]], title: str, unit: str, caption: str) -> Plot | None:
    if not groups:
        return None
    names = list(dict.fromkeys(name for _, bars in groups for name in bars))
    figure, axes = _axes(unit, "", height=1.0 + len(names) * max(0.22, 0.12 * len(groups)))
    thick = 0.75 / len(groups)
    for index, (label, bars) in enumerate(groups):
        present = [(names.index(name), *bars[name]) for name in names if name in bars]
        places = [place + (index - (len(groups) - 1) / 2) * thick for place, _, _ in present]
        values = [value for _, value, _ in present]
        axes.barh(places, values, thick * 0.9, color=_COLOURS[index % SERIES], label=label)
        for place, (_, _, interval) in zip(places, present, strict=True):
            if interval:
                axes.plot(list(interval), [place, place], color=_INK, linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.axvline(0, color=_INK, linewidth=0.8)
    return _finish(figure, axes, title, caption, len(groups) > 1)


# --- drawing --------------------------------------------------------------------------------------


def _axes(x: str, y: str, height: float = _SIZE[1]) -> tuple[Figure, Axes]:
    with matplotlib.rc_context({"font.size": 10}):
        figure = Figure(figsize=(_SIZE[0], height), layout="constrained")
        axes = figure.add_subplot()
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_LINE)
    axes.tick_params(colors=_INK, length=0, pad=6)
    axes.grid(True, color=_LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel(x, color=_INK)
    axes.set_ylabel(y, color=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.margins(x=0.02)
    return figure, axes


def _draw(axes: Axes, curve: Curve, **style: Any) -> None:
    steps, values = _thinned(curve.steps, curve.values)
    style = {"label": curve.label, "linewidth": 2, "linestyle": curve.dashes, **style}
    axes.plot(steps, values, color=_COLOURS[curve.colour % SERIES], **style)


def _thinned(steps: Sequence[float], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """At most POINTS points, each the mean of its neighbours."""
    group = -(-len(values) // POINTS)
    starts = np.arange(0, len(values), group)
    counts = np.diff([*starts, len(values)])
    means = [np.add.reduceat(np.asarray(a, float), starts) / counts for a in (steps, values)]
    return means[0], means[1]


def _finish(figure: Figure, axes: Axes, title: str, caption: str, legend: bool) -> Plot:
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        if max(abs(low), abs(high)) >= 10_000:
            axis.set_major_formatter(EngFormatter(sep=""))
    if legend:
        style = {"frameon": False, "labelcolor": _INK, "handlelength": 1.2}
        figure.legend(loc="outside upper right", ncols=4, **style)  # where it covers nothing
    return Plot(title, caption, _svg(figure, title))


def _svg(figure: Figure, title: str) -> str:
    """The figure as an SVG element: text stays text, colours become the page's variables."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'^<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', svg)
    # Ids must differ between the figures of one page.
    mark = "".join(re.findall("[a-z0-9]", title.lower()))
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{mark}-", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    for name, colour in {"ink": _INK, "line": _LINE}.items():
        svg = svg.replace(colour, f"var(--{name})")
    for index, colour in enumerate(_COLOURS):
        svg = svg.replace(colour, f"var(--series-{index})")
    return svg
