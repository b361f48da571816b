"""Files of conversations, a line each, as people write them."""

import json

import pytest

from nanochat_jax.tasks.registry import make_task, missing

GOOD = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello ä"}]
PARTS = [
    {"role": "user", "content": "1+1"},
    {
        "role": "assistant",
        "content": [
            {"type": "python", "text": "1+1"},
            {"type": "python_output", "text": "2"},
            {"type": "text", "text": "2"},
        ],
    },
]
BAD_LINES = [
    (b"{not json", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b'"text"', "a conversation has a list of messages"),
    (b"[1, 2]", "message 0 has no role"),
    (b'[{"content": "x"}]', "message 0 has no role"),
    (b'{"text": "a document"}', "a conversation has a list of messages"),
    (b'[{"role": "user", "content": "\xff"}]', "not valid Unicode"),
    (
        rb'[{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "b"}]',
        "not valid Unicode",
    ),
    (
        b'[{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "x"}]}]',
        "message 1 has a part without a text",
    ),
    (
        b'[{"role": "user", "content": ["a"]}, {"role": "assistant", "content": "b"}]',
        "the content of message 0, the user's, must be a string",
    ),
]


def test_good_lines_and_the_places_of_bad_ones(tmp_path):
    path = tmp_path / "mine.jsonl"
    good = [json.dumps(GOOD, ensure_ascii=False), json.dumps({"messages": PARTS})]
    lines = [b"\xef\xbb\xbf" + good[0].encode(), b"", *(line for line, _ in BAD_LINES)]
    path.write_bytes(b"\r\n".join([*lines, good[1].encode()]))  # no newline at the end
    task = make_task(f"json:{path}")
    assert [one["messages"] for one in task] == [GOOD, PARTS]
    assert [task.where(i) for i in range(2)] == [
        f"{path}, line 1",
        f"{path}, line {len(lines) + 1}",
    ]
    for number, (skipped, (_, why)) in enumerate(zip(task.skipped, BAD_LINES, strict=True), 3):
        assert skipped.where == f"{path}, line {number}"
        assert skipped.why.startswith(why)
    assert task.evaluate(task[0], " hello ä\n")
    assert not task.evaluate(task[0], "hello")


def test_files_without_a_conversation(tmp_path):
    path = tmp_path / "mine.jsonl"
    with pytest.raises(ValueError, match=r"there is no file .*mine.jsonl"):
        make_task(f"json:{path}")
    path.write_text("\n\n")
    with pytest.raises(ValueError, match=r"mine.jsonl is empty"):
        make_task(f"json:{path}")
    path.write_text("[]\n")
    with pytest.raises(ValueError, match=r"none of 1 rows can be used; .*line 1: the conv"):
        make_task(f"json:{path}")
    with pytest.raises(ValueError, match="has the splits train, not 'test'"):
        make_task(f"json:{path}", "test")


def test_the_identity_file(task_data, real_data):
    assert missing([("identity", "train")]) == ["identity_conversations.jsonl"]
    task_data.mkdir()
    name = "identity_conversations.jsonl"
    (task_data / name).symlink_to(real_data / name)
    task = make_task("identity")
    assert (task.name, len(task), task.skipped) == ("identity", 996, [])
    assert len(make_task("identity", limit=5)) == 5


def test_the_list_of_words(task_data, real_data):
    task_data.mkdir()
    (task_data / "words_alpha.txt").symlink_to(real_data / "words_alpha.txt")
    for name in ("spellingbee", "spelling"):
        for split in ("train", "test"):
            task = make_task(name, split, limit=50)
            assert len(task) == 50
            for one in task:
                answer = one["messages"][1]["content"]
                text = answer if isinstance(answer, str) else answer[-1]["text"]
                assert task.evaluate(one, text)
                assert not task.evaluate(one, "#### 99")
