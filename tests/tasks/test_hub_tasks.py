"""Rows as people's data has them: some cannot be used, and each of those is named."""

import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_jax.tasks.chats import SmolTalk
from nanochat_jax.tasks.gsm8k import GSM8K
from nanochat_jax.tasks.mixture import Mixture, Slice
from nanochat_jax.tasks.registry import make_task
from nanochat_jax.tasks.sources import HUB_TASKS
from nanochat_jax.tokenizer import Tokenizer

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"


def talk(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


GOOD = talk((USER, "hi"), (ASSISTANT, "hello"))
BAD_TALKS = [
    (
        talk((ASSISTANT, "hello"), (USER, "hi")),
        "message 0 is the assistant's where the user's turn",
    ),
    (
        talk((USER, "a"), (USER, "b"), (ASSISTANT, "c")),
        "message 1 is the user's where the",
    ),
    (talk((USER, "hi"), (ASSISTANT, " \n")), "an empty message of the assistant"),
    (talk((USER, "hi"), (ASSISTANT, None)), "the content of message 1 must be a string or a li"),
    (talk((USER, "hi")), "no message of the assistant"),
    (talk((SYSTEM, "be kind")), "the conversation has only a system message"),
    (
        talk((SYSTEM, "a"), (SYSTEM, "b"), (USER, "c"), (ASSISTANT, "d")),
        "message 1 is the sys",
    ),
    ({"messages": []}, "the conversation has no message"),
]
MMLU = {"question": "Which?", "subject": "s", "choices": ["a", "b", "c", "d"], "answer": 1}
BAD_MMLU = [
    (MMLU | {"answer": 4}, "the answer 4, which is none of 0 to 3"),
    (MMLU | {"answer": None}, "the answer -1"),
    (MMLU | {"choices": ["a", "b", "c"]}, "3 choices"),
    (MMLU | {"choices": ["a", "b", "c", None]}, "a choice without a text"),
    (MMLU | {"choices": None}, "0 choices"),
    (MMLU | {"question": " "}, "an empty question"),
]
ARC = {"question": "Why?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "A"}
BAD_ARC = [
    (ARC | {"answerKey": "C"}, "the answer 'C', which is none of the letters A, B"),
    (ARC | {"choices": {"text": ["x"], "label": ["A", "B"]}}, "1 choices with 2 letters"),
    (ARC | {"choices": None}, "no choices"),
    (ARC | {"question": None}, "an empty question"),
]
GSM = {"question": "1+1?", "answer": "<<1+1=2>>2\n#### 2"}
BAD_GSM = [(GSM | {"question": ""}, "an empty question"), (GSM | {"answer": None}, "an empty answ")]


@pytest.mark.parametrize(
    ("task", "good", "bad"),
    [
        ("smoltalk", GOOD, BAD_TALKS),
        ("mmlu", MMLU, BAD_MMLU),
        ("arc-easy", ARC, BAD_ARC),
        ("gsm8k", GSM, BAD_GSM),
    ],
)
def test_unusable_rows_are_left_out_counted_and_named(put_rows, caplog, task, good, bad):
    rows = [row for one, _ in bad for row in (good, one)]
    first, second = put_rows(task, "test", rows, [good, bad[0][0]])
    made = make_task(task, "test")
    assert len(made) == len(bad) + 1
    assert len({json.dumps(made[i]["messages"]) for i in range(len(made))}) == 1
    expected = [(first, 2 * at + 2, why) for at, (_, why) in enumerate(bad)]
    expected.append((second, 2, bad[0][1]))
    for skipped, (path, row, why) in zip(made.skipped, expected, strict=True):
        assert skipped.where == f"{path}, row {row}"
        assert skipped.why.startswith(why)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    message = caplog.records[0].getMessage()
    assert f"{task}: {len(bad) + 1} of {2 * len(bad) + 2} rows cannot be used" in message
    for skipped in made.skipped:
        assert f"{skipped.where}: {skipped.why}" in message


def test_an_empty_system_message_is_none(put_rows):
    tokenizer = Tokenizer.train(["hi hello " * 20], vocab_size=270)
    put_rows("smoltalk", "train", [talk((SYSTEM, " "), (USER, "hi"), (ASSISTANT, "hello"))])
    task = make_task("smoltalk")
    assert not task.skipped
    assert tokenizer.render_conversation(task[0]) == tokenizer.render_conversation(GOOD)
    assert tokenizer.render_for_completion(task[0]) == tokenizer.render_for_completion(GOOD)


def test_rows_in_order_are_silent(put_rows, caplog):
    long = talk((SYSTEM, "s"), *[(USER, "u"), (ASSISTANT, "a")] * 5)
    put_rows("smoltalk", "train", [GOOD, long, talk(*[(USER, "u"), (ASSISTANT, "a")], (USER, "!"))])
    made = make_task("smoltalk", "train")
    assert len(made) == 3
    assert not made.skipped
    assert not caplog.records


def test_questions_without_a_subject_are_in_order(put_rows):
    put_rows("mmlu-aux", "train", [MMLU | {"subject": ""}, MMLU | {"subject": None}])
    task = make_task("mmlu-aux", "train")
    assert (task.name, len(task), task.skipped) == ("mmlu-aux", 2, [])


def test_nothing_usable_is_an_error(put_rows):
    put_rows("gsm8k", "test", [BAD_GSM[0][0]])
    with pytest.raises(ValueError, match=r"none of 1 rows can be used; .*row 1: an empty question"):
        make_task("gsm8k", "test")


def test_files_that_are_not_what_they_should_be(put_rows):
    (path,) = put_rows("gsm8k", "test", [{"question": "q", "reply": "a"}])
    with pytest.raises(ValueError, match=r"has no column answer; it has question, reply"):
        make_task("gsm8k", "test")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(
        ValueError, match=r"00000.parquet cannot be read as Parquet .*fetch it again"
    ):
        GSM8K([path])
    with pytest.raises(ValueError, match=r"00000.parquet has 50 bytes instead of"):
        make_task("gsm8k", "test")
    path.parent.joinpath("manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json is not a list of file names"):
        make_task("gsm8k", "test")


def test_columns_of_another_type_name_the_file(put_rows):
    put_rows("gsm8k", "test", [{"question": ["1"], "answer": "a"}])
    with pytest.raises(ValueError, match=r"00000.parquet has columns of other types .*list"):
        make_task("gsm8k", "test")


def test_row_groups_and_types_of_other_writers(task_data):
    """Large strings, several row groups, columns in another order."""
    source = HUB_TASKS["gsm8k"].split("gsm8k", "train")
    source.folder.mkdir(parents=True)
    rows = [{"answer": f"#### {i}", "question": f"{i}?"} for i in range(100)]
    schema = pa.schema([("answer", pa.large_string()), ("question", pa.large_string())])
    table = pa.Table.from_pylist(rows, schema=schema)
    pq.write_table(table, source.folder / "a.parquet", row_group_size=7)
    (source.folder / "manifest.json").write_text('["a.parquet"]')
    made = make_task("gsm8k", "train")
    questions = [one["messages"][0]["content"] for one in made]
    assert sorted(questions, key=lambda q: int(q[:-1])) == [row["question"] for row in rows]
    for i in range(100):
        assert made.where(i).endswith(f"row {int(questions[i][:-1]) + 1}")


def test_limits_slices_and_mixtures_know_their_places(put_rows):
    put_rows("gsm8k", "test", [GSM | {"question": f"{i}?"} for i in range(10)])
    whole = make_task("gsm8k", "test")
    limited = make_task("gsm8k", "test", limit=3)
    assert list(limited) == [whole[i] for i in range(3)]
    assert len(make_task("gsm8k", "test", limit=99)) == 10
    part = Slice(whole, 4, None, 5)
    assert [part.where(i) for i in range(len(part))] == [whole.where(4), whole.where(9)]
    assert part.evaluate(part[0], "#### 2.0")
    mixture = Mixture([whole, whole])
    assert len(mixture) == 20
    places = [mixture.where(i) for i in range(20)]
    assert all(places.count(place) == 2 for place in places)
    with pytest.raises(IndexError):
        limited[3]
    with pytest.raises(ValueError, match="makes no sense"):
        Slice(whole, 5, 2)
    with pytest.raises(ValueError, match="at least one task"):
        Mixture([])


def test_names_splits_and_limits_that_do_not_exist():
    with pytest.raises(ValueError, match=r"there is no task 'gsm'; there are smoltalk, mmlu"):
        make_task("gsm")
    with pytest.raises(ValueError, match=r"humaneval has the splits test, not 'train'"):
        make_task("humaneval", "train")
    with pytest.raises(ValueError, match=r"arithmetic has the splits train, test, not 'dev'"):
        make_task("arithmetic", "dev")
    with pytest.raises(ValueError, match="a limit of 0 leaves nothing"):
        make_task("arithmetic", limit=0)


def test_real_data(real_data, monkeypatch):
    """The published data sets, whole: nothing skipped, every reference passes its own judge."""
    monkeypatch.setenv("NANOCHAT_TASK_DATA", str(real_data / "task_data"))
    sizes = {"gsm8k": 1319, "mmlu": 14042, "arc-easy": 2376, "arc-challenge": 1172}
    for name, size in sizes.items():
        task = make_task(name, "test")
        assert (len(task), task.skipped) == (size, []), name
        for i in range(0, size, 10):
            content = task[i]["messages"][-1]["content"]
            answer = content if isinstance(content, str) else content[-1]["text"]
            assert task.evaluate(task[i], answer), (name, i)
    assert len(make_task("humaneval", "test")) == 164


def test_fields_within_messages_that_are_not_read_are_refused(tmp_path):
    path = tmp_path / "00000.parquet"
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    pq.write_table(pa.table({"messages": [talk] * 3, "source": ["x"] * 3}), path)
    with pytest.raises(ValueError, match=rf"^{path} has fields that are not read: messages.weight"):
        SmolTalk([path])
