"""The plots of a sweep: SVG files, in the style of a report's."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterSciNotation, NullFormatter

from nanochat_jax.report.plots import INK, STYLE, to_svg
from nanochat_jax.sweep.fits import PowerLaw
from nanochat_jax.sweep.grid import RunResult, finished, flops_name
from nanochat_jax.sweep.results import IsoFlop

GROUND = "#fbfaf7"  # of the figure: these files stand by themselves
NAMES = {"params": "scaling parameters", "tokens": "training tokens"}


@matplotlib.rc_context(STYLE)
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
            colour = f"C{index}"
            axes.plot(budget.x, budget.losses, "o", color=colour, label=flops_name(flops))
            if parabola := fits.minima[what].get(flops):
                x = np.geomspace(min(budget.x), max(budget.x), 100)
                axes.plot(x, parabola(x), color=colour)
                axes.plot(parabola.best, parabola.lowest, "*", color=colour, markersize=14)
        _label(axes, NAMES[what], "bits per byte")
    if any(fits.budgets.values()):
        panels[0].legend(title="FLOPs")
    return _svg(figure, "What a budget is best spent on", "stars: the fitted minima")


def _optimum(fits: IsoFlop) -> str:
    figure, panels = _figure(2)
    for axes, (what, minima) in zip(panels, fits.minima.items(), strict=True):
        axes.plot(list(minima), [fit.best for fit in minima.values()], "*", markersize=14)
        if law := fits.laws.get(what):
            _draw_law(axes, law, list(minima))
        _label(axes, "FLOPs", f"best {NAMES[what]}", log_y=True)
    return _svg(figure, "The best size, budget by budget")


@matplotlib.rc_context(STYLE)
def compute_plot(results: Sequence[RunResult], law: PowerLaw | None) -> str:
    """Loss against compute, all finished runs; the law is that of the best or of all."""
    figure, (axes,) = _figure(1)
    done = [result.values for result in finished(results)]
    for depth in sorted({run["depth"] for run in done}):
        points = sorted((run["flops"], run["bpb"]) for run in done if run["depth"] == depth)
        axes.plot(*zip(*points, strict=True), "o-", label=f"d{depth}", linewidth=1)
    if law:
        _draw_law(axes, law, [run["flops"] for run in done])
    if done:
        axes.legend()
    _label(axes, "FLOPs", "bits per byte")
    return _svg(figure, "Loss against compute")


@matplotlib.rc_context(STYLE)
def seeds_plot(results: Sequence[RunResult]) -> str:
    """A line from a to b for every seed."""
    figure, (axes,) = _figure(1)
    done = finished(results)
    for seed in dict.fromkeys(r.place["seed"] for r in done):
        of = {r.place["variant"]: r.values["bpb"] for r in done if r.place["seed"] == seed}
        x = ["ab".index(variant) for variant in sorted(of)]
        axes.plot(x, [of[variant] for variant in sorted(of)], "o-", label=f"seed {seed}")
    axes.set_xlim(-0.3, 1.3)
    axes.set_xticks([0, 1], ["a", "b"])
    axes.set_ylabel("bits per byte")
    if done:
        axes.legend()
    return _svg(figure, "Two variants, seed by seed")


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(3 + 3.6 * panels, 4), facecolor=GROUND)
    return figure, [figure.add_subplot(1, panels, index + 1) for index in range(panels)]


def _label(axes: Axes, x: str, y: str, log_y: bool = False) -> None:
    axes.set(xlabel=x, ylabel=y, xscale="log", yscale="log" if log_y else "linear")
    for axis in (axes.xaxis, axes.yaxis) if log_y else (axes.xaxis,):
        low, high = sorted(axis.get_view_interval())
        # Within one decade there may be no power of ten to label: then some others.
        some = LogFormatterSciNotation(minor_thresholds=(2, 0.5))
        axis.set_major_formatter(LogFormatterSciNotation())
        axis.set_minor_formatter(NullFormatter() if high / low > 30 else some)


def _draw_law(axes: Axes, law: PowerLaw, x: Sequence[float]) -> None:
    line = np.geomspace(min(x), max(x), 100)
    axes.plot(line, law(line), "--", color=INK, label=f"∝ C^{law.exponent:.3f}")
    axes.legend()


def _svg(figure: Figure, title: str, subtitle: str = "") -> str:
    figure.suptitle(f"{title}\n{subtitle}".strip(), fontsize=11)
    return to_svg(figure, title)
