"""The report card: chains of runs, their numbers, and the page, checked with what runs write."""

import json
import math
import os
import re
import runpy
import sys
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from nanochat_jax import runs
from nanochat_jax.report import facts
from nanochat_jax.report.chain import read_chain, read_stage, scores, summary, totals
from nanochat_jax.report.content import Cell, SourceText, Table, build
from nanochat_jax.report.page import to_html, write
from nanochat_jax.report.plots import plots
from nanochat_jax.runs import Meter, Tracker, read_metrics, record, record_evaluation

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = "<script>alert(1)</script> & \"quotes\" ``` | 'x'"
TASKS = {"arc-easy": 0.38, "gsm8k": 0.05, "mmlu": 0.31, "humaneval": 0.08, "arc-challenge": 0.28}


def make_run(folder, stage="pretrain", source=None, steps=40, device="cpu", best=1.0, **config):
    """A run's folder as a stage leaves it, without arrays."""
    folder.mkdir(parents=True)
    tracker = Tracker(folder)
    for step in range(steps):
        fall = best + 3 * math.exp(-step / steps * 4)
        values = {"loss": fall + 0.1 * math.sin(step * 7), "smoothed_loss": fall}
        values |= {"tokens_per_s": 0.8e6 if step else 9e3, "grad_norm": 0.4, "train_seconds": step}
        if device != "cpu":
            values["mfu"] = 0.47
        if stage == "rl":
            values |= {"reward": 0.1 + step / steps / 2, "length": 60.0}
        tracker.log("train", step, **values)
        if step % 10 == 0 and stage == "rl":
            passes = {f"pass@{k}": min(1.0, (0.1 + step / steps / 3) * k**0.4) for k in range(1, 9)}
            tracker.log("val", step, **passes)
        elif step % 10 == 0:
            tracker.log("val", step, bpb=fall / 2, loss=fall)
    tracker.log("sample", steps, texts=[["The capital of Italy is", f" Rome. {HOSTILE}"]])
    tracker.close()
    meta = {
        "stage": stage,
        "step": steps,
        "progress": {"train_seconds": 3600.0 + steps},
        "plan": {"total_tokens": 11_219_763_200, "total_flops": 3.9e19, "depth": 20},
        "identity": {"data": {"training shards": 240}, "seed": 42},
        "config": {"depth": 20, "dataset": "fineweb-edu", **config},
        "provenance": {"commit": "3f8afc1" * 5, "device": device, "n_devices": 8},
    }
    if stage == "pretrain":
        meta["plan"]["params"] = {"total": 560_988_160}
    if source:
        meta["source"] = {"run": source, "step": steps}
    path = folder / "checkpoints" / str(steps) / "meta" / "metadata"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(meta))
    (path.parents[1] / "_CHECKPOINT_METADATA").write_text("{}")  # Orbax's
    (folder / "config.toml").write_text("".join(f"{k} = {v!r}\n" for k, v in config.items()))
    return folder


def make_life(runs: Path, name="d20", shift=0.0) -> list[Path]:
    """From a base model to reinforcement learning, with every evaluation."""
    gpu = {"device": "NVIDIA H100 80GB HBM3"}
    base = make_run(runs / name, best=1.0 - shift, **gpu, matrix_lr=0.02 + shift)
    core_tasks = {
        f"task {i}": {"accuracy": 0.5, "accuracy_interval": [0.4, 0.6], "centred": i / 25 - 0.1}
        for i in range(22)
    }
    core = {"core": 0.2219 + shift, "core_interval": [0.21, 0.23], "core_tasks": core_tasks}
    samples = [["Once upon a time", " there was a small house."]]
    record(base, "eval_base", {"bpb": 0.81 - shift, "gzip_bpb": 2.8, **core, "samples": samples})
    record(base, "pretrain", {"seconds": 10_980.0, "kwh": 15.5})
    folders = [base]
    for kind, suffix, gain in (("midtrain", "mid", 0), ("sft", "sft", 0.02), ("rl", "rl", 0.05)):
        source = folders[-1].name
        folder = make_run(runs / f"{name}-{suffix}", kind, source, best=1.2 - gain, **gpu)
        chat = {
            task: {"accuracy": at + gain, "accuracy_interval": [at - 0.02, at + 0.12]}
            for task, at in TASKS.items()
        }
        found = {"chatcore": 0.073 + gain, "chatcore_interval": [0.06, 0.09], "chat_tasks": chat}
        record(folder, "eval_chat", found)
        folders.append(folder)
    line = {"prompt": f"What is 7 × 12? {HOSTILE}", "completion": "84", "reward": 1.0}
    (folders[-1] / "transcripts.jsonl").write_text(json.dumps(line) + "\n")
    return folders


@pytest.fixture(scope="module")
def life(tmp_path_factory):
    return make_life(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def page(life):
    return to_html(build([read_chain(life[0])], 3.0), "today")


# --- reading --------------------------------------------------------------------------------------


def test_a_section_is_what_was_recorded_last(tmp_path):
    record(tmp_path, "sft", {"a": 1})
    record(tmp_path, "sft", {"b": 2.5, "text": "ü"})
    assert read_json(tmp_path / "report" / "sft.json") == {"b": 2.5, "text": "ü"}
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["sft.json"]


def test_an_evaluation_stays_beside_the_others_of_its_checkpoint(tmp_path, caplog):
    path = tmp_path / "eval_chat.json"
    path.write_text('{"step": 5, "chat_ta')  # torn
    first = {"step": 5, "chat_tasks": {"mmlu": {"accuracy": 0.3}}, "mean_centred": 0.1}
    record_evaluation(path, first | {"chatcore": 0.2})
    assert json.loads(path.read_text()) == first | {"chatcore": 0.2}
    assert f"{path} is damaged" in caplog.text  # what it held is not thrown away silently
    assert (tmp_path / "eval_chat.json.damaged").read_text() == '{"step": 5, "chat_ta'
    second = {"step": 5, "chat_tasks": {"gsm8k": {"accuracy": 0.1}}, "mean_centred": 0.1}
    record_evaluation(path, second)
    both = first["chat_tasks"] | second["chat_tasks"]
    assert json.loads(path.read_text()) == {"step": 5, "chat_tasks": both, "chatcore": 0.2}
    record_evaluation(path, second | {"step": 6})
    assert json.loads(path.read_text()) == second | {"step": 6}


def test_a_meter_adds_to_earlier_sessions(tmp_path, monkeypatch):
    readings = iter([10.0, 10.5, 20.0, 20.25])
    monkeypatch.setattr("nanochat_jax.runs.gpu_kwh", lambda: next(readings))
    for kwh in (0.5, 0.75):
        meter = Meter(tmp_path, "sft")
        record(tmp_path, "sft", meter.read())
        assert read_json(tmp_path / "report" / "sft.json")["kwh"] == kwh
    monkeypatch.setattr("nanochat_jax.runs.gpu_kwh", lambda: None)
    assert Meter(tmp_path / "new", "sft").read().keys() == {"seconds"}


def read_json(path):
    return json.loads(path.read_text("utf-8"))


def test_a_chain_is_the_same_from_any_of_its_runs(life):
    for folder in life:
        assert [stage.folder for stage in read_chain(folder)] == life


def test_of_several_children_the_newest_is_followed(tmp_path):
    base = make_run(tmp_path / "base")
    for age, name in enumerate(("old", "new")):
        folder = make_run(tmp_path / name, "sft", "base")
        os.utime(folder / "metrics.jsonl", (age, age))
    assert [stage.name for stage in read_chain(base)] == ["base", "new"]
    assert [stage.name for stage in read_chain(tmp_path / "old")] == ["base", "old"]


def test_a_chain_that_bites_its_tail_ends(tmp_path):
    make_run(tmp_path / "a", "sft", "b")
    make_run(tmp_path / "b", "sft", "a")
    assert {stage.name for stage in read_chain(tmp_path / "a")} == {"a", "b"}


def test_a_source_that_is_gone_does_not_matter(tmp_path):
    assert len(read_chain(make_run(tmp_path / "sft", "sft", "deleted"))) == 1


def test_torn_and_foreign_files_are_left_out_with_a_warning(tmp_path, caplog):
    folder = make_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    (folder / "report").mkdir()
    (folder / "report" / "torn.json").write_text('{"core": 0.')
    (folder / "report" / "list.json").write_text("[1]")
    (folder / "eval_base.json").write_text('{"bpb": 1.5}')
    newer = folder / "checkpoints" / "99" / "meta"
    newer.mkdir(parents=True)  # one that was being written
    stage = read_stage(folder)
    assert stage.meta["step"] == 40
    assert scores(stage)["Validation bpb"].value == 1.5
    warned = [record.message for record in caplog.records]
    assert len(warned) == 3
    assert all(any(name in w for w in warned) for name in ("torn.json", "list.json", "/99 is no"))


# --- numbers --------------------------------------------------------------------------------------


def test_the_summary_is_the_originals_table(life):
    heads, rows = summary(read_chain(life[0]))
    assert heads == ["BASE", "MID", "SFT", "RL"]
    assert [name for name, _ in rows] == [
        *("Validation bpb", "Validation bpb, conversations"),
        *("CORE", "ARC-Challenge", "ARC-Easy", "GSM8K", "HumanEval", "MMLU"),
        *("ChatCORE", "pass@1, its own task"),
    ]
    by_name = dict(rows)
    assert by_name["CORE"][0].value == 0.2219
    assert by_name["CORE"][0].interval == (0.21, 0.23)
    assert by_name["CORE"][1:] == [None, None, None]
    assert [score.value for score in by_name["GSM8K"][1:]] == pytest.approx([0.05, 0.07, 0.10])


def test_totals(life, tmp_path):
    chain = read_chain(life[0])
    cost = totals(chain, usd_per_gpu_hour=3.0)
    assert cost.seconds == 10_980 + 3 * 3640  # a recorded time goes before the time of training
    assert cost.usd == pytest.approx(cost.seconds / 3600 * 8 * 3)
    assert cost.kwh == 15.5
    assert cost.tokens == 4 * 11_219_763_200
    on_cpu = totals(read_chain(make_run(tmp_path / "other" / "cpu")), 3.0)
    assert on_cpu.usd is None
    assert on_cpu.kwh is None


def test_code_and_dependencies_are_counted(tmp_path):
    (tmp_path / "requirements").mkdir()
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["a", "b>=2"]\n')
    (tmp_path / "requirements" / "cpu.lock").write_text("a==1.0\n    # via b\nb==2.1\nc.d-e==3\n")
    (tmp_path / "code.py").write_text("x = 1\ny = 2\n")
    for folder in ("tests", ".venv", "target"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "more.py").write_text("z = 3\n" * 100)
    size = facts.code_size(tmp_path)
    assert size["files"] == 2
    assert size["lines"] == 4
    assert facts.dependencies(tmp_path) == {"direct": 2, "locked": 3}
    ours = facts.code_size()
    assert 5_000 < ours["lines"] < 200_000


class Nvml:
    """The three functions of NVML that are called, on a machine with these readings (mJ)."""

    def __init__(self, *readings):
        self.readings = readings

    def nvmlDeviceGetCount_v2(self, count):
        count._obj.value = len(self.readings)
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, device):
        device._obj.value = 1000 + index
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, device, energy):
        reading = self.readings[device.value - 1000]
        energy._obj.value = reading or 0
        return 0 if reading is not None else 3  # not supported


@pytest.mark.parametrize(
    ("nvml", "kwh"),
    [
        (None, None),
        (Nvml(), None),
        (Nvml(None), None),
        (Nvml(3_600_000_000, None, 1_800_000_000), 1.5),
    ],
)
def test_energy_is_what_the_gpus_measure(nvml, kwh, monkeypatch):
    monkeypatch.setattr(runs, "_nvml", lambda: nvml)
    assert runs.gpu_kwh() == kwh


# --- the page -------------------------------------------------------------------------------------


class Checker(HTMLParser):
    """Collects what matters of a page, and that its tags match."""

    VOID = frozenset({"meta", "br", "img", "link"})

    def __init__(self):
        super().__init__()
        self.open, self.links, self.tags = [], [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action"):
                self.links.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


def test_the_page_needs_nothing_else(page):
    checker = check(page)
    assert all(link.startswith("data:image/svg+xml;base64,") for link in checker.links)
    assert not checker.tags & {"script", "link", "iframe"}
    assert "url(http" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page


def test_what_a_model_wrote_is_text(page):
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_every_plot_is_there_once_and_well_formed(page):
    titles = re.findall(r"<figure><h3>(.*?)</h3>", page)
    assert titles == [
        *("Pretraining loss", "Mid-training loss", "Fine-tuning loss"),
        *("Validation", "Validation on conversations"),
        *("CORE, task by task", "Chat tasks", "Reward", "pass@k", "Throughput", "Gradient norm"),
    ]
    images = [link.removeprefix("data:image/svg+xml;base64,") for link in check(page).links]
    assert len(images) == len(titles)
    for image in images:
        ElementTree.fromstring(b64decode(image))


def test_markdown_has_the_same_numbers(life, tmp_path):
    markdown, html = write(build([read_chain(life[0])], 3.0), tmp_path)
    text = markdown.read_text("utf-8")
    assert "| CORE | 0.2219 (0.210 to 0.230) | – | – | – |" in text
    assert "| Metric | BASE | MID | SFT | RL |" in text
    assert "````\n" in text  # the sample holds three backticks itself
    assert html.stat().st_size < 1_000_000


def test_runs_are_compared(tmp_path):
    chains = [
        read_chain(make_life(tmp_path, name, shift)[0]) for name, shift in (("a", 0), ("b", 0.01))
    ]
    content = build(chains, 3.0)
    sections = {section.title: section.blocks for section in content.sections}
    results = sections["Results"][0]
    assert isinstance(results, Table)
    assert list(results.heads) == ["Metric", "a", "b"]
    assert all(isinstance(cell, Cell) for row in results.rows for cell in row)
    best = {(row[0].text, row[0].note): [cell.best for cell in row[1:]] for row in results.rows}
    assert best["CORE", "BASE"] == [False, True]
    assert best["Validation bpb", "BASE"] == [False, True]  # lower is better
    assert best["GSM8K", "SFT"] == [False, False]  # the same
    [differences] = sections["Settings that differ"]
    assert differences.rows == [["matrix_lr", "0.02", "0.03"]]
    check(to_html(content, "today"))


def test_models_of_one_base_are_named_by_their_last_stages(tmp_path):
    base = make_life(tmp_path, "a", 0)[0]
    twins = {name: tmp_path / name for name in ("first", "second")}
    for number, folder in enumerate(twins.values()):
        make_run(folder, "sft", "a", lr_frac=number)
    chains = [[read_stage(base), read_stage(folder)] for folder in twins.values()]
    content = build(chains, 3.0)
    sections = {section.title: section.blocks for section in content.sections}
    assert list(sections["Results"][0].heads) == ["Metric", "first", "second"]
    assert sections["Settings that differ"][0].rows == [["lr_frac", "0", "1"]]
    check(to_html(content, "today"))
    made = {plot.title: plot.svg for plot in plots(chains)}
    assert ">a<" not in made["Pretraining loss"]  # one curve, which needs no legend
    assert all(f">{name}<" in made["Fine-tuning loss"] for name in twins)
    with pytest.raises(ValueError, match="some of the runs to compare are of the same model"):
        build([chains[0], chains[0]], 3.0)


def test_a_stage_that_comes_twice_has_its_name_in_its_title(tmp_path):
    chain = [read_stage(make_run(tmp_path / name, "sft")) for name in ("one", "two")]
    assert summary(chain)[0] == ["SFT", "SFT two"]


def test_a_run_that_has_just_begun_has_a_report(tmp_path):
    folder = tmp_path / "young"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"kind": "plan", "step": 0}\n')
    content = build([read_chain(folder)], 3.0)
    check(to_html(content, "today"))
    assert not any(isinstance(block, SourceText) for s in content.sections for block in s.blocks)


def test_a_long_run_has_a_small_page(tmp_path):
    folder = make_run(tmp_path / "long", steps=20_000)
    assert len(to_html(build([read_chain(folder)], 3.0), "today")) < 500_000


def test_the_script_writes_both_and_speaks_to_people(tmp_path, monkeypatch):
    def script(*arguments):
        monkeypatch.setattr(sys, "argv", ["report.py", *arguments])
        runpy.run_path(str(ROOT / "scripts" / "report.py"), run_name="__main__")

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    for name in ("d20", "d21"):
        make_run(tmp_path / "runs" / name)
    script("d20", "d21")
    assert (tmp_path / "reports" / "d20-d21.md").is_file()
    assert (tmp_path / "reports" / "d20-d21.html").is_file()
    with pytest.raises(SystemExit, match=r"^error: there is no run in"):
        script("nothing")


def test_the_report_of_a_run_that_scripts_made(tiny_copy, call):
    call("report.py", "chat")
    folder = tiny_copy / "runs" / "chat"
    written = (folder / "report.md").read_text(encoding="utf-8")
    for stage in ("base", "chat"):
        last = [r for r in read_metrics(tiny_copy / "runs" / stage) if r["kind"] == "val"][-1]
        assert f"{last['bpb']:.4f}" in written
    assert (folder / "report.html").stat().st_size > 10_000
