"""What the runs of a sweep show together: numbers, tables, sentences."""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nanochat_jax.sweep.fits import (
    Budget,
    Parabola,
    PowerLaw,
    fit_optimum_laws,
    fit_parabola,
    fit_power_law,
    paired_test,
)
from nanochat_jax.sweep.grid import RunResult, finished, flops_name

OFF_BUDGET = 0.05  # what the FLOPs of a run may differ from its budget by


def results_csv(results: Sequence[RunResult]) -> str:
    """One line a run."""
    rows = [result.row for result in results]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


@dataclass(frozen=True)
class IsoFlop:
    """The best model and the best number of tokens of every budget, and how they grow."""

    budgets: dict[str, dict[float, Budget]]  # "params" and "tokens": by FLOPs
    minima: dict[str, dict[float, Parabola]]
    laws: dict[str, PowerLaw]  # params, tokens and bpb, as powers of the FLOPs
    notes: list[str]  # why something is missing

    def as_json(self) -> dict[str, Any]:
        minima = []
        for flops in sorted({flops for fits in self.minima.values() for flops in fits}):
            fits = {what: fits[flops] for what, fits in self.minima.items() if flops in fits}
            best = {what: fit.best for what, fit in fits.items()}
            minima.append({"flops": flops, **best, "bpb": min(fit.lowest for fit in fits.values())})
        laws = {name: asdict(law) for name, law in self.laws.items()}
        return {"minima": minima, "laws": laws, "notes": self.notes}


def fit_isoflop(results: Iterable[RunResult]) -> IsoFlop:
    """Parabolas for every budget and, from two of them on, power laws."""
    found = IsoFlop({}, {}, {}, [])
    done = finished(results)
    for result in done:  # runs of few steps cannot spend exactly what they should
        spent = result.values["flops"] / result.place["budget"] - 1
        if abs(spent) > OFF_BUDGET:
            found.notes.append(
                f"{result.run} is {spent:+.0%} off its budget, having only "
                f"{result.values['steps']} steps: a smaller total_batch_size comes closer"
            )
    for what in ("params", "tokens"):
        budgets, minima = found.budgets.setdefault(what, {}), found.minima.setdefault(what, {})
        for flops in sorted({result.place["budget"] for result in done}):
            runs = [result.values for result in done if result.place["budget"] == flops]
            points = sorted((run[what], run["bpb"]) for run in runs)
            budgets[flops] = Budget(flops, [x for x, _ in points], [bpb for _, bpb in points])
            try:
                minima[flops] = fit_parabola(budgets[flops])
            except ValueError as error:
                found.notes.append(f"no best {what} for {flops_name(flops)} FLOPs: {error}")
        if len(minima) > 1:
            law, losses = fit_optimum_laws([budgets[flops] for flops in minima])
            found.laws[what] = law
            found.laws.setdefault("bpb", losses)
    return found


def fit_miniseries(results: Iterable[RunResult]) -> dict[str, Any]:
    """Bits per byte as a power of the FLOPs; no law where fewer than two runs finished."""
    done = [result.values for result in finished(results)]
    if len(done) < 2:
        return {"laws": {}, "notes": [f"a power law needs 2 finished runs, here are {len(done)}"]}
    law = fit_power_law([run["flops"] for run in done], [run["bpb"] for run in done])
    return {"laws": {"bpb": asdict(law)}, "notes": []}


def compare_seeds(results: Iterable[RunResult]) -> dict[str, Any]:
    """b against a over the seeds that finished in both; in bits per byte, lower is better."""
    of: dict[str, dict[int, float]] = {"a": {}, "b": {}}
    for result in finished(results):
        of[result.place["variant"]][result.place["seed"]] = result.values["bpb"]
    seeds = [seed for seed in of["a"] if seed in of["b"]]
    try:
        test = paired_test(*([of[variant][seed] for seed in seeds] for variant in "ab"))
    except ValueError as error:
        return {"notes": [str(error)]}
    return {"seeds": seeds, "b_minus_a": asdict(test), "notes": []}


def table(results: Sequence[RunResult]) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row for every run."""
    formats = {"params": ",", "tokens": ",", "flops": ".3g", "bpb": ".6f", "seconds": ",.1f"}
    rows = [
        [
            result.run,
            *(f"{result.values[k]:{f}}" if result.values else "–" for k, f in formats.items()),
            result.status,
        ]
        for result in results
    ]
    return ["run", "scaling parameters", "tokens", "FLOPs", "bits per byte", "seconds", ""], rows


def sentences(found: dict[str, Any]) -> Iterator[str]:
    """What the fits or the test found, line by line."""
    for minimum in found.get("minima", []):
        best = [f"{minimum[what]:,.0f} {what}" for what in ("params", "tokens") if what in minimum]
        bpb = f"{minimum['bpb']:.6f} bits per byte"
        yield f"{flops_name(minimum['flops'])} FLOPs: best with {', '.join(best)}; {bpb}"
    for name, law in found.get("laws", {}).items():
        of = law["interval"]
        within = (
            f"[{of[0]:.3f}, {of[1]:.3f}]" if of else "(no interval: too few runs, or too noisy)"
        )
        yield f"{name} = {law['coefficient']:.4g} × FLOPs^{law['exponent']:.3f} {within}"
    if test := found.get("b_minus_a"):
        mean, pairs, (low, high) = test["mean"], test["pairs"], test["interval"]
        yield f"b − a: {mean:+.6f} bits per byte [{low:+.6f}, {high:+.6f}], {pairs} pairs"
        yield (
            f"p = {test['p_t']:.3g} (paired t), {test['p_permutation']:.3g} (permutations; with "
            f"{pairs} pairs it cannot be below {test['smallest_p']:.3g})"
        )
    for note in found["notes"]:
        yield f"note: {note}"
