"""The plots of a report as SVG, and the style that they share with those of a sweep."""

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("agg")
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from nanochat_jax.report.chain import MetricValue, StageRecord, chat_tasks, titles

POINTS = 600  # of a curve; longer ones are averaged down to these
DASHES = ("-", "--", ":", "-.")
COLOURS = ("#1f7a6c", "#c2571a", "#3d5fb3", "#a03a78", "#7d7a14", "#5a4a9c", "#a83232", "#4f6470")
INK = "#25231f"
LINE = INK + "22"  # translucent: visible on a light page, and inverted on a dark one
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "font.size": 10,
    "text.color": INK,
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
    "axes.facecolor": "none",
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.prop_cycle": f"cycler(color={COLOURS})",  # "C0", "C1", …
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.xmargin": 0.02,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.handlelength": 1.2,
    "lines.linewidth": 2,
    "lines.markersize": 4,
    **{f"{axis}tick.{key}": INK for axis in "xy" for key in ("color", "labelcolor")},
    **{f"{axis}tick.{key}": 0 for axis in "xy" for key in ("major.size", "minor.size")},
}
_SIZE = (6.2, 3.1)  # inches; the page scales it
_LOSS_TITLES = {"pretrain": "Pretraining", "midtrain": "Mid-training", "sft": "Fine-tuning"}

Chain = Sequence[StageRecord]
Chains = Sequence[Chain]
Bars = dict[str, MetricValue]


class Plot(NamedTuple):
    title: str
    caption: str
    svg: str


@matplotlib.rc_context(STYLE)
def plots(chains: Chains) -> list[Plot]:
    """All plots that the runs have numbers for. Several chains share their axes, for comparison."""
    kinds = dict.fromkeys(stage.kind for chain in chains for stage in chain)
    made = [
        # Not RL's: its loss means nothing by itself.
        *(_loss(chains, kind) for kind in kinds if kind != "rl"),
        _bits_per_byte(chains, "Validation", on_text=True),
        _bits_per_byte(chains, "Validation on conversations", on_text=False),
        _core(chains),
        _chat(chains),
        _training(chains, "reward", "Reward", "mean reward", "Mean over the answers of each step."),
        _pass_at_k(chains),
        _training(
            chains,
            "tokens_per_s",
            "Throughput",
            "tokens per second",
            "Tokens trained on in a second; the first step, which compiles, left out.",
            skip=1,
            from_zero=True,
        ),
        _training(
            chains, "grad_norm", "Gradient norm", "norm", "Global norm before clipping.", skip=1
        ),
    ]
    return [plot for plot in made if plot is not None]


# --- curves ---------------------------------------------------------------------------------------


class Curve(NamedTuple):
    label: str
    colour: str
    dashes: str
    steps: Sequence[float]
    values: Sequence[float]


def _curves(
    chains: Chains,
    kind: str,
    key: str,
    of: Callable[[StageRecord], bool] = lambda stage: True,
    skip: int = 0,
) -> list[Curve]:
    """One per stage that has the number. Stages differ by colour; where several runs are compared,
    those do, and their stages differ by dashes."""
    found = []
    for i, j, stage, label in _stages(chains):
        steps, values = stage.series(kind, key)
        if of(stage) and len(values) > 1:
            colour, dashes = (i, DASHES[j % len(DASHES)]) if len(chains) > 1 else (j, "-")
            found.append(Curve(label, f"C{colour}", dashes, steps[skip:], values[skip:]))
    return found


def _stages(chains: Chains) -> Iterator[tuple[int, int, StageRecord, str]]:
    """Chain, place in it, stage and label; a stage that several chains share comes once."""
    seen = set()
    for i, chain in enumerate(chains):
        labels = titles(chain) if len(chains) == 1 else [stage.name for stage in chain]
        for j, (stage, label) in enumerate(zip(chain, labels, strict=True)):
            if stage.folder not in seen:
                yield i, j, stage, label
            seen.add(stage.folder)


def _loss(chains: Chains, kind: str) -> Plot | None:
    raw, smooth, validation = (
        _curves(chains, split, key, lambda stage: stage.kind == kind)
        for split, key in (("train", "loss"), ("train", "smoothed_loss"), ("val", "loss"))
    )
    if not smooth:
        return None
    figure, axes = _axes("step", "nats per token")
    for curve in raw:
        _draw(axes, curve, alpha=0.25, linewidth=1, linestyle="-", label=None)
    for curve in smooth:
        _draw(axes, curve, linestyle="-")
    for curve in validation:
        _draw(axes, curve, label=None, linestyle="", marker="o")
    # The first steps fall from far above and would flatten all else.
    lows = [min(curve.values) for curve in smooth]
    highs = [float(np.quantile(curve.values, 0.98)) for curve in smooth]
    axes.set_ylim(min(lows) - 0.08 * (max(highs) - min(lows)), max(highs))
    caption = "Smoothed over the raw loss of every step; dots: validation."
    title = f"{_LOSS_TITLES.get(kind, kind)} loss"
    return _finish(figure, axes, title, caption, legend=len(smooth) > 1)


def _bits_per_byte(chains: Chains, title: str, on_text: bool) -> Plot | None:
    stages = [s for chain in chains for s in chain if (s.kind == "pretrain") == on_text]
    curves = _curves(chains, "val", "bpb", lambda stage: stage in stages)
    if not curves:
        return None
    figure, axes = _axes("step", "bits per byte")
    for curve in curves:
        _draw(axes, curve, marker="o")
    gzip = next((found for stage in stages if (found := stage.find("gzip_bpb"))), None)
    if gzip is not None and gzip < 1.5 * max(max(curve.values) for curve in curves):
        axes.axhline(gzip, color=INK, alpha=0.5, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            "gzip -9", (1, gzip), (0, 4), ("axes fraction", "data"), "offset points",
            ha="right", alpha=0.7,
        )  # fmt: skip
    caption = "Of text that was never trained on; lower is better."
    return _finish(figure, axes, title, caption, legend=len(curves) > 1)


def _training(
    chains: Chains,
    key: str,
    title: str,
    unit: str,
    caption: str,
    skip: int = 0,
    from_zero: bool = False,
) -> Plot | None:
    """A number of every training step, the first `skip` left out."""
    curves = _curves(chains, "train", key, skip=skip)
    if not curves:
        return None
    figure, axes = _axes("step", unit)
    for curve in curves:
        _draw(axes, curve)
    if from_zero:
        axes.set_ylim(0, 1.1 * max(float(np.quantile(curve.values, 0.99)) for curve in curves))
    return _finish(figure, axes, title, caption, legend=len(curves) > 1)


def _pass_at_k(chains: Chains) -> Plot | None:
    """pass@k over the steps, one curve per k (of the last run, where several are compared)."""
    stages = [stage for chain in chains for stage in chain if stage.kind == "rl"]
    if not stages:
        return None
    curves = [
        Curve(f"pass@{k}", f"C{index}", "-", *stages[-1].series("val", f"pass@{k}"))
        for index, k in enumerate((1, 2, 4, 8, 16))
    ]
    curves = [curve for curve in curves if curve.values]
    if not curves:
        return None
    figure, axes = _axes("step", "share of questions")
    for curve in curves:
        _draw(axes, curve, marker="o")
    axes.set_ylim(0, 1)
    caption = f"Held-out questions with a right answer among k samples ({stages[-1].name})."
    return _finish(figure, axes, "pass@k", caption, legend=len(curves) > 1)


def _draw(axes: Axes, curve: Curve, **style: Any) -> None:
    """At most POINTS points, each the mean of its neighbours."""
    group = -(-len(curve.values) // POINTS)
    starts = np.arange(0, len(curve.values), group)
    counts = np.diff([*starts, len(curve.values)])
    steps, values = (
        np.add.reduceat(np.asarray(numbers, float), starts) / counts
        for numbers in (curve.steps, curve.values)
    )
    style = {"label": curve.label, "linestyle": curve.dashes, **style}
    axes.plot(steps, values, color=curve.colour, **style)


# --- bars -----------------------------------------------------------------------------------------


def _core(chains: Chains) -> Plot | None:
    tasks = [(stage, stage.find("core_tasks")) for _, _, stage, _ in _stages(chains)]
    found = [
        (stage.name, {name: MetricValue(task["centred"]) for name, task in of_stage.items()})
        for stage, of_stage in tasks
        if of_stage
    ]
    caption = "Accuracy above guessing: 0 is chance, 1 is perfect."
    return _bars(found, "CORE, task by task", "centred accuracy", caption)


def _chat(chains: Chains) -> Plot | None:
    found = [
        (label, tasks) for _, _, stage, label in _stages(chains) if (tasks := chat_tasks(stage))
    ]
    caption = "Share of questions answered correctly, with its 95 % confidence interval."
    return _bars(found, "Chat tasks", "accuracy", caption)


def _bars(groups: Sequence[tuple[str, Bars]], title: str, unit: str, caption: str) -> Plot | None:
    if not groups:
        return None
    names = list(dict.fromkeys(name for _, bars in groups for name in bars))
    figure, axes = _axes(unit, "", height=1.0 + len(names) * max(0.22, 0.12 * len(groups)))
    thick = 0.75 / len(groups)
    for index, (label, bars) in enumerate(groups):
        offset = (index - (len(groups) - 1) / 2) * thick
        places = [names.index(name) + offset for name in bars]
        values = [metric.value for metric in bars.values()]
        axes.barh(places, values, thick * 0.9, color=f"C{index}", label=label)
        for place, metric in zip(places, bars.values(), strict=True):
            if metric.interval:
                axes.plot(metric.interval, (place, place), color=INK, linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.axvline(0, color=INK, linewidth=0.8)
    return _finish(figure, axes, title, caption, legend=len(groups) > 1)


# --- figures --------------------------------------------------------------------------------------


def _axes(x: str, y: str, height: float = _SIZE[1]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_SIZE[0], height))
    axes = figure.add_subplot(xlabel=x, ylabel=y)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    return figure, axes


def _finish(figure: Figure, axes: Axes, title: str, caption: str, legend: bool) -> Plot:
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        if max(abs(low), abs(high)) >= 10_000:
            axis.set_major_formatter(EngFormatter(sep=""))
    if legend:
        figure.legend(loc="outside upper right", ncols=4)  # where it covers nothing
    return Plot(title, caption, to_svg(figure, title))


def to_svg(figure: Figure, salt: str) -> str:
    """The figure as an SVG file, the same every time; `salt` keeps its ids apart from others'."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
