"""The tasks that the program makes itself: repeatable, apart from their tests, and solvable."""

import re
from itertools import product

import pytest

from nanochat_jax.data.corpus import write_shards
from nanochat_jax.engine.tools import calculate
from nanochat_jax.tasks.registry import MADE_HERE, make_task
from nanochat_jax.tasks.words import find_sentences, find_words

EXAMPLES = 1500
ALL = sorted(MADE_HERE)


def questions(task):
    return [m["content"] for one in task for m in one["messages"] if m["role"] == "user"]


def parts(task, kind):
    contents = [m["content"] for one in task for m in one["messages"]]
    return [
        p["text"] for one in contents if isinstance(one, list) for p in one if p["type"] == kind
    ]


def reference(conversation):
    content = conversation["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


@pytest.mark.parametrize("name", ALL)
def test_examples_are_repeatable_and_do_not_depend_on_the_size(name):
    few, many = (make_task(name, "train", limit=limit) for limit in (20, 100_000))
    assert (len(few), len(many)) == (20, 100_000)
    assert list(few) == [many[i] for i in range(20)]
    assert many[99_999]["messages"]
    assert len(make_task(name, "train")) > len(make_task(name, "test")) > 100


@pytest.mark.parametrize("name", ALL)
def test_no_question_of_the_test_is_trained_on(name):
    train, test = (make_task(name, split, limit=EXAMPLES) for split in ("train", "test"))
    assert not set(questions(train)) & set(questions(test))
    assert not set(parts(train, "python")) & set(parts(test, "python"))


@pytest.mark.parametrize("name", ["counting", "spelling-local"])
def test_no_word_of_the_test_is_trained_on(name):
    def words(split):
        task = make_task(name, split, limit=EXAMPLES)
        if name == "counting":
            return {call.split("'")[1] for call in parts(task, "python")}
        return {reference(one).replace(" ", "") for one in task}

    assert words("train")
    assert not words("train") & words("test")


@pytest.mark.parametrize("name", ALL)
def test_references_are_right_and_other_answers_are_not(name):
    task = make_task(name, "test", limit=300)
    for one in task:
        assert task.evaluate(one, reference(one))
        assert task.reward(one, reference(one)) == 1.0
        assert task.reward(one, "") == 0.0
        assert not task.evaluate(one, "#### 123456789")


@pytest.mark.parametrize("name", ["arithmetic", "counting", "dialogue"])
def test_calls_are_what_the_calculator_understands(name):
    task = make_task(name, "train", limit=EXAMPLES)
    calls, outputs = parts(task, "python"), parts(task, "python_output")
    assert len(set(calls)) > EXAMPLES / 4
    for call, output in zip(calls, outputs, strict=True):
        assert str(calculate(call)) == output, call
    for one in make_task("arithmetic", "train", limit=EXAMPLES):
        *_, output, text = one["messages"][-1]["content"]
        assert float(text["text"].rpartition("#### ")[2]) == float(output["text"])


def test_arithmetic_varies():
    calls = parts(make_task("arithmetic", "train", limit=EXAMPLES), "python")
    for operator in "+-*/(":
        assert sum(operator in call for call in calls) > EXAMPLES / 30, operator


def test_choices_have_one_right_letter():
    task = make_task("choice", "train", limit=EXAMPLES)
    counts = dict.fromkeys("ABCD", 0)
    for one in task:
        question, letter = (m["content"] for m in one["messages"])
        counts[letter] += 1
        asked, *lines = question.split("\n")
        choices = {line[-1]: line[2:-2] for line in lines if line.startswith("- ")}
        assert sorted(choices) == list(one["letters"]) == list("ABCD")
        assert len(set(choices.values())) == 4
        present = [c for c in choices.values() if c in re.findall("[a-z]+", asked.lower())]
        if "___" in asked:
            assert asked.count("___") == 1
        else:
            assert present == [choices[letter]]
        assert [task.evaluate(one, other) for other in "ABCD"].count(True) == 1
    assert min(counts.values()) > EXAMPLES / 5


def test_identity_says_its_name_and_reads_well():
    task = make_task("identity-local", "train", limit=EXAMPLES)
    assert all("nanochat_jax" in reference(one) for one in task)
    assert len(set(questions(task))) > 150


def test_words_and_sentences_come_from_the_local_text(tmp_path, monkeypatch):
    fallback = find_words()
    assert len(fallback) > 1000
    assert len(find_sentences()) > 100
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "other"))
    folder = tmp_path / "other" / "base_data" / "local"
    folder.mkdir(parents=True)
    names = ["".join(letters) for letters in product("bdfgkl", "aeiou", "mnprst", "aeio")]
    write_shards(
        [f"The {name} zebra likes fresh green grass today. Not {name}" for name in names], folder
    )
    assert "zebra" in find_words()
    assert "zebra" not in fallback
    assert any("zebra likes fresh green grass" in sentence for sentence in find_sentences())
    assert any("zebra" in question for question in questions(make_task("choice", limit=20)))


def test_too_little_text_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "small"))
    folder = tmp_path / "small" / "base_data" / "local"
    folder.mkdir(parents=True)
    write_shards(["one word", "or two"], folder)
    with pytest.raises(ValueError, match=r"local has only 1 words .* 500 are needed"):
        make_task("counting", "train")[0]
    with pytest.raises(ValueError, match=r"local has only 0 sentences .* 100 are needed"):
        find_sentences()
