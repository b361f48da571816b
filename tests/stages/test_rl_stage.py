"""scripts/rl.py as people run it, on a toy: it raises the reward, and nothing interrupts it.

The toy is a model of two layers that supervised training has half taught the sums of one digit.
"""

import json
import shutil
import signal
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from rl_toy import SUMS, save_supervised, write_questions
from script_runs import ROOT, Script, finish, n_train_records, wait_for

from nanochat_jax.checkpoint import Checkpoints, load_model
from nanochat_jax.engine.engine import Engine
from nanochat_jax.evals.generation import RolloutPrompt, RolloutSampler, seed_of
from nanochat_jax.runs import lock_run, read_metrics
from nanochat_jax.stages.finetuning import finetune
from nanochat_jax.stages.policy import make_rows
from nanochat_jax.stages.rl import TRANSCRIPTS_FILE, make_stage, reinforce, rl_optimizer
from nanochat_jax.stages.rollouts import PromptLoader, summary, transcripts
from nanochat_jax.stages.settings import FinetuneConfig, RlConfig
from nanochat_jax.tasks.chats import CustomJSON
from nanochat_jax.tasks.registry import MADE_HERE, make_task
from nanochat_jax.tasks.task import Conversation, Task, exchange, is_reference
from nanochat_jax.tokenizer import Tokenizer

STEPS = 8
SETTINGS = {
    "source": "toy-sft",
    "questions_per_step": len(SUMS),
    "samples": 4,
    "max_new_tokens": 4,
    "num_iterations": STEPS,
    "lr_frac": 0.4,
    "device_batch_size": 55,
    "slots": 55,
    "eval_every": 4,
    "eval_questions": 10,
    "eval_samples": 2,
    "save_every": 3,
    "transcripts": 1,
}


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rl_base")
    write_questions(folder / "sums.jsonl")
    save_supervised(folder / "runs" / "toy-sft", steps=40)
    cache = ROOT / ".pytest_cache" / "jax"  # what conftest.py uses: most runs compile nothing
    cache.mkdir(parents=True, exist_ok=True)
    (folder / "jax_cache").symlink_to(cache)
    return folder


@pytest.fixture
def here(base, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))


@pytest.fixture(scope="session")
def script(base) -> Script:
    return Script(base, "rl.py", SETTINGS | {"task": f"json:{base / 'sums.jsonl'}"})


def config(base: Path, **settings) -> RlConfig:
    given = SETTINGS | {"task": f"json:{base / 'sums.jsonl'}", "n_devices": 1} | settings
    return RlConfig(**given)


def trace(script: Script, run: str) -> list[dict]:
    return [
        {name: value for name, value in record.items() if name != "rollout_seconds"}
        for record in script.trace(run)
    ]


def read_transcripts(script: Script, run: str) -> list[dict]:
    lines = (script.folder(run) / TRANSCRIPTS_FILE).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# --- it learns ------------------------------------------------------------------------------------


def test_the_reward_rises(here, base, script):
    settings = {"num_iterations": 24, "samples": 8, "device_batch_size": 440, "slots": 220}
    settings |= {"eval_every": 24, "eval_questions": 50, "eval_samples": 8, "sample_every": 24}
    assert reinforce(config(base, run="learns", **settings)) == 0
    records = read_metrics(script.folder("learns"))
    steps = [record for record in records if record["kind"] == "train"]
    rewards = [record["reward"] for record in steps]
    assert np.mean(rewards[:3]) < 0.62
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.12
    before, after = [record for record in records if record["kind"] == "val"]
    assert after["pass@1"] > before["pass@1"] + 0.15
    for measured in (before, after):
        chances = [measured[f"pass@{k}"] for k in range(1, 9)]
        assert chances == sorted(chances)
    # Two programs computed the probabilities, for the same weights.
    assert 0 < max(record["max_mismatch"] for record in steps) < 1e-4
    assert all(record["mismatch"] <= record["max_mismatch"] for record in steps)
    assert all(0 < record["length"] <= 4 and record["tokens"] > 0 for record in steps)
    (shown,) = [record["texts"] for record in records if record["kind"] == "sample"]
    assert len(shown) == 2
    loaded = load_model(script.folder("learns"))
    assert loaded.meta["stage"] == "rl"
    assert loaded.meta["source"] == {"run": "toy-sft", "step": 40}


def test_several_updates_with_ratio_and_divergence(here, base, script):
    options = {"updates": 2, "clip": 0.2, "kl": 0.1, "advantage": "std"}
    options |= {"normalisation": "sequence", "num_iterations": 2, "eval_every": 0}
    assert reinforce(config(base, run="grpo", **options)) == 0
    first, second = (r for r in read_metrics(script.folder("grpo")) if r["kind"] == "train")
    assert first["kl"] < 1e-6  # still the reference itself
    assert second["kl"] > 1e-5
    assert first["mismatch"] < 1e-5 < first["drift"]
    assert first["lr_multiplier"] == 0.4
    assert second["lr_multiplier"] == pytest.approx(0.2)
    with Checkpoints(script.folder("grpo")) as checkpoints:
        assert checkpoints.latest() == 2  # steps, not updates


def test_eval_chat_measures_the_same_pass_at_k(base, script, whole):
    """The last held-out measurement of a run, and eval_chat.py on its last checkpoint."""
    names = ("task", "max_new_tokens", "eval_questions", "eval_samples")
    task, new_tokens, questions, samples = (script.settings[name] for name in names)
    settings = {"run": "whole", "tasks": task, "max-problems": questions, "n-samples": samples}
    settings |= {"temperature": 1.0, "max-new-tokens": new_tokens, "slots": 55, "n-devices": 1}
    output = Script(base, "eval_chat.py", settings).run()
    (found,) = json.loads(output.splitlines()[-1])["chat_tasks"].values()
    measured = [record for record in whole if record["kind"] == "val"][-1]
    assert measured["step"] == STEPS
    assert 0 < measured["pass@1"] < 1
    assert (found["accuracy"], found["pass@2"][0]) == (measured["pass@1"], measured["pass@2"])


# --- it can be interrupted ------------------------------------------------------------------------


@pytest.fixture(scope="session")
def whole(script) -> list[dict]:
    """The records of a run that nothing interrupted."""
    output = script.run(run="whole", n_devices=1)
    assert "reward" in output
    return trace(script, "whole")


def test_kill_9_and_sigterm_change_nothing(script, whole):
    folder = script.folder("hunted")
    process = script.start(run="hunted", n_devices=1)
    wait_for(lambda: n_train_records(folder) >= 5, process)
    process.send_signal(signal.SIGKILL)
    finish(process, -signal.SIGKILL)
    with (folder / TRANSCRIPTS_FILE).open("ab") as file:
        file.write('{"kind": "transcript", "step": 7, "prompt": "tö'.encode()[:-1])  # torn

    again = ("--config", str(folder / "config.toml"), "--resume")
    process = script.start_plain(*again)
    wait_for(lambda: list(folder.glob("checkpoints/6.*/params*")), process)  # while it saves
    process.send_signal(signal.SIGKILL)
    assert "resuming at step 3" in finish(process, -signal.SIGKILL)

    process = script.start_plain(*again)
    wait_for(lambda: n_train_records(folder) >= 7, process)
    process.send_signal(signal.SIGTERM)
    output = finish(process, 0)
    assert "resuming at step" in output
    assert "stopped by SIGTERM" in output or "finished" in output
    finish(script.start_plain(*again), 0)

    assert trace(script, "hunted") == whole
    assert read_transcripts(script, "hunted") == read_transcripts(script, "whole")
    states = [load_model(script.folder(run)).params for run in ("hunted", "whole")]
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_a_run_has_one_process_at_a_time(here, base, script, whole):
    with lock_run(script.folder("whole")):
        for how in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(ValueError, match=r"another process is training .*whole"):
                reinforce(config(base, run="whole", **how))
    assert trace(script, "whole") == whole


def test_two_devices_learn_the_same(here, base, script, whole):
    """Answers are sampled with the same seeds; only sums are rounded in another order."""
    assert reinforce(config(base, run="two", n_devices=2, num_iterations=2, eval_every=0)) == 0
    ours, theirs = (
        next(r for r in records if r["kind"] == "train")
        for records in (trace(script, "two"), whole)
    )
    for name in ("loss", "grad_norm", "reward"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-6), name


def test_two_processes_learn_the_same(here, base, script, whole):
    """They divide the questions; what they saved together, one can continue."""
    short = {"num_iterations": 3, "save_every": 2, "eval_every": 2, "kl": 0.1, "updates": 2}
    outputs = script.run_cluster(2, run="cluster", **short)
    assert "step 00002" in outputs[0]
    assert "step 0" not in outputs[1]
    assert reinforce(config(base, run="alone", **short)) == 0
    assert_alike(script, "cluster", "alone")
    shutil.rmtree(script.folder("cluster") / "checkpoints" / "3")
    assert reinforce(config(base, run="cluster", resume=True, **short)) == 0
    assert_alike(script, "cluster", "alone")


def assert_alike(script: Script, run: str, other: str) -> None:
    assert read_transcripts(script, run) == read_transcripts(script, other)
    for ours, theirs in zip(trace(script, run), trace(script, other), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() & {"loss", "grad_norm", "reward", "length", "pass@2", "kl"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-6), name


def test_a_changed_run_is_not_continued(here, base, script, whole):
    shutil.copytree(script.folder("whole"), script.folder("other"))
    for settings, message in (
        ({"samples": 2}, "answers samples was 4, now 2"),
        ({"kl": 0.1}, r"objective kl was 0\.0, now 0\.1"),
        ({"seed": 1}, "seed was 42, now 1"),
        ({"num_iterations": 9}, "num_iterations was 8, now 9"),
    ):
        with pytest.raises(ValueError, match=message):
            reinforce(config(base, run="other", resume=True, **settings))


# --- deciding -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "no-such-run"}, "holds no checkpoints"),
        ({"source_step": "7"}, "has no step 7; it has 40"),
        ({"task": "json:/nowhere"}, "there is no file /nowhere"),
        ({"task": "chess"}, "there is no task 'chess'"),
        ({"max_new_tokens": 20}, "lower max_new_tokens"),
        ({"n_devices": 99}, "99 devices asked for"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(here, base, settings, message):
    with pytest.raises(ValueError, match=message):
        reinforce(config(base, run="refused", **settings))
    assert not (base / "runs" / "refused").exists()


def test_a_file_without_an_answer_to_judge_by_is_refused_at_once(here, base, tmp_path):
    path = tmp_path / "open.jsonl"
    whole = [*exchange("1+1=", "2")["messages"]]
    lines = [whole, [*whole, {"role": "user", "content": "and?"}]]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    with pytest.raises(ValueError, match=r"open\.jsonl, line 2: the last message is not the"):
        reinforce(config(base, run="refused", task=f"json:{path}"))


@pytest.mark.parametrize("settings", [{"samples": 0}, {"seed": -1}, {"kl": -1.0}, {"slots": 0}])
def test_settings_that_mean_nothing_are_refused(settings):
    with pytest.raises(ValueError, match="must"):
        RlConfig(**settings)


def test_defaults_follow_the_newest_fine_tuned_run(here, base):
    stage = make_stage(
        config(base, source="", num_iterations=None, questions_per_step=10, epochs=2)
    )
    assert (stage.config.run, stage.config.source, stage.config.source_step) == (
        "toy-rl",
        "toy-sft",
        "40",
    )
    assert stage.num_steps == 11


def test_rates_are_the_sources_and_fall_to_nothing(here, base):
    stage = make_stage(config(base))
    then = stage.source.meta["identity"]["optimizer"]
    now = rl_optimizer(stage.source, replace(stage.config, updates=3), num_steps=10)
    assert now.matrix_lr == then["matrix_lr"]
    assert (now.num_iterations, now.weight_decay, now.lr_frac) == (30, 0, 0.4)
    assert (now.momentum_start, now.momentum_final) == (0.95, 0.95)


# --- asking ---------------------------------------------------------------------------------------


def test_questions_repeat_and_continue_where_they_were():
    questions = PromptLoader(size=5, per_step=3, seed=1)
    steps = [next(questions) for _ in range(4)]
    assert [[q.example for q in step] for step in steps] == [
        [0, 1, 2],
        [3, 4, 0],
        [1, 2, 3],
        [4, 0, 1],
    ]
    assert len({q.seed for step in steps for q in step}) == 12  # also when a question comes again
    later = PromptLoader(size=5, per_step=3, seed=1, position=6)
    assert [next(later), next(later)] == steps[2:]
    assert next(PromptLoader(size=5, per_step=3, seed=2))[0].seed != steps[0][0].seed


def test_seeds_differ_when_any_number_does():
    numbers = [(a, b, c) for a in range(5) for b in range(2) for c in range(50)]
    assert len({seed_of(*n) for n in numbers}) == len(numbers)
    assert 0 <= seed_of(2**63, 0, 10**9) < 2**64


@struct.dataclass
class NoCache:
    lengths_R: jax.Array
    last_R: jax.Array


def certain_engine(tokenizer: Tokenizer, after: dict[int, int]) -> Engine:
    """A "model" that knows for each token the only one that may follow."""
    V = tokenizer.vocab_size
    table = np.full(V, tokenizer.special_id("<|assistant_end|>"))
    for token, follower in after.items():
        table[token] = follower

    def extend(weights, cache, tokens_RT, counts_R):
        end_R = jnp.maximum(counts_R - 1, 0)
        last_R = jnp.take_along_axis(tokens_RT, end_R[:, None], axis=1)[:, 0]
        logits_RV = jax.nn.one_hot(weights[last_R], V) * 100
        return logits_RV, NoCache(cache.lengths_R + counts_R, last_R)

    def empty(rows):
        return NoCache(jnp.zeros(rows, jnp.int32), jnp.zeros(rows, jnp.int32))

    engine = Engine(
        extend, jnp.asarray, empty, vocab_size=V, capacity=200,
        can_rewind=lambda length, start: False, n_slots=4,
    )  # fmt: skip
    engine.load_weights(table)
    return engine


def test_the_calculator_answers_and_its_answer_is_not_trained_on(tmp_path):
    tokenizer = Tokenizer([bytes([byte]) for byte in range(256)])
    special = tokenizer.special_id
    call = [special("<|assistant_start|>"), special("<|python_start|>"), *b"9*8"]
    call += [special("<|python_end|>")]
    tail = [special("<|output_end|>"), *b"# 72", special("<|assistant_end|>")]
    after = {a: b for part in (call, tail) for a, b in pairwise(part)}
    conversation = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "<|python_start|>9*8<|python_end|>x"},
    ]
    (tmp_path / "one.jsonl").write_text(json.dumps(conversation))
    sampler = RolloutSampler(certain_engine(tokenizer, after), tokenizer, 40, 1.0, 50)
    judged = []

    class Judged(CustomJSON):
        def reward(self, conversation, completion: str) -> float:
            judged.append(completion)
            return 0.25

    (answered,) = sampler.sample(Judged(tmp_path / "one.jsonl"), [RolloutPrompt(0, 1)], 3)
    text = "<|python_start|>9*8<|python_end|><|output_start|>72<|output_end|># 72"
    assert judged == [text] * 3
    rollout = answered.rollouts[0]
    assert tokenizer.decode(rollout.tokens) == text
    assert rollout.reason == "stop"
    forced = [t for t, f in zip(rollout.tokens, rollout.forced, strict=True) if f]
    assert tokenizer.decode(forced) == "<|output_start|>72<|output_end|>"
    rows = make_rows(answered.rollouts, pad_id=0)
    trained = rows.targets_RT[0][rows.targets_RT[0] >= 0]
    assert tokenizer.decode(trained) == "<|python_start|>9*8<|python_end|># 72"
    assert np.isfinite(rows.logprobs_RT).all()
    numbers = summary([answered])
    assert numbers["reward"] == 0.25
    assert numbers["tool_calls"] == 1
    assert numbers["telling_questions"] == numbers["pass@3"] == 0
    best, worst = transcripts([answered], tokenizer, 1)
    assert best["completion"] == text
    assert worst["prompt"].endswith("?<|user_end|><|assistant_start|>")


class Backwards(Task):
    """A user's own task, as tasks/task.py says."""

    name, kind = "backwards", "generative"

    def __init__(self, split: str, limit: int | None) -> None:
        self._numbers = range(10, 60) if split == "train" else range(60, 70)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, i: int) -> Conversation:
        return exchange(f"{self._numbers[i]}", f"{self._numbers[i]}"[::-1])

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return is_reference(conversation, completion)


def test_a_new_task_is_one_class_and_one_line(here, base, script, monkeypatch):
    monkeypatch.setitem(MADE_HERE, "backwards", Backwards)
    assert reinforce(config(base, run="own", task="backwards", num_iterations=1, eval_every=1)) == 0
    (step,) = [r for r in read_metrics(script.folder("own")) if r["kind"] == "train"]
    assert 0 <= step["reward"] <= 1
    stage = make_stage(config(base, task="backwards"))
    assert (len(stage.train_task), len(stage.test_task)) == (50, 10)
    assert stage.train_task.reward(stage.train_task[2], "21") == 1


def test_fine_tuning_does_not_start_from_here(here, whole):
    with pytest.raises(ValueError, match=r"of reinforcement learning.*toy-sft, with --source"):
        finetune("sft", FinetuneConfig(source="whole"))


def test_a_task_made_here_can_be_learned_from(here, base):
    """Its questions fit the engine, and its own answers are worth 1."""
    task = make_task("arithmetic", "train", limit=5)
    for i in range(5):
        parts = task[i]["messages"][-1]["content"]
        assert task.reward(task[i], "".join(part["text"] for part in parts)) == 1
    assert task.reward(task[0], "no idea") == 0
