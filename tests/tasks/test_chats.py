"""Files of conversations, a line each, as people write them."""

import gzip
import json

import pyarrow as pa
import pytest

from nanochat_jax.tasks.chats import CustomJSON
from nanochat_jax.tasks.registry import make_task, missing
from nanochat_jax.tokenizer import Tokenizer


def zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


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
    (b'"text"', "a conversation is an object or a list of messages, not 'text'"),
    (b"[1, 2]", "message 0 is not an object but 1"),
    (b'[{"content": "x"}]', "message 0 has no role"),
    (b'{"text": "a document"}', "no conversation: its fields are text, and not messages; conv"),
    (b'[{"role": "user", "content": NaN}]', "not JSON (NaN is no JSON number"),
    (b'[{"role": "user", "content": "\xff"}]', "not valid Unicode"),
    (
        rb'[{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "b"}]',
        "not valid Unicode",
    ),
    (
        b'[{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "x"}]}]',
        "message 1, the assistant's, has a part of type 'x'",
    ),
    (
        b'[{"role": "user", "content": ["a"]}, {"role": "assistant", "content": "b"}]',
        "message 0, the user's, has a part of type None",
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
    with pytest.raises(ValueError, match=r"is a folder; name a file"):
        make_task(f"json:{tmp_path}")


# ---- formats ---------------------------------------------------------------------------------

SYSTEM = {"role": "system", "content": "Be brief."}
HUMAN, GPT = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello ä"}
MASKED = [GOOD[0], {"role": "assistant", "content": "no", "weight": 0}, *GOOD]
READ = [
    ("messages", {"id": 7, "messages": GOOD, "metadata": {"weight": 3}, "tools": []}, GOOD),
    ("messages", {"messages": [GOOD[0] | {"name": "me"}, GOOD[1] | {"weight": 1}]}, GOOD),
    ("messages", {"messages": [SYSTEM | {"role": "developer"}, *GOOD]}, [SYSTEM, *GOOD]),
    ("messages", {"messages": [SYSTEM | {"content": " "}, *GOOD]}, GOOD),
    ("messages", {"messages": [SYSTEM | {"content": None}, *GOOD], "system": ""}, GOOD),
    ("messages", [SYSTEM, SYSTEM | {"content": "Or not."}, *GOOD], "Be brief.\n\nOr not."),
    ("messages", {"messages": MASKED}, MASKED),
    (
        "messages",
        [GOOD[0], GOOD[1] | {"content": [{"type": "text", "text": t} for t in ("hello", " ä")]}],
        GOOD,
    ),
    ("ShareGPT", {"conversations": [HUMAN, GPT], "system": "Be brief."}, [SYSTEM, *GOOD]),
    ("ShareGPT", {"conversations": [{"from": "system", "value": ""}, HUMAN, GPT]}, GOOD),
    ("ShareGPT", {"conversations": [HUMAN | {"weight": 0}, GPT | {"weight": 0}, *GOOD]}, "masked"),
    ("Alpaca", {"instruction": "hi", "input": "", "output": "hello ä", "text": "…"}, GOOD),
    ("Alpaca", {"instruction": "Add.", "input": "1", "output": "1"}, "Add.\n\n1"),
    ("Alpaca", {"instruction": "a", "output": "b", "history": [["hi", "hello ä"]]}, "history"),
    ("Dolly", {"instruction": "Add.", "context": "1", "response": "1"}, "Add.\n\n1"),
    ("prompt/completion", {"prompt": "hi", "completion": "hello ä"}, GOOD),
    ("prompt/completion", {"prompt": [SYSTEM, *MASKED[:3]], "completion": GOOD[1:]}, "prompt"),
    ("question/answer", {"question": "hi", "answer": "hello ä"}, GOOD),
]
SPECIAL = {
    "Be brief.\n\nOr not.": [SYSTEM | {"content": "Be brief.\n\nOr not."}, *GOOD],
    "masked": [GOOD[0], GOOD[1] | {"weight": 0}, *GOOD],
    "Add.\n\n1": [GOOD[0] | {"content": "Add.\n\n1"}, GOOD[1] | {"content": "1"}],
    "history": [*GOOD, GOOD[0] | {"content": "a"}, GOOD[1] | {"content": "b"}],
    "prompt": [SYSTEM, *MASKED],
}


def test_the_formats_that_people_have(tmp_path):
    path = tmp_path / "all.jsonl"
    path.write_text("\n".join(json.dumps(value) for _, value, _ in READ))
    task = make_task(f"json:{path}")
    for (_, value, wanted), one in zip(READ, task, strict=True):
        expected = SPECIAL.get(wanted, wanted) if isinstance(wanted, str) else wanted
        assert one["messages"] == expected, value
    names = list(dict.fromkeys(name for name, _, _ in READ))
    count = {name: sum(name == n for n, _, _ in READ) for name in names}
    assert task.notes == [f"{path}: " + " and ".join(f"{count[n]} as {n}" for n in names)]


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
REFUSED = [
    ({"messages": [GOOD[0], GOOD[1] | {"weight": 0.5}]}, "weight 0.5; only 0 and 1"),
    ({"messages": [GOOD[0], GOOD[1] | {"weight": "0"}]}, "weight '0'"),
    ({"messages": [GOOD[0] | {"weight": 1}, GOOD[1]]}, "the user's, has the weight 1"),
    ({"messages": [GOOD[0], GOOD[1] | {"weight": 0}]}, "nothing to learn"),
    ({"messages": GOOD, "weight": 2}, "'weight'"),
    ({"messages": [GOOD[0], GOOD[1] | {"train": False}]}, "message 1 has the field 'train'"),
    ({"messages": GOOD, "lossMask": [1, 0]}, "'lossMask'"),
    ({"messages": GOOD, "tools": [CALL]}, "'tools'"),
    ({"messages": [GOOD[0], GOOD[1] | {"tool_calls": [CALL]}]}, "'tool_calls'"),
    ({"messages": [GOOD[0], GOOD[1] | {"function_call": CALL}]}, "'function_call'"),
    ({"messages": [*GOOD, {"role": "tool", "content": "3"}]}, "role 'tool'"),
    ({"messages": [GOOD[0], GOOD[1] | {"refusal": "I cannot."}]}, "'refusal'"),
    ({"messages": [GOOD[0], GOOD[1] | {"reasoning_content": "Hm."}]}, "'reasoning_content'"),
    ({"messages": [GOOD[0] | {"content": [{"type": "image_url"}]}, GOOD[1]]}, "type 'image_url'"),
    ({"messages": [GOOD[0] | {"content": 7}, GOOD[1]]}, "content of message 0 must be a string"),
    ({"messages": GOOD, "images": ["a.png"]}, "'images'"),
    ({"messages": [SYSTEM, *GOOD], "system": "Be long."}, "two system messages"),
    ({"messages": [*GOOD, SYSTEM]}, "message 2 is the system's where the user's turn is"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preferences (rejected)"),
    ({"input": {}, "preferred_output": [], "non_preferred_output": []}, "preferences"),
    ({"prompt": "a", "completion": "b", "label": True}, "'label'"),
    ({"instruction": "a", "output": ["b"]}, "output is not a string"),
]


@pytest.mark.parametrize(("value", "why"), REFUSED)
def test_what_would_change_what_is_learned_is_refused_by_name(tmp_path, value, why):
    path = tmp_path / "refused.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(value))
    (skipped,) = make_task(f"json:{path}").skipped
    assert skipped.where == f"{path}, line 2"
    assert why in skipped.why
    path.write_text(json.dumps(value))
    with pytest.raises(ValueError, match=r"none of 1 rows can be used; .*line 1: "):
        make_task(f"json:{path}")


def test_what_has_weight_0_is_read_but_not_learned():
    tokenizer = Tokenizer.train(["no hello hi " * 20], vocab_size=270)
    ids, mask = tokenizer.render_conversation({"messages": MASKED})
    plain, learned = tokenizer.render_conversation(
        {"messages": [m | {"weight": 1} for m in MASKED]}
    )
    first = ids.index(tokenizer.special_id("<|assistant_end|>")) + 1
    assert ids == plain
    assert mask == [0] * first + learned[first:]
    assert sum(learned[:first]) > 0
    with pytest.raises(ValueError, match=r"message 1 has the weight 0.5, not 0 or 1"):
        tokenizer.render_conversation({"messages": [GOOD[0], GOOD[1] | {"weight": 0.5}]})


# ---- files -----------------------------------------------------------------------------------

MANY = [[GOOD[0] | {"content": f"hi {i}\u2028\x85"}, GOOD[1]] for i in range(5)]


def as_lines() -> str:
    return "\r\n".join(json.dumps({"messages": m}, ensure_ascii=False) for m in MANY)


@pytest.mark.parametrize(
    "content",
    [
        as_lines(),
        "\ufeff" + as_lines() + "\n\n",
        json.dumps(MANY),
        json.dumps([{"messages": m} for m in MANY], indent=2, ensure_ascii=False),
        "\ufeff[\n" + as_lines().replace("\r\n", ",\n") + "\n]\n",
    ],
)
@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd])
def test_the_files_that_people_have(tmp_path, content, pack):
    path = tmp_path / "any, [file]*.json"
    path.write_bytes(pack(content.encode()))
    task = CustomJSON(path)
    assert [one["messages"] for one in task] == MANY
    path.unlink()  # the file is read once
    assert task[4]["messages"] == MANY[4]


def test_one_conversation_over_many_lines(tmp_path):
    path = tmp_path / "one.json"
    for value in (GOOD, {"messages": GOOD}):
        path.write_text(json.dumps(value, indent=2))
        assert [one["messages"] for one in CustomJSON(path)] == [GOOD]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[\n{},\n{]\n]", r"is not JSON \(.*line 3\)"),
        (b'[\n{"a": 1},\n\n{"a": -Infinity}]', r"is not JSON \(-Infinity is .*line 4\)"),
        (b'[\n"\xff"]', r"is not valid Unicode \(.*line 2\)"),
        (b"[\n" * 100_000, r"is not JSON .*\(it is nested too deeply"),
        (gzip.compress(b"[]" * 99)[:-9], "cannot be read: Truncated"),
        (zstd(b"[]" * 99)[:-2], "cannot be read: "),
        (gzip.compress(b"[]" * 99).replace(b"\x8b", b"\x8b\x07", 1), "cannot be read: "),
    ],
)
def test_a_damaged_file_is_named(tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{path} {message}"):
        CustomJSON(path)


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
