"""The original's conversations, permutations and judgements, from the golden file `tasks`."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from nanochat_jax.tasks.humaneval import extract_imports, extract_program
from nanochat_jax.tasks.mixture import Mixture, Slice, TaskSequence
from nanochat_jax.tasks.registry import make_task
from nanochat_jax.tasks.spelling import SimpleSpelling, SpellingBee
from nanochat_jax.tasks.task import extract_answer, multiple_choice

pytestmark = pytest.mark.golden

# The golden family, our name of the task, and a split that it has.
FAMILIES = (
    ("gsm8k", "gsm8k", "test"),
    ("mmlu", "mmlu", "test"),
    ("arc", "arc-easy", "test"),
    ("humaneval", "humaneval", "test"),
    ("smoltalk", "smoltalk", "train"),
)


@pytest.fixture
def tasks(golden):
    return golden.json("tasks")


@pytest.fixture
def made(tasks, put_rows):
    """The tasks over the golden rows, by family."""
    for family, name, split in FAMILIES:
        put_rows(name, split, tasks[family]["rows"])
    return {family: make_task(name, split) for family, name, split in FAMILIES}


def plain(value):
    """Tuples as the lists that JSON has."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def number(answer):
    try:
        return None if answer is None else float(answer.rstrip("."))
    except ValueError:  # "1.2.3"
        return None


def first_message(conversation):
    return conversation["messages"][0]["content"]


@pytest.mark.parametrize("family", [family for family, *_ in FAMILIES])
def test_conversations_and_their_order(tasks, made, family):
    expected = tasks[family]
    assert len(made[family]) == len(expected["rows"])
    assert [plain(one) for one in made[family]] == expected["examples"]
    rows = [int(made[family].where(i).rpartition(" ")[2]) - 1 for i in range(len(made[family]))]
    assert rows == expected["permutation"]


def test_helpers(tasks):
    for case in tasks["gsm8k"]["extract_answer"]:
        assert extract_answer(case["text"]) == case["answer"], case
    for case in tasks["humaneval"]["extract_program"]:
        assert extract_program(case["completion"]) == case["program"], case
    for case in tasks["humaneval"]["extract_imports"]:
        assert extract_imports(case["prompt"]) == case["imports"], case
    for case in tasks["render_mc"]:
        rendered = multiple_choice(case["question"], case["letters"], case["choices"])
        assert rendered == case["prompt"]


@pytest.mark.parametrize("family", ["mmlu", "arc"])
def test_letters_are_judged_alike(tasks, made, family):
    for case in tasks[family]["evaluate"]:
        task = made[family]
        assert task.evaluate(task[case["index"]], case["response"]) is case["result"], case


def test_numbers_are_judged_alike_but_as_numbers(tasks, made):
    """The original compares strings, and None with None."""
    task = made["gsm8k"]
    for case in tasks["gsm8k"]["evaluate"]:
        conversation = task[case["index"]]
        texts = conversation["messages"][1]["content"][-1]["text"], case["response"]
        wanted, given = (number(extract_answer(text)) for text in texts)
        right = wanted is not None and wanted == given
        assert task.evaluate(conversation, case["response"]) is right, case
        assert task.reward(conversation, case["response"]) == float(right)
        if case["evaluate"] and wanted is not None:
            assert right, case


def test_programs_are_judged_alike_but_for_leaving_early(tasks, made):
    task, cases = made["humaneval"], tasks["humaneval"]["evaluate"]

    def judge(case) -> bool:
        return task.evaluate(task[case["index"]], case["completion"])

    with ThreadPoolExecutor(4) as pool:  # some programs run until they are stopped
        judged = list(pool.map(judge, cases))
    for case, right in zip(cases, judged, strict=True):
        leaves_early = "exit(0)" in case["completion"] or "SystemExit" in case["completion"]
        assert right is (case["success"] and not leaves_early), case


def test_mixtures_sequences_and_slices(tasks, made):
    expected = tasks["mixture"]
    mixture = Mixture([made[name] for name in expected["tasks"]])
    assert [plain(mixture.locate(i)) for i in range(len(mixture))] == expected["index_map"]
    assert [first_message(one) for one in mixture] == expected["first_user_messages"]
    row = TaskSequence([made[name] for name in expected["sequence_tasks"]])
    assert [first_message(one) for one in row] == expected["sequence_first_messages"]
    for bounds, messages in tasks["gsm8k"]["sliced"].items():
        part = Slice(
            made["gsm8k"], **{k: int(v) for k, v in (b.split("=") for b in bounds.split(","))}
        )
        assert [first_message(one) for one in part] == messages


@pytest.mark.parametrize("split", ["train", "test"])
def test_words_letters_and_structure_of_the_spelling_tasks(tasks, split):
    """The wording is ours; what is asked for, and the form of the answer, are the original's."""
    expected = tasks["spellingbee"]
    bee, spelling = (task(expected["words"], split) for task in (SpellingBee, SimpleSpelling))
    for case in expected[f"SpellingBee_{split}"]:
        theirs = case["conversation"]["messages"][1]["content"]
        conversation = bee[case["index"]]
        ours = conversation["messages"][1]["content"]
        assert [part["type"] for part in ours] == [part["type"] for part in theirs]
        calls = [[p["text"] for p in parts if p["type"] != "text"] for parts in (ours, theirs)]
        assert calls[0] == calls[1]
        assert bee.evaluate(conversation, theirs[-1]["text"])
    for case in expected[f"SimpleSpelling_{split}"]:
        answer = case["conversation"]["messages"][1]["content"]
        assert spelling[case["index"]]["messages"][1]["content"] == answer
