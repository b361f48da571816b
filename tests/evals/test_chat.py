"""Chat evaluation: the original's picks, generation by the engine, pass@k, the script."""

import base64
import json
from itertools import combinations

import numpy as np
import pytest
from script_runs import Script
from tiny_run import make_run

from nanochat_jax.engine.engine import make_engine
from nanochat_jax.engine.scheduler import Scheduler
from nanochat_jax.evals.chat import (
    CHAT_CORE,
    ChatResult,
    chat_json,
    chat_table,
    evaluate_categorical,
    evaluate_generative,
    letter_spans,
    powers,
)
from nanochat_jax.evals.generation import Drawing, capacity_for, pass_at_k
from nanochat_jax.evals.scoring import Scorer
from nanochat_jax.gpt import GPT, GPTConfig, parameter_table
from nanochat_jax.interop.names import params_from_torch
from nanochat_jax.sharding import from_logical, make_mesh
from nanochat_jax.tasks.task import Task, exchange, is_reference
from nanochat_jax.tokenizer import Tokenizer


class Listed(Task):
    """Conversations from a list."""

    def __init__(self, name: str, kind, conversations, judge=is_reference):
        self.name, self.kind = name, kind
        self._conversations, self._judge = conversations, judge

    def __len__(self) -> int:
        return len(self._conversations)

    def __getitem__(self, i: int):
        return self._conversations[i]

    def evaluate(self, conversation, completion: str) -> bool:
        return self._judge(conversation, completion)


# --- categorical ----------------------------------------------------------------------------------


@pytest.mark.golden
@pytest.mark.parametrize("n_devices", [1, 2])
def test_the_original_s_letters(golden, n_devices):
    tasks = golden.json("tasks")
    wanted = tasks["categorical_eval_tiny_model"]
    ranks = golden.json("tokenizer")["trainings"][wanted["tokenizer"]]["mergeable_ranks_b64"]
    tokenizer = Tokenizer([base64.b64decode(rank) for rank in ranks])
    config = GPTConfig(**golden.json("gpt2026_forward")["config"])
    weights = golden.npz("gpt2026_forward")
    named = {n[6:]: w for n, w in weights.items() if n.startswith("param/")}
    mesh = make_mesh(n_devices)
    scorer = Scorer(GPT(config), mesh, from_logical(params_from_torch(config, named), mesh))
    for name, result in wanted["results"].items():
        conversations = tasks[name]["examples"][: len(result["picks"])]
        found = evaluate_categorical(scorer, tokenizer, Listed(name, "categorical", conversations))
        assert found.correct_QN[:, 0].tolist() == [pick["correct"] for pick in result["picks"]]
        assert found.accuracies_Q.mean() == pytest.approx(result["accuracy"])
        spans = [letter_spans(tokenizer, conversation) for conversation in conversations]
        for logits, scores in zip(result["letter_logits"], scorer.score(spans), strict=True):
            losses = np.array([score.losses[0] for score in scores])
            differences = losses[0] - losses  # the log-sum-exp is the same for all letters
            np.testing.assert_allclose(differences, np.array(logits) - logits[0], atol=3e-5)


# --- a model of our own ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["who are you? one and two make three. A B C D"] * 3, vocab_size=280)


@pytest.fixture(scope="module")
def model_and_params(tokenizer):
    config = GPTConfig(
        sequence_len=128, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_kv_head=1,
        n_embd=32,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    table = parameter_table(config)
    params = {n: rng.normal(0, 0.3, shape).astype(np.float32) for n, (shape, _) in table.items()}
    return GPT(config), params


def questions(n: int) -> list:
    return [exchange(f"{'one and ' * i}two?", "three") for i in range(n)]


def test_answers_do_not_depend_on_how_many_are_written_at_once(model_and_params, tokenizer):
    """And the judge hears what the model wrote, without the marker that ended it."""
    heard: list[list[str]] = []
    drawing = Drawing(n_samples=3, max_new_tokens=6, temperature=1.0)
    for slots in (2, 5):
        texts = []

        def judge(conversation, text, texts=texts) -> bool:
            texts.append(text)
            return len(text) % 2 == 0

        task = Listed("odd", "generative", questions(7), judge)
        engine = make_engine(
            *model_and_params, capacity=capacity_for(tokenizer, [task], drawing), n_slots=slots
        )
        scheduler = Scheduler(engine, tokenizer)
        seen = []
        result = evaluate_generative(
            scheduler, tokenizer, task, drawing, lambda *done, seen=seen: seen.append(done)
        )
        assert result.correct_QN.shape == (7, 3)
        assert result.correct_QN.ravel().tolist() == [len(text) % 2 == 0 for text in texts]
        assert seen[-1] == (7, 7)
        assert len(result.transcripts) == 3
        assert result.transcripts[0]["question"] == "two?"
        heard.append(texts)
    assert heard[0] == heard[1]
    assert len(set(heard[0])) > 10


def test_a_letter_of_two_tokens_is_refused(tokenizer):
    conversation = exchange("which?", "A", letters=["A", "xyz"])
    with pytest.raises(ValueError, match="'xyz' of a question is not one token"):
        letter_spans(tokenizer, conversation)


@pytest.mark.parametrize(
    ("how", "message"),
    [({"n_samples": 2}, "all 2 samples are the same"), ({"n_samples": 0}, "at least one")],
)
def test_drawings_that_make_no_sense(how, message):
    with pytest.raises(ValueError, match=message):
        Drawing(**how)


# --- scores ---------------------------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_all_choices_of_k_samples():
    rng = np.random.default_rng(0)
    correct = rng.random((20, 6)) < rng.random((20, 1))
    for k in range(1, 7):
        wanted = [
            np.mean([any(row[list(c)]) for c in combinations(range(6), k)]) for row in correct
        ]
        np.testing.assert_allclose(pass_at_k(correct, k), wanted)
    for k in (0, 7):
        with pytest.raises(ValueError, match="needs at least"):
            pass_at_k(correct, k)


def test_which_k_are_told():
    assert [powers(n) for n in (1, 2, 6, 8)] == [[], [2], [2, 4, 6], [2, 4, 8]]


def result(name: str, share: float) -> ChatResult:
    right = np.arange(100) < 100 * share
    return ChatResult(name, "categorical", right[:, None], CHAT_CORE.get(name, 0.0))


def test_chatcore_is_the_mean_of_its_five_tasks_and_of_no_fewer():
    shares = {"arc-easy": 0.4, "arc-challenge": 0.3, "mmlu": 0.25, "gsm8k": 0.1, "humaneval": 0.0}
    results = [result(name, share) for name, share in shares.items()]
    found = chat_json([*results, result("spellingbee", 1.0)])
    assert found["chatcore"] == pytest.approx((0.15 / 0.75 + 0.05 / 0.75 + 0 + 0.1 + 0) / 5)
    low, high = found["chatcore_interval"]
    assert low < found["chatcore"] < high
    assert found["mean_centred"] == pytest.approx((found["chatcore"] * 5 + 1) / 6)
    assert "ChatCORE" in chat_table(found)
    assert "chatcore" not in chat_json(results[1:])


# --- the script -----------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path, monkeypatch, tokenizer, model_and_params):
    """A base directory with a run of one checkpoint, and no data for tasks."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.delenv("NANOCHAT_TASK_DATA", raising=False)
    make_run(tmp_path, *model_and_params, tokenizer)
    return tmp_path


def test_the_script_measures_what_is_there_and_says_so(base, call):
    flags = ["--run=tiny", "--max-new-tokens=4", "--slots=4", "--n-devices=1"]
    output = call("eval_chat.py", *flags, "--max-problems=5")
    assert "left out, as their data is not there: arc-easy" in output
    assert "what the program makes itself: choice" in output
    found = json.loads(output.strip().splitlines()[-1])
    assert found == json.loads((base / "runs" / "tiny" / "eval_chat.json").read_text())
    assert found["step"] == 5
    assert set(found["chat_tasks"]) > {"choice", "arithmetic"}
    for task in found["chat_tasks"].values():
        low, high = task["accuracy_interval"]
        assert 0 <= low <= task["accuracy"] <= high <= 1
        assert task["questions"] == 5


def test_two_processes_measure_the_same(base, call):
    settings = {"run": "tiny", "tasks": "choice,arithmetic", "max-problems": 7, "slots": 4}
    settings |= {"max-new-tokens": 6, "n-samples": 2, "temperature": 1.0}
    alone = call("eval_chat.py", "--n-devices=1", *(f"--{n}={v}" for n, v in settings.items()))
    outputs = Script(base, "eval_chat.py", settings).run_cluster(2)
    assert json.loads(outputs[0].splitlines()[-1]) == json.loads(alone.splitlines()[-1])
    assert "accuracy" not in outputs[1]  # only the first one speaks


def test_mistakes_are_told_before_anything_is_loaded(base, call):
    assert "there is no task 'riddles'" in call("eval_chat.py", "--run=tiny", "--tasks=riddles")
    assert "set --temperature" in call("eval_chat.py", "--run=tiny", "--n-samples=4")
    assert "holds no checkpoints" in call("eval_chat.py", "--run=nobody", "--tasks=arithmetic")
