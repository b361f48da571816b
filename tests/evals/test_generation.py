"""Asking and judging: one number whoever asks, whatever the engine's size."""

from itertools import combinations

import numpy as np
import pytest

from nanochat_jax.evals.chat import evaluate_generative
from nanochat_jax.evals.generation import make_sampler, pass_at_k
from nanochat_jax.stages.rollouts import measure
from nanochat_jax.tasks.task import Task, exchange

SETTINGS = {"max_new_tokens": 6, "temperature": 1.0, "top_k": 50}


class Odd(Task):
    """An answer of an odd number of characters is right, and one that is divisible by 4 half so."""

    name, kind = "odd", "generative"

    def __init__(self) -> None:
        self.judged: list[str] = []

    def __len__(self) -> int:
        return 7

    def __getitem__(self, i: int):
        return exchange(f"{'one and ' * i}two?", "three")

    def evaluate(self, conversation, completion: str) -> bool:
        return len(completion) % 2 == 1

    def reward(self, conversation, completion: str) -> float:
        self.judged.append(completion)
        return 0.5 if len(completion) % 4 == 0 else float(self.evaluate(conversation, completion))


@pytest.fixture(scope="module")
def samplers(model_and_params, tokenizer):
    return [make_sampler(*model_and_params, tokenizer, **SETTINGS, n_slots=n) for n in (2, 5)]


def test_evaluation_and_reinforcement_learning_measure_the_same_pass_at_k(samplers):
    """To the last digit, though engines and batches differ."""
    for_chat, for_rl = samplers
    task, calls = Odd(), []
    found = evaluate_generative(for_chat, task, 4, 11, lambda *call: calls.append(call)).as_json()
    progress = []
    held_out = measure(for_rl, task, 11, 4, 3, lambda: False, lambda *call: progress.append(call))
    assert 0 < found["accuracy"] < 1
    assert found["accuracy"] == held_out["pass@1"]
    assert [found[f"pass@{k}"][0] for k in (2, 4)] == [held_out[f"pass@{k}"] for k in (2, 4)]
    assert calls == [(7, 7)]
    assert progress == [(3, 7), (6, 7), (7, 7)]
    half = len(task.judged) // 2
    assert task.judged[:half] == task.judged[half:]
    assert len(set(task.judged)) > 10


def test_half_a_reward_is_not_right(samplers):
    task = Odd()
    result = evaluate_generative(samplers[0], task, 3)
    assert result.correct_QN.shape == (7, 3)
    assert result.correct_QN.ravel().tolist() == [len(text) % 2 == 1 for text in task.judged]
    assert any(len(text) % 4 == 0 for text in task.judged)
    assert not any("<|assistant_end|>" in text for text in task.judged)
    assert result.transcripts[0] == {
        "question": "two?", "answer": task.judged[0], "right": len(task.judged[0]) % 2 == 1
    }  # fmt: skip
    assert len(result.transcripts) == 3


def test_a_measurement_can_be_stopped(samplers):
    assert measure(samplers[0], Odd(), 1, 2, 3, stopped=lambda: True) is None


def test_a_prompt_has_what_the_answer_leaves_of_the_trained_context(model_and_params, tokenizer):
    model, params = model_and_params
    context = model.config.sequence_len

    def room(max_new_tokens: int) -> int:
        how = {**SETTINGS, "max_new_tokens": max_new_tokens}
        return make_sampler(model, params, tokenizer, **how).prompt_room

    assert room(6) == context - 6
    assert room(context - 16) == 16
    assert room(context - 15) == room(context + 100) == 2048  # the original's limit


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
