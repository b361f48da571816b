"""Experiments: fits that find known laws, tests that give known p, and toy sweeps end to end."""

import csv
import json
import math
import re
import runpy
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from script_runs import ROOT, Script, finish, n_train_records, wait_for

from nanochat_jax.config import parse
from nanochat_jax.runs import seal
from nanochat_jax.stages.settings import PretrainConfig
from nanochat_jax.sweep.fits import (
    Budget,
    fit_optimum_laws,
    fit_parabola,
    fit_power_law,
    paired_test,
)
from nanochat_jax.sweep.grid import (
    Run,
    RunResult,
    flops_name,
    is_finished,
    isoflop_grid,
    miniseries_grid,
    numbers,
    read_run,
    seeds_grid,
)
from nanochat_jax.sweep.plots import isoflop_plots
from nanochat_jax.sweep.results import compare_seeds, fit_isoflop, results_csv

# --- fits of laws that are known ------------------------------------------------------------------

SIZES = np.array([0.3, 0.5, 0.8, 1.5, 3.2])  # of the best
BUDGETS = (1e15, 3e15, 1e16, 3e16)


def made(exponent: float, noise: float = 0.0, seed: int = 0, curvature: float = 0.1):
    """Runs of a world where the best size is 2·C^exponent and the lowest loss 40·C^−0.1."""
    rng = np.random.default_rng(seed)
    return [
        Budget(
            flops,
            list(2 * flops**exponent * SIZES),
            list(
                40 * flops**-0.1
                + curvature * np.log(SIZES) ** 2
                + noise * rng.standard_normal(len(SIZES))
            ),
        )
        for flops in BUDGETS
    ]


@given(
    best=st.floats(1e3, 1e12),
    lowest=st.floats(0.1, 10),
    curvature=st.floats(1e-3, 10),
    sizes=st.lists(st.floats(0.1, 10), min_size=3, max_size=8, unique=True),
)
def test_a_parabola_is_found_again(best, lowest, curvature, sizes):
    logs = np.sort(np.log(sizes))
    assume(logs[0] < -0.1 and logs[-1] > 0.1 and np.diff(logs).min() > 0.05)
    losses = lowest + curvature * np.log(sizes) ** 2
    fit = fit_parabola(Budget(1e15, list(best * np.array(sizes)), list(losses)))
    assert fit.best == pytest.approx(best, rel=1e-6)
    assert fit.lowest == pytest.approx(lowest, rel=1e-6)
    assert fit(best * np.array(sizes)) == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize(
    ("sizes", "losses", "why"),
    [
        ([1e6, 2e6], [1.0, 0.9], "needs 3 sizes, here are 2"),
        ([1e6, 1e6, 2e6], [1.0, 1.1, 0.9], "needs 3 sizes, here are 2"),
        ([1e6, 2e6, 4e6], [1.0, 1.1, 1.0], "do not curve upwards"),
        ([1e6, 2e6, 4e6], [1.0, 0.8, 0.7], "add larger ones"),
        ([1e6, 2e6, 4e6], [0.7, 0.8, 1.0], "add smaller ones"),
    ],
)
def test_no_minimum_is_made_up(sizes, losses, why):
    with pytest.raises(ValueError, match=why):
        fit_parabola(Budget(1e15, sizes, losses))


@given(exponent=st.floats(0.2, 0.8))
@settings(max_examples=20, deadline=None)
def test_exponents_of_the_optimum_are_found_again(exponent):
    size, loss = fit_optimum_laws(made(exponent))
    assert size.exponent == pytest.approx(exponent, abs=1e-6)
    assert size.coefficient == pytest.approx(2, rel=1e-4)
    assert loss.exponent == pytest.approx(-0.1, abs=1e-6)
    assert size(1e20) == pytest.approx(2 * 1e20**exponent, rel=1e-4)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    intervals = [fit_optimum_laws(made(0.5, 0.004, seed))[0].interval for seed in range(100)]
    assert all(interval is not None for interval in intervals)
    hits = sum(low <= 0.5 <= high for low, high in intervals)
    assert 85 <= hits <= 100  # of 95 expected


def test_an_interval_grows_with_the_noise_and_is_refused_where_it_means_nothing():
    def width(noise):
        low, high = fit_optimum_laws(made(0.5, noise))[0].interval
        return high - low

    assert width(0.001) < width(0.004) / 2
    three = [
        Budget(b.flops, b.x[::2], list(np.array(b.losses[::2]) + 0.001))
        for b in made(0.5, 0.001, curvature=0.2)
    ]
    assert fit_optimum_laws(three)[0].interval is None  # three runs leave no residuals


@given(exponent=st.floats(-1, 1), coefficient=st.floats(0.01, 100))
@settings(deadline=None)
def test_a_power_law_is_found_again(exponent, coefficient):
    x = np.array([1e15, 4e15, 9e16, 2e17])
    law = fit_power_law(x, coefficient * x**exponent)
    assert law.exponent == pytest.approx(exponent, abs=1e-9)
    assert law.coefficient == pytest.approx(coefficient, rel=1e-6)
    low, high = law.interval
    assert low == pytest.approx(exponent, abs=1e-9)
    assert high == pytest.approx(exponent, abs=1e-9)
    assert fit_power_law(x[:2], x[:2]).interval is None


# --- paired tests ---------------------------------------------------------------------------------


def test_students_own_example():
    """Sleep after two drugs (Student, 1908): t = 4.0621 with 9 degrees of freedom, p = 0.002833."""
    a = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    b = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    test = paired_test(a, b)
    assert (test.pairs, test.mean) == (10, pytest.approx(1.58))
    assert test.t == pytest.approx(4.0621, abs=1e-4)
    assert test.p_t == pytest.approx(0.002833, abs=1e-6)
    assert test.interval == pytest.approx((0.7001142, 2.4598858), abs=1e-6)
    # Nine differences above 0 and one that is 0: only the two signs of all of them reach the sum.
    assert test.p_permutation == 4 / 2**10


def test_darwins_plants():
    """Zea mays, crossed and selfed (Fisher, 1935): 1,726 of 32,768 signs, and t = 2.148."""
    differences = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
    test = paired_test([0] * 15, differences)
    assert test.t == pytest.approx(2.148, abs=1e-3)
    assert test.p_t == pytest.approx(0.0497, abs=1e-4)
    assert test.p_permutation == 1726 / 32768


def test_three_seeds_cannot_prove_much_and_the_test_says_so():
    test = paired_test([1.0, 1.1, 1.2], [0.9, 1.01, 1.08])
    assert test.p_permutation == test.smallest_p == 0.25
    with pytest.raises(ValueError, match="needs 2 seeds"):
        paired_test([1.0], [2.0])


def test_no_difference_and_the_same_difference_everywhere():
    same = paired_test([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (same.mean, same.t, same.p_t, same.p_permutation) == (0, None, 1, 1)
    shifted = paired_test([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert (shifted.t, shifted.p_t, shifted.p_permutation) == (None, 0, 0.25)


@given(st.lists(st.floats(-1, 1), min_size=17, max_size=40), st.floats(0, 2))
@settings(max_examples=15, deadline=None)
def test_many_seeds_are_sampled_and_order_does_not_matter(noise, shift):
    a, b = np.zeros(len(noise)), np.array(noise) + shift
    forward, backward = paired_test(a, b), paired_test(b, a)
    assert forward.p_permutation == backward.p_permutation
    assert 0 < forward.p_permutation <= 1
    if forward.t is not None:
        assert forward.t == pytest.approx(-backward.t)


# --- grids and what they find ---------------------------------------------------------------------


def test_grids_set_what_they_vary_and_nothing_else(tmp_path):
    base = PretrainConfig(run="cpu", num_iterations=7, matrix_lr=0.1, seed=5)
    runs = isoflop_grid(base, [3e15, 1e15], [4, 2], tmp_path)
    assert [run.name for run in runs] == ["1e15-d2", "1e15-d4", "3e15-d2", "3e15-d4"]
    assert runs[1].config == replace(
        base, run=str(tmp_path / "1e15-d4"), depth=4, target_flops=1e15, num_iterations=None
    )
    (run,) = miniseries_grid(replace(base, target_flops=1e9), [6], tmp_path)
    assert (run.config.depth, run.config.target_flops, run.config.num_iterations) == (6, None, None)
    pairs = seeds_grid(base, replace(base, depth=3), [1, 2], tmp_path)
    assert [run.name for run in pairs] == ["a-seed1", "b-seed1", "a-seed2", "b-seed2"]
    assert [(run.config.depth, run.config.seed) for run in pairs[:2]] == [(20, 1), (3, 1)]
    for mistake in ({"resume": True}, {"overwrite": True}, {"eval_every": 0}):
        with pytest.raises(ValueError, match="sweep"):
            miniseries_grid(replace(base, **mistake), [2], tmp_path)


def test_lists_of_numbers():
    assert numbers("1e15,3e15", float, "--flops") == [1e15, 3e15]
    for wrong in ("", "4,,6", "4 6", "4,4", "-4", "four"):
        with pytest.raises(ValueError, match="--depths"):
            numbers(wrong, int, "--depths")
    with pytest.raises(ValueError, match="infinite"):
        numbers("1e999", float, "--flops")
    assert [flops_name(flops) for flops in (3e9, 2.15e18, 50_000)] == ["3e9", "2.15e18", "50000"]


def results_of_a_known_world() -> list[RunResult]:
    """Best parameters 2·C^0.5; tokens C / (6·parameters); one run failed."""
    found = []
    for budget in made(0.5):
        for depth, (params, bpb) in enumerate(zip(budget.x, budget.losses, strict=True)):
            values = {
                "params": params,
                "tokens": budget.flops / (6 * params),
                "flops": budget.flops,
                "bpb": bpb,
                "depth": depth,
                "steps": 9,
            }
            place = {"budget": budget.flops, "depth": depth}
            found.append(RunResult(f"{budget.flops:g}-{depth}", place, "finished", values))
    lost = RunResult("lost", {"budget": 1e15, "depth": 9}, "failed: out of memory, and\nmore")
    return [*found, lost]


def test_isoflop_results_become_laws_tables_and_pictures():
    results = results_of_a_known_world()
    fits = fit_isoflop(results)
    assert fits.laws["params"].exponent == pytest.approx(0.5)
    assert fits.laws["tokens"].exponent == pytest.approx(0.5)
    assert fits.laws["bpb"].exponent == pytest.approx(-0.1)
    found = json.loads(json.dumps(fits.as_json()))
    assert [minimum["flops"] for minimum in found["minima"]] == list(BUDGETS)
    assert found["minima"][0]["tokens"] == pytest.approx(1e15 / 12 / math.sqrt(1e15))
    assert found["notes"] == []
    rows = list(csv.DictReader(results_csv(results).splitlines(keepends=True)))
    assert len(rows) == len(results)
    assert rows[-1]["status"] == results[-1].status
    assert rows[-1]["bpb"] == ""
    for name, svg in isoflop_plots(fits, results).items():
        text = " ".join(ElementTree.fromstring(svg).itertext())
        assert re.search("FLOPs", text), name


def test_what_is_missing_is_said():
    results = [
        result for result in results_of_a_known_world() if result.place["depth"] in (0, 1, 2)
    ]
    results[0].values["flops"] *= 1.2
    fits = fit_isoflop(results)  # the best of three sizes is the largest
    assert not fits.laws
    assert "add larger ones" in fits.notes[1]
    assert "+20% off its budget, having only 9 steps" in fits.notes[0]
    assert set(isoflop_plots(fits, results)) == {"isoflop", "compute"}
    assert set(isoflop_plots(fit_isoflop([]), [])) == {"isoflop", "compute"}


def test_only_seeds_that_finished_in_both_are_compared():
    def result(variant, seed, **values):
        return RunResult(f"{variant}{seed}", {"variant": variant, "seed": seed}, "", values)

    results = [
        *(result("a", seed, bpb=bpb) for seed, bpb in ((1, 2.0), (2, 2.1), (3, 9.0))),
        *(result("b", seed, bpb=bpb) for seed, bpb in ((2, 2.0), (1, 1.8))),
        result("b", 3),
    ]
    found = compare_seeds(results)
    assert found["seeds"] == [1, 2]
    assert found["b_minus_a"]["mean"] == pytest.approx(-0.15)
    assert "needs 2 seeds" in compare_seeds(results[:1])["notes"][0]


# --- toy sweeps -----------------------------------------------------------------------------------

TINY = {
    "aspect_ratio": 32,
    "head_dim": 16,
    "max_seq_len": 64,
    "total_batch_size": 512,
    "device_batch_size": 4,
    "warmup_steps": 1,
    "dataset": "tiny",
    "tokenizer": "tiny",
    "eval_every": 1000,
    "eval_tokens": 512,
    "save_every": 0,
}


@pytest.fixture(scope="module")
def sweep(tiny_base, tmp_path_factory) -> Script:
    base = tmp_path_factory.mktemp("sweep") / "base"
    shutil.copytree(tiny_base, base, symlinks=True, ignore=shutil.ignore_patterns("runs"))
    return Script(base, "sweep.py", {})


def flags(**more) -> list[str]:
    return [f"--{name}={value}" for name, value in (TINY | more).items()]


def last_line(output: str) -> dict:
    return json.loads(output.strip().splitlines()[-1])


def folder(script: Script, name: str) -> Path:
    return script.base / "sweeps" / name


def run_here(monkeypatch, capsys, script: Script, *command: str) -> tuple[int, str]:
    """Exit code and output of sweep.py in this process; its runs have theirs."""
    monkeypatch.setattr(sys, "argv", ["sweep.py", *command])
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(script.base))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts" / "sweep.py"), run_name="__main__")
    return end.value.code, capsys.readouterr().out


ISOFLOP = ("isoflop", "--flops=3e9,1.5e10", "--depths=1", "--name=toy", *flags())


def test_an_isoflop_sweep_is_stopped_resumed_and_not_repeated(sweep, monkeypatch, capsys):
    second = sweep.folder("toy") / "1.5e10-d1"
    process = sweep.start_plain(*ISOFLOP)
    wait_for(lambda: n_train_records(second) >= 3, process)
    process.terminate()
    output = finish(process, 0)
    assert "stopped by SIGTERM" in output
    summary = last_line(output)
    assert (summary["finished"], summary["runs"], summary["failed"]) == (1, 2, {})
    assert list((second / "checkpoints").iterdir())  # the run itself got the signal, and saved

    code, output = run_here(monkeypatch, capsys, sweep, *ISOFLOP)
    assert code == 0
    assert output.count("finished already") == 1
    assert "resuming at step" in (folder(sweep, "toy") / "1.5e10-d1.log").read_text()
    summary = last_line(output)
    assert (summary["finished"], summary["failed"]) == (2, {})
    assert "a parabola needs 3 sizes, here are 1" in summary["notes"][0]

    results = json.loads((folder(sweep, "toy") / "results.json").read_text())
    rows = {row["run"]: row for row in results["runs"]}
    assert list(rows) == ["3e9-d1", "1.5e10-d1"]
    for row in rows.values():
        assert row["flops"] == pytest.approx(row["budget"], rel=0.05)
        (last,) = [r for r in sweep.trace(f"toy/{row['run']}") if r["kind"] == "val"][-1:]
        assert (row["steps"], row["bpb"]) == (last["step"], last["bpb"])
    assert rows["1.5e10-d1"]["bpb"] < rows["3e9-d1"]["bpb"]  # more compute helps
    table = list(csv.DictReader((folder(sweep, "toy") / "results.csv").read_text().splitlines()))
    assert [float(row["bpb"]) for row in table] == [row["bpb"] for row in rows.values()]
    for name in ("isoflop", "compute"):
        ElementTree.parse(folder(sweep, "toy") / f"{name}.svg")

    # Runs that are there are not taken for runs with other settings.
    config = parse(PretrainConfig, "pretrain", ["--config", str(second / "config.toml")])
    assert is_finished(read_run(Run("same", {}, config)))
    assert is_finished(read_run(Run("same", {}, replace(config, dtype="auto", keep_last=9))))
    with pytest.raises(ValueError, match=r"matrix_lr was None, now 0.01"):
        read_run(Run("other", {}, replace(config, matrix_lr=0.01)))
    assert is_finished(read_run(Run("same", {}, replace(config, long_documents=None))))
    # One from before documents could continue is not one of a sweep in which they do.
    for meta in second.glob("checkpoints/*/meta/metadata"):
        meta.write_text(meta.read_text().replace('"long_documents": "continue", ', ""))
        seal(meta.parents[1])
    with pytest.raises(ValueError, match="long_documents was crop, now continue"):
        read_run(Run("older", {}, config))
    assert is_finished(read_run(Run("older", {}, replace(config, long_documents="crop"))))


def test_a_run_that_fails_is_reported_and_does_not_stop_the_others(sweep, monkeypatch, capsys):
    variants = ("--a", "--attention cudnn", "--b", "--depth 1")
    more = flags(depth=1, num_iterations=3)
    code, output = run_here(monkeypatch, capsys, sweep, "seeds", "--seeds", "7", *variants, *more)
    assert code == 1
    summary = last_line(output)
    assert summary["finished"] == 1
    assert set(summary["failed"]) == {"a-seed7"}
    assert "attention=cudnn needs an NVIDIA GPU" in summary["failed"]["a-seed7"]
    assert "needs 2 seeds that finished in both, here are 0" in summary["notes"][0]


def test_a_series_is_planned_and_mistakes_are_found_before_anything_runs(
    sweep, monkeypatch, capsys
):
    def run(*more):
        command = ["sweep.py", "miniseries", "--depths", "1,2", *flags(), *more]
        monkeypatch.setattr(sys, "argv", command)
        runpy.run_path(str(ROOT / "scripts" / "sweep.py"), run_name="__main__")

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(sweep.base))
    run("--plan", "--target-param-data-ratio", "0.5")
    assert re.search(r"^d2 +[\d,]+ +[\d,]+ +\d+ ", capsys.readouterr().out, re.MULTILINE)
    with pytest.raises(SystemExit, match="error: there is no data set"):
        run("--dataset=absent")
    with pytest.raises(SystemExit):
        run("--matrix-rl=1")
    assert "matrix-rl" in capsys.readouterr().err
    assert not sweep.folder("miniseries").exists()
