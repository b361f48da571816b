"""The pictures of a sweep: SVG files that stand by themselves, on a light ground."""

import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterSciNotation, NullFormatter

from nanochat_jax.sweep.fits import PowerLaw
from nanochat_jax.sweep.grid import RunResult, finished, flops_name
from nanochat_jax.sweep.results import IsoFlop

COLOURS = ("#1f7a6c", "#c2571a", "#3d5fb3", "#a03a78", "#7d7a14", "#5a4a9c", "#a83232", "#4f6470")
INK, LINE, GROUND = "#25231f", "#e2ddd2", "#fbfaf7"
NAMES = {"params": "scaling parameters", "tokens": "training tokens"}


def isoflop_plots(fits: IsoFlop, results: Sequence[RunResult]) -> dict[str, str]:
    """isoflop: loss over size for every budget; optimum: the best size over the budget; compute."""
    made = {
        "isoflop": _isoflop_curves(fits),
        "compute": compute_plot(results, fits.laws.get("bpb")),
    }
    return made | ({"optimum": _optimum(fits)} if any(fits.minima.values()) else {})


def _isoflop_curves(fits: IsoFlop) -> str:
    figure, panels = _figure(2)
    for axes, (what, budgets) in zip(panels, fits.budgets.items(), strict=True):
        for index, (flops, budget) in enumerate(budgets.items()):
            colour = COLOURS[index % len(COLOURS)]
            axes.plot(budget.x, budget.losses, "o", color=colour, label=flops_name(flops))
            if parabola := fits.minima[what].get(flops):
                x = np.geomspace(min(budget.x), max(budget.x), 100)
                axes.plot(x, parabola(x), color=colour)
                axes.plot(parabola.best, parabola.lowest, "*", color=colour, markersize=14)
        _label(axes, NAMES[what], "bits per byte")
    _legend(panels[0], "FLOPs")
    return _svg(figure, "What a budget is best spent on", "stars: the fitted minima")


def _optimum(fits: IsoFlop) -> str:
    figure, panels = _figure(2)
    for axes, (what, minima) in zip(panels, fits.minima.items(), strict=True):
        axes.plot(
            list(minima),
            [fit.best for fit in minima.values()],
            "*",
            color=COLOURS[0],
            markersize=14,
        )
        if law := fits.laws.get(what):
            _draw_law(axes, law, list(minima))
        _label(axes, "FLOPs", f"best {NAMES[what]}", log_y=True)
    return _svg(figure, "The best size, budget by budget", "")


def compute_plot(results: Sequence[RunResult], law: PowerLaw | None) -> str:
    """Loss against compute, all finished runs; the law is that of the best or of all."""
    figure, (axes,) = _figure(1)
    done = [result.values for result in finished(results)]
    for index, depth in enumerate(sorted({run["depth"] for run in done})):
        points = sorted((run["flops"], run["bpb"]) for run in done if run["depth"] == depth)
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(*zip(*points, strict=True), "o-", color=colour, label=f"d{depth}", linewidth=1)
    if law:
        _draw_law(axes, law, [run["flops"] for run in done])
    _legend(axes)
    _label(axes, "FLOPs", "bits per byte")
    return _svg(figure, "Loss against compute", "")


def seeds_plot(results: Sequence[RunResult]) -> str:
    """A line from a to b for every seed."""
    figure, (axes,) = _figure(1)
    done = finished(results)
    for index, seed in enumerate(dict.fromkeys(r.place["seed"] for r in done)):
        pair = sorted(
            (r.place["variant"], r.values["bpb"]) for r in done if r.place["seed"] == seed
        )
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(
            ["ab".index(variant) for variant, _ in pair], [bpb for _, bpb in pair], "o-",
            color=colour, label=f"seed {seed}",
        )  # fmt: skip
    axes.set_xlim(-0.3, 1.3)
    axes.set_xticks([0, 1], ["a", "b"])
    axes.set_ylabel("bits per byte")
    _legend(axes)
    return _svg(figure, "Two variants, seed by seed", "")


# --- drawing --------------------------------------------------------------------------------------


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(3 + 3.6 * panels, 4), layout="constrained", facecolor=GROUND)
    made = [figure.add_subplot(1, panels, index + 1) for index in range(panels)]
    for axes in made:
        axes.set_facecolor(GROUND)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color=LINE)
        axes.set_axisbelow(True)
    return figure, made


def _label(axes: Axes, x: str, y: str, log_y: bool = False) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        if name == "x" or log_y:
            getattr(axes, f"set_{name}scale")("log")
            low, high = sorted(axis.get_view_interval())
            # Within one decade there may be no power of ten to label: then some others.
            axis.set_major_formatter(LogFormatterSciNotation())
            crowded = high / low > 30
            minor = (
                NullFormatter() if crowded else LogFormatterSciNotation(minor_thresholds=(2, 0.5))
            )
            axis.set_minor_formatter(minor)


def _draw_law(axes: Axes, law: PowerLaw, x: Sequence[float]) -> None:
    line = np.geomspace(min(x), max(x), 100)
    axes.plot(line, law(line), "--", color=INK, label=f"∝ C^{law.exponent:.3f}")
    _legend(axes)


def _legend(axes: Axes, title: str | None = None) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(title=title, frameon=False)


def _svg(figure: Figure, title: str, subtitle: str) -> str:
    figure.suptitle(f"{title}\n{subtitle}".strip(), fontsize=11)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
