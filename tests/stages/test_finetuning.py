"""scripts/sft.py and scripts/midtrain.py as people run them: both recipes, kill -9, resuming."""

import json
import random
import re
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from script_runs import Script, finish, n_train_records, wait_for

from nanochat_jax.checkpoint import Checkpoints, load_model
from nanochat_jax.config import parse, to_toml
from nanochat_jax.data.conversations import first_batches
from nanochat_jax.optim import lr_multiplier, muon_momentum
from nanochat_jax.stages.finetuning import FinetuneStage, finetune, make_stage
from nanochat_jax.stages.mixtures import TaskSpec, choose_tasks, mixture, parse_tasks
from nanochat_jax.stages.pretraining import pretrain
from nanochat_jax.stages.settings import FinetuneConfig, PretrainConfig
from nanochat_jax.tokenizer import Tokenizer

STEPS = 12
BASE_STEPS = 6
SETTINGS = {
    "source": "base",
    "tasks": "arithmetic[300],identity-local[60]*2",
    "num_iterations": STEPS,
    "device_batch_size": 2,
    "eval_every": 6,
    "eval_tokens": 4096,
    "sample_every": 0,
    "save_every": 4,
}


@pytest.fixture(scope="session")
def base(tiny_base, tmp_path_factory) -> Path:
    """A base directory with two pretrained models of two layers: `base` of 2026, `old` of 2025."""
    folder = tmp_path_factory.mktemp("finetuning") / "base"
    shutil.copytree(tiny_base, folder, symlinks=True, ignore=shutil.ignore_patterns("chat"))
    shape = {"recipe": "2025", "depth": 2, "n_embd": 32, "n_head": 2, "max_seq_len": 256}
    rates = {"matrix_lr": 0.0025, "embedding_lr": 0.4, "unembedding_lr": 0.01, "warmup_steps": 2}
    data = {"dataset": "tiny", "tokenizer": "tiny", "total_batch_size": 2048}
    how = {"device_batch_size": 4, "num_iterations": BASE_STEPS, "eval_every": 0, "n_devices": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        config = PretrainConfig(run="old", sample_every=0, **shape, **rates, **data, **how)
        assert pretrain(config) == 0
    return folder


@pytest.fixture
def here(base, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))


@pytest.fixture(scope="session")
def script(base) -> Script:
    return Script(base, "sft.py", SETTINGS)


@pytest.fixture(scope="session")
def whole(script) -> list[dict]:
    """The trace of a run that nothing interrupted."""
    output = script.run(run="whole")
    assert "its optimizer's moments kept" in output
    assert "supervised tokens" in output
    return script.trace("whole")


def sft(**settings) -> FinetuneConfig:
    return FinetuneConfig(**(SETTINGS | {"n_devices": 1} | settings))


def one_stage(**settings) -> FinetuneStage:
    return make_stage("sft", sft(**settings))


def test_a_run_leaves_a_whole_folder(script, whole):
    kinds = [record["kind"] for record in whole]
    assert [kinds.count(kind) for kind in ("plan", "train", "val")] == [1, STEPS, 3]
    folder = script.folder("whole")
    loaded = load_model(folder)
    assert (loaded.meta["stage"], loaded.meta["step"]) == ("sft", STEPS)
    assert loaded.meta["source"] == {"run": "base", "step": BASE_STEPS}
    config = parse(FinetuneConfig, "sft", ["--config", str(folder / "config.toml")])
    assert (config.source, config.source_step) == ("base", str(BASE_STEPS))
    train = [record for record in whole if record["kind"] == "train"]
    assert train[-1]["loss"] < train[0]["loss"] - 1
    assert [record["lr_multiplier"] for record in train] == pytest.approx(
        [0.8] * 7 + [0.8 * left / 6 for left in (5, 4, 3, 2, 1)]
    )
    for record in train:
        assert 0 < record["supervised_tokens"] < 1024 * (1 - record["padding_share"])
        assert 0 <= record["padding_share"] < 1
        assert record["dropped"] == record["cut"] == record["skipped"] == 0


def test_kill_9_changes_nothing(script, whole):
    """A run ended anywhere after its first checkpoint, and resumed."""
    folder = script.folder("hunted")
    process = script.start("--resume", run="hunted")  # there is nothing to resume yet
    wait_for(lambda: (folder / "checkpoints" / "4").exists(), process)
    time.sleep(random.uniform(0, 0.2))
    process.send_signal(signal.SIGKILL)
    assert "starting at step 0" in finish(process, -signal.SIGKILL)
    command = ("--config", str(folder / "config.toml"), "--resume")
    assert "resuming at step" in finish(script.start_plain(*command), 0)
    assert script.trace("hunted") == whole


def test_mid_training_is_stopped_killed_while_saving_and_resumed(base):
    """In the 2025 recipe, whose stage this is: a stream of tokens, and new moments."""
    script = Script(base, "midtrain.py", SETTINGS | {"source": "old", "save_every": 2})
    output = script.run(run="mid-whole")
    assert "rows, stream" in output
    assert "new optimizer moments" in output
    whole = script.trace("mid-whole")
    train = [record for record in whole if record["kind"] == "train"]
    assert {record["supervised_tokens"] for record in train} == {2048}
    assert {record["padding_share"] for record in train} == {0}

    folder = script.folder("mid")
    process = script.start(run="mid")
    wait_for(lambda: n_train_records(folder) >= 3, process)
    process.send_signal(signal.SIGTERM)
    output = finish(process, 0)
    stopped = int(output.split("stopped by SIGTERM after step ")[1].split()[0])
    command = output.strip().splitlines()[-1].split("scripts/midtrain.py ")[1].split()
    process = script.start_plain(*command)
    saving = 2 * (stopped // 2) + 2
    wait_for(lambda: list(folder.glob(f"checkpoints/{saving}.*/params*")), process)
    process.send_signal(signal.SIGKILL)
    finish(process, -signal.SIGKILL)
    output = finish(script.start_plain(*command), 0)
    # Orbax may have been faster.
    assert int(output.split("resuming at step ")[1].split()[0]) in (stopped, saving)
    assert script.trace("mid") == whole
    assert not list(folder.glob("checkpoints/*tmp*"))


def test_two_processes_train_as_one(script, whole):
    script.run_cluster(2, run="cluster", save_every=0)
    assert_close(script.trace("cluster"), whole)


def assert_close(trace: list[dict], whole: list[dict]) -> None:
    """Equal counts, and losses that differ by round-off."""
    for kind, names in (
        ("train", ("loss", "supervised_tokens", "padding_share")),
        ("val", ("bpb", "tokens")),
    ):
        for name in names:
            ours, theirs = ([r[name] for r in t if r["kind"] == kind] for t in (trace, whole))
            np.testing.assert_allclose(ours, theirs, rtol=2e-4, err_msg=name)


# --- the same, called directly --------------------------------------------------------------------


def test_another_number_of_devices_continues_with_the_same_losses(here, script, whole):
    shutil.copytree(script.folder("whole"), script.folder("on2"))
    shutil.rmtree(script.folder("on2") / "checkpoints" / str(STEPS))
    assert finetune("sft", sft(run="on2", resume=True, n_devices=2)) == 0
    assert_close(script.trace("on2"), whole)


def test_sft_of_2025_has_a_conversation_a_row_and_resumes_exactly(here, script, capsys):
    settings = {"source": "old", "num_iterations": 3, "run": "rows", "save_every": 2}
    assert finetune("sft", sft(**settings)) == 0
    output = capsys.readouterr().out
    assert "rows, one-per-row" in output
    assert "learning rates × 0.02 of the base run's" in output
    trace = script.trace("rows")
    first = next(record for record in trace if record["kind"] == "train")
    assert first["tokens"] == 32 * 256  # 32 conversations
    assert first["padding_share"] > 0.3
    shutil.rmtree(script.folder("rows") / "checkpoints" / "3")
    assert finetune("sft", sft(resume=True, **settings)) == 0
    assert script.trace("rows") == trace


def test_moments_are_kept_but_schedules_and_hyper_parameters_begin_anew(here, script, whole):
    stage = one_stage(run="warm")
    state = stage.initial_state()
    with Checkpoints(stage.source.folder) as checkpoints:
        meta = checkpoints.meta(BASE_STEPS)
    base = load_model(stage.source.folder)
    for name, value in base.params.items():
        np.testing.assert_array_equal(state.params[name], value)
    leaves = jax.tree_util.tree_flatten_with_path(state.opt_state)[0]
    counts = {
        jax.tree_util.keystr(path): int(leaf) for path, leaf in leaves if leaf.dtype == np.int32
    }
    mu = [leaf for path, leaf in leaves if ".mu" in jax.tree_util.keystr(path)]
    assert any(float(abs(leaf).max()) > 0 for leaf in mu)
    adam = {count for path, count in counts.items() if path.endswith("[0].count")}
    assert adam == {BASE_STEPS}  # what the moments know
    others = [count for path, count in counts.items() if not path.endswith("[0].count")]
    assert set(others) == {0}
    assert int(state.step) == 0
    then = meta["identity"]["optimizer"]
    assert then["weight_decay"] > 0
    assert stage.optim_config.weight_decay == 0
    assert stage.optim_config.matrix_lr == then["matrix_lr"]
    assert stage.optim_config.batch_lr_scale == then["batch_lr_scale"]
    cold = one_stage(run="cold", warm_start=False).initial_state()
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(cold.opt_state))
    np.testing.assert_array_equal(cold.params["wte"], state.params["wte"])


def schedule(stage) -> list[float]:
    n = stage.optim_config.num_iterations
    return [lr_multiplier(stage.optim_config, step) for step in (0, n // 2, 3 * n // 4, n)]


def test_each_stage_has_the_schedule_of_its_recipe(here):
    def made(name, source, **settings):
        settings = SETTINGS | {"source": source, "n_devices": 1} | settings
        return make_stage(name, FinetuneConfig(**(settings | {"num_iterations": 400})))

    mid, old, new = made("midtrain", "old"), made("sft", "old"), made("sft", "base")
    assert schedule(mid) == pytest.approx([1, 1, 1, 0])
    assert lr_multiplier(mid.optim_config, 360) == pytest.approx(0.5)
    assert schedule(old) == pytest.approx([0.02, 0.01, 0.005, 0])
    assert schedule(new) == pytest.approx([0.8, 0.8, 0.4, 0])
    for one, expected in (
        (mid, [0.85, 0.9, 0.95, 0.95]),
        (old, [0.95] * 4),  # the original leaves it at Muon's own in this stage
        (new, [0.85, 0.9, 0.95, 0.95]),
    ):
        momenta = [muon_momentum(one.optim_config, step) for step in (0, 150, 300, 400)]
        assert momenta == pytest.approx(expected)
    assert (mid.config.run, old.config.run, new.config.run) == ("old-mid", "old-sft", "base-sft")
    assert (mid.rows, old.rows, new.rows) == (8, 32, 4)
    assert mid.optim_config.grad_clip == 1.0  # of its base model
    twice = made("sft", "base", total_batch_size=2048)
    scale = new.optim_config.batch_lr_scale * 2**0.5
    assert twice.optim_config.batch_lr_scale == pytest.approx(scale)
    assert made("sft", "base", matrix_lr=0.7).optim_config.matrix_lr == 0.7


def test_a_pass_decides_the_number_of_steps(here):
    stage = one_stage(num_iterations=None, tasks="arithmetic[200]")
    assert stage.found.conversations == 200
    assert stage.optim_config.num_iterations == round(stage.found.rows / 4)
    twice = one_stage(num_iterations=None, tasks="arithmetic[200]", epochs=2.0)
    assert twice.optim_config.num_iterations == round(2 * stage.found.rows / 4)
    repeated = one_stage(num_iterations=None, tasks="arithmetic[100],arithmetic[100]*2")
    assert repeated.found.conversations == 300


def test_answers_alone_are_measured(here, whole):
    stage = one_stage(num_iterations=1, tasks="arithmetic[50]", val_tasks="arithmetic[40]")
    first = next(record for record in whole if record["kind"] == "val")
    bytes_of = stage.tokenizer.token_bytes()
    assert 0 < first["tokens"] < 4096
    assert first["bytes"] < first["tokens"] * bytes_of.max()
    rows = next(first_batches(stage.rendering, 0, 1, rows=8, streams=8))
    learned = rows.targets_RT[rows.targets_RT >= 0]
    assert len(learned) < 0.9 * rows.targets_RT.size
    assert stage.tokenizer.special_id("<|user_start|>") not in learned
    assert stage.tokenizer.special_id("<|assistant_end|>") in learned


def test_the_newest_fitting_run_is_the_default(here, base, whole):
    found = one_stage(source="").source  # never an SFT run, though one is newer
    assert found.meta["stage"] in ("pretrain", "midtrain")
    checkpoints = base / "runs" / "old" / "checkpoints"
    checkpoints.touch()
    assert one_stage(source="").source.name == "old"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "no-such-run"}, "holds no checkpoints"),
        ({"source_step": "5"}, "has no step 5; it has 3, 6"),
        ({"tasks": "arithmetics"}, "there is no task 'arithmetics'"),
        ({"tasks": "arithmetic**2"}, "cannot read the task"),
        ({"tasks": "arithmetic,"}, "cannot read the task ''"),
        ({"tasks": "arithmetic[0]"}, "cannot read the task"),
        ({"tasks": "json:/nowhere.jsonl"}, "nowhere.jsonl"),
        ({"num_iterations": 0}, "num_iterations must be at least 1"),
        ({"num_iterations": None, "epochs": 0.0}, "epochs must be positive"),
        ({"total_batch_size": 1000}, "not a whole number of micro-batches"),
        ({"data_streams": 3}, "cannot be divided among 3 streams"),
        ({"resume": True, "overwrite": True}, "choose one of them"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    here, base, settings, message
):
    with pytest.raises((ValueError, OSError), match=message):
        finetune("sft", sft(run="refused", **settings))
    assert not (base / "runs" / "refused" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "old"}, "source run was base, now old"),
        ({"tasks": "arithmetic[301],identity-local[60]*2"}, "data conversations was 420, now 421"),
        ({"lr_frac": 0.5}, "optimizer lr_frac was 0.8, now 0.5"),
        ({"packing": "stream"}, "data packing was best-fit, now stream"),
        ({"warm_start": False}, "warm_start was True, now False"),
        ({"num_iterations": 20}, "optimizer num_iterations was 12, now 20"),
    ],
)
def test_a_changed_run_is_not_continued(here, script, whole, settings, message):
    with pytest.raises(ValueError, match=message):
        finetune("sft", sft(run="whole", resume=True, **settings))
    assert script.trace("whole") == whole


def write_conversations(path: Path, lengths: list[int]) -> None:
    lines = (
        [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "a" * n}]
        for n in lengths
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def test_a_few_conversations_are_enough(here, script, capsys, tmp_path):
    path = tmp_path / "few.jsonl"
    write_conversations(path, [20, 900, 30, 40])
    settings = {"tasks": f"json:{path}", "num_iterations": 1, "eval_every": 1}
    assert finetune("sft", sft(run="of a few", **settings)) == 0
    output = capsys.readouterr().out
    assert "3 conversations make 1 rows" in output  # and one is measured on
    assert ", 1 dropped" in output  # however often it came round
    assert "chat.py --run 'of a few' -p" in output
    write_conversations(path, [20])
    with pytest.raises(ValueError, match="a single conversation; at least 2 are needed"):
        finetune("sft", sft(run="of one", **settings))


@pytest.mark.parametrize("place", [0, 23, 60])
def test_a_few_that_fit_among_many_are_enough(here, script, capsys, tmp_path, place):
    path = tmp_path / "few of many.jsonl"
    write_conversations(path, [900] * place + [20, 30, 40] + [900] * (61 - place))
    settings = {"tasks": f"json:{path}", "num_iterations": 2, "eval_every": 2, "data_streams": 4}
    assert finetune("sft", sft(run="of many", overwrite=True, **settings)) == 0
    output = capsys.readouterr().out
    assert f"{path}: 64 as messages" in output
    unmeasured = place < 60
    assert (", 58 dropped" if unmeasured else ", 60 dropped") in output
    warning = "none of the 3 conversations kept for validation fits a row of 256 tokens"
    assert (warning in output) == unmeasured
    kinds = [record["kind"] for record in script.trace("of many")]
    assert kinds.count("train") == 2
    assert ("val" in kinds) != unmeasured


def test_another_tokenizer_is_noticed(here, base, script):
    for name, words in (("larger", 310), ("as large", 300)):
        shutil.copytree(script.folder("base"), script.folder(name))
        texts = [f"{i} zebras and {i * i} okapis" for i in range(300)]
        other = Tokenizer.train(texts, vocab_size=words)
        other.save(script.folder(name) / "tokenizer")
        with pytest.raises(ValueError, match=r"is not the tokenizer that .* was trained with"):
            finetune("sft", sft(source=name, run="refused"))
    with pytest.raises(ValueError, match="has 310 tokens, that one 300"):
        load_model(script.folder("larger"))


def test_overwriting_spares_the_folder_one_is_in(here, script, whole, monkeypatch):
    monkeypatch.chdir(script.folder("whole") / "checkpoints")
    for run in ("whole", ".."):
        with pytest.raises(
            ValueError, match=r"--overwrite would delete .*whole, and you are in it"
        ):
            finetune("sft", sft(run=run, overwrite=True))
    assert script.trace("whole") == whole


def test_conversations_longer_than_a_row_are_counted_or_refused(here, script, capsys, tmp_path):
    path = tmp_path / "mine.jsonl"
    write_conversations(path, [20, 900, 30, 40] * 20)
    settings = {"tasks": f"json:{path}", "num_iterations": 3, "eval_every": 3, "sample_every": 3}
    assert finetune("sft", sft(run="mine", overwrite=True, sample_tokens=4, **settings)) == 0
    trace = script.trace("mine")
    dropped = sum(record["dropped"] for record in trace if record["kind"] == "train")
    assert dropped > 0
    output = capsys.readouterr().out
    assert f"dropped conversations {int(dropped)}" in output
    facts = json.loads((script.folder("mine") / "report" / "sft.json").read_text())
    assert (facts["dropped_conversations"], facts["steps"]) == (int(dropped), 3)
    assert [record["kind"] for record in trace].count("val") == 2  # on the last twentieth
    questions = next(record["texts"] for record in trace if record["kind"] == "sample")
    assert questions[1][0] == "What is 12 * 7?"
    write_conversations(path, [900] * 40)
    with pytest.raises(ValueError, match="none of 38 conversations can be used in rows of 256"):
        finetune("sft", sft(run="mine", overwrite=True, **settings))


@pytest.mark.parametrize("preset", ["cpu", "speedrun", "d20_2025"])
def test_presets_train_what_the_one_before_has_made(preset):
    base = parse(PretrainConfig, "pretrain", ["--config", preset])
    mid = parse(FinetuneConfig, "midtrain", ["--config", preset])
    sft = parse(FinetuneConfig, "sft", ["--config", preset])
    assert mid.source in ("", base.run)
    assert sft.source == (base.run if base.recipe == "2026" else mid.run)
    assert sft.run == f"{base.run}-sft"
    assert parse_tasks(sft.tasks)


def test_tasks_are_named_with_parts_and_repetitions(here, tmp_path):
    assert parse_tasks("smoltalk, mmlu-aux*3,gsm8k[10]*4") == [
        TaskSpec("smoltalk"), TaskSpec("mmlu-aux", None, 3), TaskSpec("gsm8k", 10, 4),
    ]  # fmt: skip
    assert parse_tasks("json:/a/b.jsonl*2") == [TaskSpec("json:/a/b.jsonl", None, 2)]
    write_conversations(tmp_path / "c.jsonl", list(range(1, 41)))
    spec = f"json:{tmp_path / 'c.jsonl'}*2"
    texts = {
        split: sorted(c["messages"][0]["content"] for c in mixture(spec, split))
        for split in ("train", "test")
    }
    assert [len(found) for found in texts.values()] == [76, 4]
    assert not set(texts["train"]) & set(texts["test"])
    assert len(set(texts["train"])) == 38


AWKWARD = ["a, b.jsonl", "c [1]*.jsonl", " it's", 'say "hi", 2', "both '\"', here", "plain.jsonl"]


@pytest.mark.parametrize("quote", ["'", '"'])
def test_files_of_any_name_can_be_named(tmp_path, quote):
    words = []
    for number, name in enumerate(AWKWARD, 1):
        write_conversations(tmp_path / name, [100 * number + i for i in range(40)])
        quoted = str(tmp_path / name).replace(quote, 2 * quote)
        words.append(f"json:{quote}{quoted}{quote}[{number}]*2")
    tasks = ", ".join(words)
    assert [(one.limit, one.times) for one in parse_tasks(tasks)] == [(n, 2) for n in range(1, 7)]
    assert ", ".join(map(str, parse_tasks(tasks))) == tasks
    preset = tmp_path / "preset.toml"
    preset.write_text(to_toml(FinetuneConfig(tasks=tasks)))
    read = parse(FinetuneConfig, "sft", ["--config", str(preset)])
    chosen = choose_tasks("sft", "2026", read.tasks, "")
    assert len(mixture(re.sub(r"\[\d\]\*2", "*2", chosen.train), "train")) == 6 * 2 * 38
    assert len(mixture(chosen.val, "test")) == 6 * 2
    assert parse_tasks(f"json:{tmp_path}/it's,gsm8k")[0].name.endswith("it's")
