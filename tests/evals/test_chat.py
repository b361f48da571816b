"""Chat evaluation: the original's picks, generation by the engine, pass@k, the script."""

import base64
import json

import numpy as np
import pytest
from script_runs import Script

from nanochat_jax.evals.chat import (
    CHAT_CORE,
    ChatResult,
    chat_json,
    chat_table,
    evaluate_categorical,
    letter_spans,
)
from nanochat_jax.evals.scoring import Scorer
from nanochat_jax.gpt import GPT, GPTConfig
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


def test_a_letter_of_two_tokens_is_refused(tokenizer):
    conversation = exchange("which?", "A", letters=["A", "xyz"])
    with pytest.raises(ValueError, match="'xyz' of a question is not one token"):
        letter_spans(tokenizer, conversation)


# --- scores ---------------------------------------------------------------------------------------


def test_pass_at_k_is_reported_for_powers_of_two_and_all_samples():
    for n, wanted in ((1, []), (2, [2]), (6, [2, 4, 6]), (8, [2, 4, 8])):
        found = ChatResult("any", "generative", np.ones((3, n), bool), 0.0).as_json()
        assert [key for key in found if "@" in key] == [f"pass@{k}" for k in wanted]


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
def base(tiny_copy, monkeypatch):
    """A base directory with runs, and no data for tasks."""
    monkeypatch.delenv("NANOCHAT_TASK_DATA", raising=False)
    return tiny_copy


def test_the_script_measures_what_is_there_and_says_so(base, call):
    flags = ["--run=chat", "--max-new-tokens=4", "--slots=4", "--n-devices=1"]
    output = call("eval_chat.py", *flags, "--max-problems=5")
    assert "left out, as their data is not there: arc-easy" in output
    assert "tasks that need no data: choice" in output
    found = json.loads(output.strip().splitlines()[-1])
    assert found == json.loads((base / "runs" / "chat" / "eval_chat.json").read_text())
    assert found["step"] == 6
    assert set(found["chat_tasks"]) > {"choice", "arithmetic"}
    for task in found["chat_tasks"].values():
        low, high = task["accuracy_interval"]
        assert 0 <= low <= task["accuracy"] <= high <= 1
        assert task["questions"] == 5


def test_two_processes_measure_the_same(base, call):
    settings = {"run": "chat", "tasks": "choice,arithmetic", "max-problems": 7, "slots": 4}
    settings |= {"max-new-tokens": 6, "n-samples": 2, "temperature": 1.0}
    alone = call("eval_chat.py", "--n-devices=1", *(f"--{n}={v}" for n, v in settings.items()))
    outputs = Script(base, "eval_chat.py", settings).run_cluster(2)
    assert json.loads(outputs[0].splitlines()[-1]) == json.loads(alone.splitlines()[-1])
    assert "accuracy" not in outputs[1]  # only the first one speaks


def test_mistakes_are_reported_before_anything_is_loaded(base, call):
    assert "there is no task 'riddles'" in call("eval_chat.py", "--run=chat", "--tasks=riddles")
    assert "set --temperature" in call("eval_chat.py", "--run=chat", "--n-samples=4")
    assert "at least one sample" in call("eval_chat.py", "--run=chat", "--n-samples=0")
    assert "holds no checkpoints" in call("eval_chat.py", "--run=no-such-run", "--tasks=arithmetic")
