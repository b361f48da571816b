"""scripts/pretrain.py as people run it: kill -9, SIGTERM, resuming, other devices, mistakes.

All runs share a base directory with a tokenizer and a data set of a few hundred documents, and one
run that nothing interrupted, whose records the others must repeat exactly.
"""

import json
import os
import random
import shlex
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from script_runs import (
    Script,
    document,
    finish,
    make_base,
    n_train_records,
    wait_for,
    write_dataset,
)

from nanochat_jax.checkpoint import Checkpoints
from nanochat_jax.config import parse
from nanochat_jax.data.shards import HUB_DATASETS
from nanochat_jax.runs import CONFIG_FILE, seal
from nanochat_jax.stages.pretraining import make_stage, pretrain
from nanochat_jax.stages.settings import PretrainConfig
from nanochat_jax.tokenizer import Tokenizer

STEPS = 14
SETTINGS = {
    "depth": 1,  # several devices never divide the stacks, so there is padding
    "n_embd": 32,
    "n_head": 2,
    "n_kv_head": 1,
    "max_seq_len": 64,
    "total_batch_size": 1024,
    "device_batch_size": 2,
    "num_iterations": STEPS,
    "warmup_steps": 2,
    "matrix_lr": 0.044,
    "embedding_lr": 0.27,
    "unembedding_lr": 0.008,
    "dataset": "tiny",
    "tokenizer": "tiny",
    "eval_every": 5,
    "eval_tokens": 1024,
    "sample_every": 0,
    "sample_tokens": 4,
    "save_every": 4,
}


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_base(folder)
    return folder


@pytest.fixture(scope="session")
def script(base) -> Script:
    return Script(base, "pretrain.py", SETTINGS)


@pytest.fixture(scope="session")
def whole(script) -> list[dict]:
    """The trace of a run that nothing interrupted."""
    output = script.run(run="whole")
    assert "scaling parameters" in output  # the dial
    assert "finished" in output
    return script.trace("whole")


def test_a_run_leaves_a_whole_folder(script, whole):
    kinds = [record["kind"] for record in whole]
    assert [kinds.count(kind) for kind in ("plan", "train", "val")] == [1, STEPS, 4]
    losses = script.losses("whole")
    assert losses[-1] < losses[0] - 0.3  # it learns
    assert script.steps("whole") == {"12", str(STEPS)}
    preset = str(script.folder("whole") / "config.toml")
    config = parse(PretrainConfig, "pretrain", ["--config", preset])
    assert (config.run, config.depth, config.resume) == ("whole", 1, False)
    assert Tokenizer.load(script.folder("whole") / "tokenizer").vocab_size == 300
    with Checkpoints(script.folder("whole")) as checkpoints:
        meta = checkpoints.meta(STEPS)
        assert checkpoints.meta(12)["val_bpb"] is None  # not measured at that step
    last = [record for record in whole if record["kind"] == "val"][-1]
    assert meta["val_bpb"] == last["bpb"] == checkpoints_best(whole)
    assert meta["provenance"]["packages"]["jax"]


def checkpoints_best(trace: list[dict]) -> float:
    return min(record["bpb"] for record in trace if record["kind"] == "val")


def test_sigterm_kill_9_and_kill_9_while_saving_change_nothing(script, whole):
    """One run ended in three ways, each time resumed; the first two anywhere between steps."""
    folder = script.folder("hunted")
    process = script.start("--resume", run="hunted")  # there is nothing to resume yet
    wait_for(lambda: n_train_records(folder) >= 2, process)
    process.send_signal(signal.SIGTERM)
    output = finish(process, 0)
    assert "starting at step 0" in output
    stopped = max(int(name) for name in script.steps("hunted"))
    assert f"stopped by SIGTERM after step {stopped} of {STEPS}; saved" in output

    command = output.strip().splitlines()[-1].split("scripts/pretrain.py ")[1].split()
    assert "--resume" in command
    process = script.start_plain(*command)
    at = stopped + random.randint(1, 3)
    wait_for(lambda: n_train_records(folder) >= at, process)
    process.send_signal(signal.SIGKILL)
    assert f"resuming at step {stopped}" in finish(process, -signal.SIGKILL)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "train", "step": 7, "lo')  # as if torn in mid-line

    process = script.start_plain(*command)
    wait_for(lambda: list(folder.glob("checkpoints/12.*/params*")), process)
    process.send_signal(signal.SIGKILL)
    finish(process, -signal.SIGKILL)
    last = 12 if (folder / "checkpoints" / "12").exists() else 8  # Orbax may have been faster

    output = finish(script.start_plain(*command), 0)
    assert f"resuming at step {last}" in output
    assert script.trace("hunted") == whole
    assert script.steps("hunted") == {"12", str(STEPS)}  # nothing half-written is left


def test_two_processes_train_as_one(script, cropping, here):
    """And what they saved together, one can continue. Both know what all of them crop."""
    outputs = script.run_cluster(2, run="cluster", eval_every=0, long_documents="crop")
    assert "step 00013" in outputs[0]
    assert "step 0" not in outputs[1]  # only the first one speaks
    expected, shares = script.losses("cropping"), cropped_shares(script, "cropping")
    np.testing.assert_allclose(script.losses("cluster"), expected, rtol=1e-5)
    np.testing.assert_allclose(cropped_shares(script, "cluster"), shares, rtol=1e-5)
    shutil.rmtree(script.folder("cluster") / "checkpoints" / str(STEPS))
    assert pretrain(config(run="cluster", resume=True)) == 0
    np.testing.assert_allclose(script.losses("cluster"), expected, rtol=1e-5)
    np.testing.assert_allclose(cropped_shares(script, "cluster"), shares, rtol=1e-5)


def cropped_shares(script: Script, run: str) -> list[float]:
    return [r["cropped_share"] for r in script.trace(run) if r["kind"] == "train"]


# --- the same, called directly --------------------------------------------------------------------


@pytest.fixture
def here(base, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))


def config(**settings) -> PretrainConfig:
    return PretrainConfig(**(SETTINGS | {"n_devices": 1} | settings))


@pytest.fixture
def cropping(here, script) -> Path:
    """The folder of a run that crops long documents, made once."""
    folder = script.folder("cropping")
    if not folder.is_dir():
        assert pretrain(config(run="cropping", long_documents="crop")) == 0
    return folder


@pytest.mark.parametrize("devices", [2, 8])
def test_another_number_of_devices_continues_with_the_same_losses(here, script, whole, devices):
    name = f"on{devices}"
    shutil.copytree(script.folder("whole"), script.folder(name))
    shutil.rmtree(script.folder(name) / "checkpoints" / str(STEPS))
    assert pretrain(config(run=name, resume=True, n_devices=devices, save_every=0)) == 0
    np.testing.assert_allclose(script.losses(name), script.losses("whole"), rtol=1e-5)
    bpbs = [
        [r["bpb"] for r in trace if r["kind"] == "val"] for trace in (script.trace(name), whole)
    ]
    np.testing.assert_allclose(*bpbs, rtol=1e-5)


def test_a_non_finite_loss_ends_the_run_and_its_advice_leads_out_of_it(call, script, capsys):
    settings = {"matrix_lr": 1e38, "save_every": 1, "keep_last": 1}
    assert pretrain(config(run="burnt", **settings)) == 1
    record = json.loads((script.folder("burnt") / "nonfinite.json").read_text())
    advice = capsys.readouterr().err
    assert f"at step {record['step']}; " in advice
    assert set(record["loader"]["streams"]) == {str(stream) for stream in range(8)}
    checkpoints = Checkpoints(script.folder("burnt"))
    assert all(step <= record["step"] for step in checkpoints.steps())
    # A resumed run says where it will end, and ends there.
    assert pretrain(config(run="burnt", resume=True, **settings)) == 1
    out, err = capsys.readouterr()
    assert f"WARNING: this run has met loss is nan at step {record['step']}, and will" in out
    assert err == advice
    command = shlex.split(advice.strip().split("python scripts/pretrain.py ")[1])
    assert "finished; try it" in call("pretrain.py", *command)


# --- documents longer than a row ------------------------------------------------------------------


def test_what_is_cropped_is_said_recorded_and_in_the_report(
    here, script, whole, cropping, call, capsys
):
    shares = cropped_shares(script, "cropping")
    assert 0.1 < shares[-1] < 0.8
    assert set(cropped_shares(script, "whole")) == {0.0}
    make_stage(config(long_documents="crop")).announce()
    said = capsys.readouterr().out
    measured = float(said.split("cropped: ")[1].split(" %")[0])
    assert 10 < measured < 80
    assert "a run with --long-documents continue has all of the text" in said
    make_stage(config()).announce()
    said = capsys.readouterr().out
    assert "cropped: 0.0 % of the tokens" in said
    assert "--long-documents" not in said
    recorded = json.loads((cropping / "report" / "pretrain.json").read_text())
    assert recorded["cropped_share"] == round(shares[-1], 4)
    call("report.py", "cropping")
    page = next(cropping.rglob("*.html")).read_text(encoding="utf-8")
    assert f"{100 * shares[-1]:.1f} %" in page


def test_the_published_data_sets_are_cropped_as_published(here, base, capsys):
    for name in ("climbmix", "fineweb-edu"):
        folder = base / "base_data" / name
        shutil.copytree(base / "base_data" / "tiny", folder)
        last = sorted(folder.iterdir())[-1]
        last.rename(folder / f"shard_{HUB_DATASETS[name].last_shard:05d}.parquet")
    for dataset in ("climbmix", "fineweb-edu", str(base / "base_data" / "climbmix")):
        stage = make_stage(config(dataset=dataset))
        assert stage.config.long_documents == "crop"
        stage.announce()
        said = capsys.readouterr().out
        assert "cropped: " in said
        assert "--long-documents" not in said  # it is the recipe's own
    own = make_stage(config(dataset="climbmix", long_documents="continue"))
    assert own.fingerprint()["batch"]["long_documents"] == "continue"
    assert make_stage(config(dataset=str(base / "base_data" / "tiny"))).long_documents == "continue"


def make_old(folder: Path, step: int) -> None:
    """As a cropping run stopped at a step was before documents could continue."""
    shutil.rmtree(folder / "checkpoints" / str({12: STEPS, STEPS: 12}[step]))
    toml = (folder / CONFIG_FILE).read_text()
    (folder / CONFIG_FILE).write_text(toml.replace('long_documents = "crop"\n', ""))
    for path in (folder / "checkpoints" / str(step)).rglob("metadata"):
        found = json.loads(path.read_text())
        found.get("config", found).pop("long_documents", None)
        for stream in found.get("streams", {}).values():
            del stream["packed"], stream["cropped"]
        path.write_text(json.dumps(found))
    assert "long_documents" not in (folder / CONFIG_FILE).read_text()
    seal(folder / "checkpoints" / str(step))


def test_a_run_from_before_goes_on_cropping(here, script, cropping):
    folder = script.folder("older-crop")
    shutil.copytree(cropping, folder)
    make_old(folder, 12)
    with pytest.raises(ValueError, match="long_documents was crop, now continue"):
        pretrain(config(run="older-crop", resume=True, long_documents="continue"))
    preset = ["--config", str(folder / CONFIG_FILE), "--resume"]
    assert pretrain(parse(PretrainConfig, "pretrain", preset)) == 0
    assert script.losses("older-crop") == script.losses("cropping")
    bpb = [
        [r["bpb"] for r in script.trace(n) if r["kind"] == "val"]
        for n in ("older-crop", "cropping")
    ]
    assert bpb[0] == bpb[1]


def test_a_run_that_continues_documents_does_not_begin_to_crop(here, whole):
    with pytest.raises(ValueError, match="long_documents was continue, now crop"):
        pretrain(config(run="whole", resume=True, long_documents="crop"))


@pytest.mark.parametrize("is_old", [False, True])
def test_eval_base_packs_as_the_run_did(call, script, cropping, is_old):
    last = [r for r in script.trace("cropping") if r["kind"] == "val"][-1]
    name = "cropping"
    if is_old:
        name = "measured"
        shutil.copytree(cropping, script.folder(name))
        make_old(script.folder(name), STEPS)
    flags = ["--n-devices=1", "--device-batch-size=2", "--eval-tokens=1024"]
    output = call("eval_base.py", f"--run={name}", "--eval=bpb", *flags)
    found = json.loads(output.strip().splitlines()[-1])
    assert found["bpb"] == pytest.approx(last["bpb"], rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer": "no-such-one"}, "train one with scripts/tok_train.py"),
        ({"dataset": "nowhere"}, "there is no data set at"),
        ({"total_batch_size": 1000}, "not a whole number of micro-batches"),
        ({"max_seq_len": 100}, "not a whole number of micro-batches"),
        ({"n_devices": 99}, "99 devices asked for"),
        ({"n_head": 3}, "whole heads"),
        ({"n_kv_head": 3}, "multiple of n_kv_head"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"attention": "cudnn"}, "needs an NVIDIA GPU"),
        ({"window_pattern": "SX"}, "window_pattern is made of S and L"),
        ({"resume": True, "overwrite": True}, "choose one of them"),
        ({"data_streams": 5}, "cannot be divided among 5 streams"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    here, base, settings, message
):
    with pytest.raises(ValueError, match=message):
        pretrain(config(run="refused", **settings))
    assert not (base / "runs" / "refused" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_embd": 64}, "model n_embd was 32, now 64"),
        ({"num_iterations": 20}, "optimizer num_iterations was 14, now 20"),
        ({"dataset": "more"}, "data training shards was 2, now 3"),
        ({"tokenizer": "other"}, "tokenizer tokens was .*, now"),
        ({"total_batch_size": 2048}, "batch tokens was 1024, now 2048"),
        ({"seed": 1}, "seed was 42, now 1"),
        ({"recipe": "2025", "total_batch_size": 1024}, "model recipe was 2026, now 2025"),
    ],
)
def test_a_changed_run_is_not_continued(here, base, whole, settings, message):
    if not (base / "base_data" / "more").exists():
        write_dataset(base / "base_data" / "more", 4)
        rng = random.Random(2)
        other = Tokenizer.train((document(rng) for _ in range(50)), vocab_size=300)
        other.save(base / "tokenizer" / "other")
    with pytest.raises(ValueError, match=message):
        pretrain(config(run="whole", resume=True, **settings))
    assert Script(base, "pretrain.py", SETTINGS).trace("whole") == whole


def test_a_run_begun_under_an_older_dial_goes_on_with_its_rates(here, script, monkeypatch):
    short = {"run": "older", "num_iterations": 2, "eval_every": 0, "save_every": 1}
    with monkeypatch.context() as older:
        older.setattr("nanochat_jax.scaling.SMALL_BATCH", 0)
        assert pretrain(config(**short)) == 0
    shutil.rmtree(script.folder("older") / "checkpoints" / "2")
    began = make_stage(config(**short, resume=True)).optim_config
    assert began.batch_lr_scale == (1024 / 2**19) ** 0.5
    assert pretrain(config(**short, resume=True)) == 0
    assert script.steps("older") == {"1", "2"}


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


@pytest.fixture
def damaged(here, script, whole, request):
    """A copy of the whole run; the last checkpoint's arrays are damaged."""
    folder = script.folder(f"damaged-{request.node.name}")
    shutil.copytree(script.folder("whole"), folder)
    files = (folder / "checkpoints" / str(STEPS) / "opt_state").rglob("d/*")
    damage(max(files, key=lambda path: path.stat().st_size))
    return folder


def test_a_damaged_last_checkpoint_is_put_aside_and_the_run_repeated(
    damaged, script, whole, capsys
):
    assert pretrain(config(run=damaged.name, resume=True)) == 0
    output = capsys.readouterr().out
    (warning,) = [line for line in output.splitlines() if line.startswith("WARNING")]
    assert f"checkpoints/{STEPS}/opt_state/" in warning
    assert "the run goes back to step 12" in warning
    assert script.trace(damaged.name) == whole
    assert script.steps(damaged.name) == {"12", str(STEPS), f"damaged-{STEPS}-0"}


def test_without_a_whole_checkpoint_nothing_is_touched(damaged, script):
    damage(damaged / "checkpoints" / "12" / "meta" / "metadata")
    before = sorted(damaged.rglob("*"))
    with pytest.raises(ValueError, match=r"has no checkpoint that is whole: .*/14/.*; .*/12/m"):
        pretrain(config(run=damaged.name, resume=True))
    assert sorted(damaged.rglob("*")) == before


def test_readers_name_the_step_that_is_whole(damaged, call):
    flags = [f"--run={damaged.name}", "--max-tokens=2", "--prompt=the"]
    assert "the" in call("generate.py", *flags)  # it does not read the optimizer's state
    damage(damaged / "checkpoints" / str(STEPS) / "params" / "_METADATA")
    message = call("generate.py", *flags)
    assert f"checkpoints/{STEPS}/params/_METADATA is damaged" in message
    assert "step 12 is whole (--step 12, --source-step 12)" in message
    assert "the" in call("generate.py", *flags, "--step=12")
    (damaged / "checkpoints" / "99").mkdir()  # a folder with a number
    assert "checkpoints/99 is no whole checkpoint" in call("generate.py", *flags)
    damage(damaged / "checkpoints" / "12" / "metrics" / "metrics")
    assert "checkpoints/12/metrics/metrics is damaged" in call("generate.py", *flags, "--step=best")


def test_another_number_of_cores_is_warned_of(here, script, whole, capsys, monkeypatch):
    shutil.copytree(script.folder("whole"), script.folder("moved"))
    cores = len(os.sched_getaffinity(0))
    pretrain(config(run="moved", resume=True))
    assert "cores" not in capsys.readouterr().out
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(cores + 1))
    pretrain(config(run="moved", resume=True))
    warning = f"WARNING: saved on {cores} CPU cores, resumed on {cores + 1}: the last digits"
    assert warning in capsys.readouterr().out


def test_overwrite_starts_again_and_samples_are_kept(here, script, whole):
    folder = script.folder("again")
    shutil.copytree(script.folder("whole"), folder)
    short = {"num_iterations": 2, "eval_every": 0, "sample_every": 1}
    assert pretrain(config(run="again", overwrite=True, **short)) == 0
    trace = script.trace("again")
    assert [record["kind"] for record in trace] == ["plan", "train", "sample", "train", "sample"]
    assert all(isinstance(text, str) for _, text in trace[-1]["texts"])
    assert script.steps("again") == {"2"}


def test_width_and_heads_can_be_given(here):
    def shape(**settings):
        plan = make_stage(
            config(**({"n_embd": None, "n_head": None, "n_kv_head": None} | settings))
        ).plan
        gpt = plan.config
        return gpt.n_layer, gpt.n_embd, gpt.n_head, gpt.n_kv_head

    assert shape(depth=2) == (2, 128, 1, 1)
    assert shape(depth=3, n_embd=100, n_head=5) == (3, 100, 5, 5)
    assert shape(depth=3, n_embd=256) == (3, 256, 2, 2)
    assert shape(depth=4, aspect_ratio=32, head_dim=16) == (4, 128, 8, 8)
    assert shape(depth=4, n_embd=256, n_head=4, n_kv_head=2) == (4, 256, 4, 2)


# --- what is done with a finished run -------------------------------------------------------------


@pytest.fixture
def call(here, call):
    return call


def test_a_mistake_ends_with_one_sentence(call, whole):
    flags = [f"--{name}={value}" for name, value in SETTINGS.items()]
    message = call("pretrain.py", "--run=whole", *flags)
    assert message.startswith("error: the run ")
    assert "continue it with --resume, choose another name with --run" in message
    assert "Traceback" not in message


def test_eval_base_measures_and_samples(call, script, whole):
    flags = ["--n-devices=1", "--device-batch-size=2", "--eval-tokens=1024", "--sample-tokens=4"]
    output = call("eval_base.py", "--run=whole", *flags)
    result = json.loads(output.strip().splitlines()[-1])
    assert result == json.loads((script.folder("whole") / "eval_base.json").read_text())
    last = [record for record in whole if record["kind"] == "val"][-1]
    assert result["bpb"] == pytest.approx(last["bpb"], rel=1e-6)  # what training measured
    assert result["step"] == STEPS
    assert 0.5 < result["gzip_bpb"] < 8
    assert len(result["samples"]) == 8
    assert "gzip -9 needs" in output
    only = call("eval_base.py", "--run=whole", "--eval=bpb", "--step=12", *flags)
    assert set(json.loads(only.strip().splitlines()[-1])) == {
        "run", "step", "bpb", "gzip_bpb", "tokens"
    }  # fmt: skip
    assert "--eval knows core, bpb, sample, not x" in call("eval_base.py", "--eval=bpb,x")
    assert "there is no CORE bundle" in call("eval_base.py", "--eval=core")


def test_eval_base_wants_a_data_set_for_a_run_that_has_none(call, script, whole):
    shutil.copytree(script.folder("whole"), script.folder("chat"))
    meta = script.folder("chat") / "checkpoints" / str(STEPS) / "meta" / "metadata"
    meta.write_text(meta.read_text().replace('"dataset":', '"tasks":'))
    seal(meta.parents[1])
    assert "chat was not trained on a data set; name one with --dataset" in call(
        "eval_base.py", "--run=chat", "--n-devices=1"
    )


def test_generate_continues_a_text_or_a_file(call, whole, tmp_path):
    flags = ["--run=whole", "--max-tokens=6"]
    (tmp_path / "start.txt").write_text("the and of", encoding="utf-8")
    prompt = f"--prompt=FILE:{tmp_path / 'start.txt'}"
    two = call("generate.py", *flags, prompt, "--num-samples=2")
    assert two.count("the and of") == 2
    assert two == call("generate.py", *flags, "--prompt=the and of", "--num-samples=2")
    assert two != call("generate.py", *flags, prompt, "--num-samples=2", "--seed=1")
    greedy = [call("generate.py", *flags, "--temperature=0", f"--seed={s}") for s in (1, 2)]
    assert greedy[0] == greedy[1]
    assert "No such file" in call("generate.py", *flags, "--prompt=FILE:/nowhere/at all")
    assert "has no step 5; it has 12, 14" in call("generate.py", *flags, "--step=5")
    assert "holds no checkpoints" in call("generate.py", "--run=no-such-run")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in call("generate.py", *flags, f"--prompt=FILE:{tmp_path / 'bytes'}")
