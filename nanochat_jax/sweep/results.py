"""What became of the runs of a sweep, and what they say together: numbers, tables, sentences."""

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


# --- what they say together -----------------------------------------------------------------------


@dataclass(frozen=True)
class IsoFlop:
    """The best model and the best number of tokens of every budget, and how they grow."""

    budgets: dict[str, dict[float, Budget]]  # "params" and "tokens": by FLOPs
    minima: dict[str, dict[float, Parabola]]
    laws: dict[str, PowerLaw]  # params, tokens and bpb, as powers of the FLOPs
    notes: list[str]  # why something is missing

    def as_json(self) -> dict[str, Any]:
        return {
            "minima": [
                {
                    "flops": flops,
                    **{what: fit.best for what, fit in fits.items()},
                    "bpb": min(fit.lowest for fit in fits.values()),
                }
                for flops, fits in self._by_budget().items()
            ],
            "laws": {name: asdict(law) for name, law in self.laws.items()},
            "notes": self.notes,
        }

    def _by_budget(self) -> dict[float, dict[str, Parabola]]:
        flops = sorted({flops for fits in self.minima.values() for flops in fits})
        return {f: {w: fits[f] for w, fits in self.minima.items() if f in fits} for f in flops}


def fit_isoflop(results: Iterable[RunResult]) -> IsoFlop:
    """Parabolas for every budget and, from two of them on, power laws."""
    found = IsoFlop({}, {}, {}, [])
    done = finished(results)
    found.notes.extend(_off_budget(done))
    for what in ("params", "tokens"):
        budgets = {flops: _budget(done, flops, what) for flops in _budgets(done)}
        found.budgets[what], found.minima[what] = budgets, {}
        for flops, budget in budgets.items():
            try:
                found.minima[what][flops] = fit_parabola(budget)
            except ValueError as error:
                found.notes.append(f"no best {what} for {flops_name(flops)} FLOPs: {error}")
        if len(found.minima[what]) > 1:
            law, losses = fit_optimum_laws([budgets[flops] for flops in found.minima[what]])
            found.laws[what] = law
            found.laws.setdefault("bpb", losses)
    return found


def _off_budget(results: Sequence[RunResult]) -> Iterator[str]:
    """Runs of few steps cannot spend exactly what they should."""
    for result in results:
        spent = result.values["flops"] / result.place["budget"] - 1
        if abs(spent) > OFF_BUDGET:
            yield (
                f"{result.run} is {spent:+.0%} off its budget, having only "
                f"{result.values['steps']} steps: a smaller total_batch_size comes closer"
            )


def _budgets(results: Sequence[RunResult]) -> list[float]:
    return sorted({result.place["budget"] for result in results})


def _budget(results: Sequence[RunResult], flops: float, what: str) -> Budget:
    values = [result.values for result in results if result.place["budget"] == flops]
    of = sorted((value[what], value["bpb"]) for value in values)
    return Budget(flops, [x for x, _ in of], [bpb for _, bpb in of])


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


# --- in words -------------------------------------------------------------------------------------


def table(results: Sequence[RunResult]) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row for every run."""
    formats = {"params": ",", "tokens": ",", "flops": ".3g", "bpb": ".6f", "seconds": ",.1f"}
    rows = [
        [r.run, *(_cell(r.values.get(key), form) for key, form in formats.items()), r.status]
        for r in results
    ]
    return ["run", "scaling parameters", "tokens", "FLOPs", "bits per byte", "seconds", ""], rows


def _cell(value: Any, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def sentences(found: dict[str, Any]) -> list[str]:
    """What the fits or the test found, line by line."""
    lines = [_minimum_line(minimum) for minimum in found.get("minima", [])]
    lines += [_law_line(name, law) for name, law in found.get("laws", {}).items()]
    if test := found.get("b_minus_a"):
        lines += _test_lines(test)
    return lines + [f"note: {note}" for note in found["notes"]]


def _minimum_line(minimum: dict[str, float]) -> str:
    best = [f"{minimum[what]:,.0f} {what}" for what in ("params", "tokens") if what in minimum]
    bpb = f"{minimum['bpb']:.6f} bits per byte"
    return f"{flops_name(minimum['flops'])} FLOPs: best with {', '.join(best)}; {bpb}"


def _law_line(name: str, law: dict[str, Any]) -> str:
    of = law["interval"]
    within = f" [{of[0]:.3f}, {of[1]:.3f}]" if of else " (no interval: too few runs, or too noisy)"
    return f"{name} = {law['coefficient']:.4g} × FLOPs^{law['exponent']:.3f}{within}"


def _test_lines(test: dict[str, Any]) -> list[str]:
    low, high = test["interval"]
    return [
        f"b − a: {test['mean']:+.6f} bits per byte [{low:+.6f}, {high:+.6f}], "
        f"{test['pairs']} pairs",
        f"p = {test['p_t']:.3g} (paired t), {test['p_permutation']:.3g} (permutations; with "
        f"{test['pairs']} pairs it cannot be below {test['smallest_p']:.3g})",
    ]
