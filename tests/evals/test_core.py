"""CORE against the original's prompts, tokens, losses and answers, and on the real bundle."""

import base64
import json
import random

import numpy as np
import pytest

from nanochat_jax.evals.core import (
    PreparedQuestion,
    TaskResult,
    comparison,
    core_csv,
    core_json,
    evaluate_core,
    is_correct,
)
from nanochat_jax.evals.core_tasks import (
    Bundle,
    CoreTask,
    PromptEncoder,
    clip,
    examples_for,
    find_scored,
    prompts,
    read_bundle,
)
from nanochat_jax.evals.scoring import Scorer
from nanochat_jax.evals.scoring_batches import SpanScore
from nanochat_jax.gpt import GPT, GPTConfig
from nanochat_jax.interop.names import params_from_torch
from nanochat_jax.sharding import from_logical, make_mesh
from nanochat_jax.tokenizer import Tokenizer

# --- golden ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original(golden):
    return golden.json("core_eval")


@pytest.fixture(scope="module")
def tokenizer(golden, original) -> Tokenizer:
    ranks = golden.json("tokenizer")["trainings"][original["tokenizer"]]["mergeable_ranks_b64"]
    return Tokenizer([base64.b64decode(rank) for rank in ranks])


@pytest.fixture(scope="module")
def model_and_params(golden):
    config = GPTConfig(**golden.json("gpt2026_forward")["config"])
    weights = golden.npz("gpt2026_forward")
    named = {n[6:]: w for n, w in weights.items() if n.startswith("param/")}
    return GPT(config), params_from_torch(config, named)


@pytest.fixture(scope="module")
def scorer(model_and_params):
    model, params = model_and_params
    mesh = make_mesh(2)
    return Scorer(model, mesh, from_logical(params, mesh), tokens_per_device=65536)


def encode_rows(task, tokenizer):
    meta, data = task["task_meta"], task["data"]
    kind, delimiter = meta["task_type"], meta["continuation_delimiter"]
    encoder = PromptEncoder(tokenizer, data, kind, delimiter)
    for row in task["rows"]:
        examples = examples_for(row["idx"], len(data), meta["num_fewshot"])
        yield row, examples, find_scored(encoder.prompts(row["idx"], examples), kind)


@pytest.mark.golden
def test_the_original_s_prompts_and_tokens(original, tokenizer):
    for task in original["tasks"]:
        meta, data = task["task_meta"], task["data"]
        kind, delimiter = meta["task_type"], meta["continuation_delimiter"]
        for row, examples, spans in encode_rows(task, tokenizer):
            assert examples == row["fewshot_indices"]
            shown = [data[i] for i in examples]
            assert prompts(shown, data[row["idx"]], kind, delimiter) == row["prompts"]
            assert [span.tokens.tolist() for span in spans] == row["tokens"]
            assert [span.start for span in spans] == row["start_idxs"]
            assert [len(span.tokens) for span in spans] == row["end_idxs"]


def check_row(row, data, scores):
    asked = PreparedQuestion([], data[row["idx"]].get("gold"))
    if "mean_losses" not in row:
        assert scores[0].mean_loss == pytest.approx(row["mean_loss"], abs=2e-5)
        tokens = zip(row["predicted_tokens"], row["actual_tokens"], strict=True)
        assert scores[0].is_argmax.tolist() == [predicted == actual for predicted, actual in tokens]
        assert is_correct(asked, scores) == row["correct"]
        return
    losses = [score.mean_loss for score in scores]
    for loss, wanted in zip(losses, row["mean_losses"], strict=True):
        assert np.isfinite(loss)  # also where the original has NaN
        assert wanted is None or loss == pytest.approx(wanted, abs=2e-5)
    if None not in row["mean_losses"]:
        assert losses.index(min(losses)) == row["pred_idx"]
        assert is_correct(asked, scores) == row["correct"]


@pytest.mark.golden
def test_the_original_s_losses_and_answers(original, tokenizer, scorer):
    rows, groups = [], []
    for task in original["tasks"]:
        for row, _, spans in encode_rows(task, tokenizer):
            rows.append((row, task["data"]))
            groups.append([clip(span) for span in spans])
    for (row, data), scores in zip(rows, scorer.score(groups), strict=True):
        check_row(row, data, scores)


@pytest.mark.golden
def test_the_original_s_answers_on_cut_prompts(original, tokenizer, scorer):
    for cut in original["truncated"]:
        task = {**original["tasks"][cut["of"]], "rows": cut["rows"]}
        groups, rows = [], []
        for row, _, spans in encode_rows(task, tokenizer):
            group = [clip(span, cut["max_seq_len"]) for span in spans]
            surplus = [len(w.tokens) - len(c.tokens) for w, c in zip(spans, group, strict=True)]
            assert surplus == row["cropped"]
            if None not in row.get("mean_losses", []):
                assert [span.start for span in group] == row["start_idxs_after_crop"]
            groups.append(group)
            rows.append(row)
        for row, scores in zip(rows, scorer.score(groups), strict=True):
            check_row(row, task["data"], scores)


@pytest.mark.golden
def test_a_continuation_whose_tokens_change_the_context_s(original, tokenizer):
    wrong = original["lm_non_prefix_error"]
    encoder = PromptEncoder(tokenizer, [wrong["item"]], "language_modeling", wrong["delimiter"])
    with pytest.raises(ValueError, match="no prefix"):
        find_scored(encoder.prompts(0, []), "language_modeling")


@pytest.mark.golden
def test_the_original_s_accuracies(original, tokenizer, scorer, tmp_path):
    """Through a bundle on disk; where an option had no loss, up to that question."""
    tasks = [write_task(tmp_path, i, task) for i, task in enumerate(original["tasks"])]
    results = evaluate_core(scorer, tokenizer, Bundle(tasks, []))
    for task, result in zip(original["tasks"], results, strict=True):
        unclear = sum(None in row.get("mean_losses", []) for row in task["rows"])
        wrong_by = abs(result.correct.sum() - task["accuracy"] * len(task["rows"]))
        assert wrong_by <= unclear + 1e-4


def write_task(folder, number: int, task) -> CoreTask:
    """Written so that shuffling gives the golden order back."""
    order = list(range(len(task["data"])))
    random.Random(1337).shuffle(order)
    lines = [""] * len(order)
    for place, source in enumerate(order):
        lines[source] = json.dumps(task["data"][place])
    (folder / "eval_data").mkdir(exist_ok=True)
    (folder / "eval_data" / f"{number}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    meta = task["task_meta"]
    return CoreTask(
        f"task {number}", meta["task_type"], f"{number}.jsonl", meta["num_fewshot"],
        meta["continuation_delimiter"], 0.0, folder,
    )  # fmt: skip


@pytest.mark.golden
def test_the_original_s_shuffle(original):
    order = list(range(30))
    random.Random(1337).shuffle(order)
    assert order == original["shuffle1337_of_range30"]


# --- options whose tokens all begin another option ------------------------------------------------


def test_the_winner_does_not_depend_on_the_place_of_an_option_within_another():
    rows = [np.array(row, np.int32) for row in ([9, 1, 2], [9, 1, 2, 3, 4], [9, 1, 2, 5])]
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        spans = map(clip, find_scored([rows[i] for i in order], "multiple_choice"))
        scored = {i: s.tokens[s.start :].tolist() for i, s in zip(order, spans, strict=True)}
        assert scored == {0: [2], 1: [3, 4], 2: [5]}


@pytest.mark.parametrize("kind", ["multiple_choice", "schema"])
def test_equal_options_have_a_loss_too(kind):
    row = np.array([9, 1, 2], np.int32)
    for span in map(clip, find_scored([row, row.copy()], kind)):
        assert 1 <= span.start < len(span.tokens)


def test_an_empty_context_leaves_no_blank_line_before_the_continuation():
    """The original's prompts for these two questions."""
    example, empty = ({"context": c, "continuation": "a"} for c in ("x", " "))
    assert prompts([example], empty, "language_modeling", " ") == ["x a", "x a\n\n a"]


def test_the_first_of_equal_options_is_taken():
    score = SpanScore(np.ones(2, np.float32), np.ones(2, bool))
    assert is_correct(PreparedQuestion([], 0), [score, score])
    assert not is_correct(PreparedQuestion([], 1), [score, score])


# --- the real bundle ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(real_data):
    return read_bundle(real_data / "eval_bundle.zip")


def test_the_bundle_has_its_22_tasks_and_gpt_2_s_scores(bundle):
    assert len(bundle.tasks) == 22
    counts = {task.kind: 0 for task in bundle.tasks}
    for task in bundle.tasks:
        counts[task.kind] += 1
    assert counts == {"multiple_choice": 11, "schema": 2, "language_modeling": 9}
    by_label = {task.label: task for task in bundle.tasks}
    assert by_label["boolq"].baseline == pytest.approx(0.62)
    assert by_label["jeopardy"].delimiter == "\nAnswer: "
    assert [each.model for each in bundle.published] == [
        "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"
    ]  # fmt: skip
    xl = bundle.published[-1]
    assert xl.core == pytest.approx(0.256525)
    for task in bundle.tasks:  # our centring is theirs
        accuracy, centre = xl.scores[task.label]
        assert (accuracy - task.baseline) / (1 - task.baseline) == pytest.approx(centre, abs=2e-6)
    assert np.mean([centre for _, centre in xl.scores.values()]) == pytest.approx(xl.core, abs=1e-6)


def test_encoding_examples_apart_changes_no_token(bundle, tokenizer):
    """In every task, for its longest questions too."""
    for task in bundle.tasks:
        data = task.questions(40)
        encoder = PromptEncoder(tokenizer, data, task.kind, task.delimiter)
        for index in range(4):
            examples = examples_for(index, len(data), task.num_fewshot)
            shown = [data[i] for i in examples]
            whole = prompts(shown, data[index], task.kind, task.delimiter)
            wanted = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in whole]
            assert [row.tolist() for row in encoder.prompts(index, examples)] == wanted, task.label


def test_a_whole_report_of_a_few_questions_each(bundle, tokenizer, scorer):
    few = Bundle(bundle.tasks[:2] + bundle.tasks[5:6] + bundle.tasks[11:12], bundle.published)
    seen = []
    results = evaluate_core(
        scorer, tokenizer, few, max_per_task=3, max_length=500,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert [len(result.correct) for result in results] == [3] * 4
    assert seen[-1][0] == seen[-1][1]
    found = core_json(results)
    low, high = found["core_interval"]
    assert low <= found["core"] <= high
    assert found["core"] == pytest.approx(np.mean([result.centred for result in results]))
    table = comparison(found, bundle.published).splitlines()
    assert table[0].split()[-4:] == ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]
    assert table[-1].endswith("0.2565")
    assert len({len(line) for line in table}) == 1


def test_our_csv_reads_as_the_published_ones(bundle, tmp_path):
    results = [
        TaskResult(task.label, task.baseline, np.array([True, False])) for task in bundle.tasks
    ]
    ours = core_csv(results)
    theirs = next(f for f in bundle.tasks[0].folder.iterdir() if f.name.endswith("gpt2.csv"))
    theirs_lines = theirs.read_text(encoding="utf-8").splitlines()
    assert [line[:35] for line in ours.splitlines()] == [line[:35] for line in theirs_lines]
    assert [len(line) for line in ours.splitlines()] == [len(line) for line in theirs_lines]


# --- a damaged bundle -----------------------------------------------------------------------------

GOOD = {"query": "a", "choices": ["b", "c"], "gold": 1}


def write_bundle(folder, line=None, kind="multiple_choice", baseline="task"):
    (folder / "eval_data").mkdir(parents=True)
    entry = f"- {{label: task, dataset_uri: t.jsonl, num_fewshot: [1], icl_task_type: {kind}}}\n"
    (folder / "core.yaml").write_text(f"icl_tasks:\n{entry}", encoding="utf-8")
    meta = f"Eval Task,Random baseline\n{baseline},50\n"
    (folder / "eval_meta_data.csv").write_text(meta, encoding="utf-8")
    lines = [json.dumps(GOOD), line if line is not None else json.dumps(GOOD)]
    (folder / "eval_data" / "t.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2 needs 'query'"),
        (json.dumps({**GOOD, "choices": "bc"}), "line 2 needs 'choices' as list"),
        (json.dumps({**GOOD, "gold": 2}), "line 2: the right answer, 2, is not among"),
    ],
)
def test_a_bad_question_is_named(tmp_path, line, message):
    task = read_bundle(write_bundle(tmp_path / "bundle", line)).tasks[0]
    with pytest.raises(ValueError, match=message):
        task.questions()


def test_what_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(ValueError, match="of type 'riddle'"):
        read_bundle(write_bundle(tmp_path / "kind", kind="riddle"))
    with pytest.raises(ValueError, match="no baseline for the task task"):
        read_bundle(write_bundle(tmp_path / "baseline", baseline="other"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="it has no core"):
        read_bundle(tmp_path / "empty")
    (tmp_path / "text").write_text("hello", encoding="utf-8")
    with pytest.raises(ValueError, match="neither a folder nor a zip"):
        read_bundle(tmp_path / "text")
    good = write_bundle(tmp_path / "good")
    (good / "eval_data" / "t.jsonl").unlink()
    with pytest.raises(ValueError, match="not whole"):
        read_bundle(good).tasks[0].questions()


# --- the scripts ----------------------------------------------------------------------------------


@pytest.fixture
def run_with_bundle(tiny_copy):
    """A run in a base directory that has a bundle of one task."""
    write_bundle(tiny_copy / "eval_bundle")
    return tiny_copy / "runs" / "base"


def test_eval_base_finds_the_bundle_in_the_base_directory(run_with_bundle, call):
    output = call("eval_base.py", "--run=base", "--eval=core", "--n-devices=2")
    result = json.loads(output.strip().splitlines()[-1])
    path = run_with_bundle / "eval_base.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bpb": 1.5}))
    assert result["core_tasks"]["task"]["questions"] == 2
    assert result["core"] == pytest.approx(2 * result["core_tasks"]["task"]["accuracy"] - 1)
    assert (run_with_bundle / "eval_core.csv").read_text().splitlines()[-1].startswith("CORE")
    call("eval_base.py", "--run=base", "--eval=core", "--max-per-task=1")
    kept = json.loads(path.read_text())  # of the same checkpoint
    assert kept["bpb"] == 1.5
    assert kept["core_tasks"]["task"]["questions"] == 1


def test_what_is_measured_is_kept_when_a_later_evaluation_fails(run_with_bundle, call):
    call("eval_base.py", "--run=base", "--eval=core,bpb", "--dataset=nowhere")
    kept = json.loads((run_with_bundle / "eval_base.json").read_text())
    assert kept["core_tasks"]["task"]["questions"] == 2


def test_without_a_bundle_one_sentence_says_what_to_do(run_with_bundle, call):
    absent = call("eval_base.py", "--run=base", "--eval=core", "--bundle=/nowhere/at_all.zip")
    assert "there is no CORE bundle at /nowhere/at_all.zip; fetch it with" in absent
    assert "leaves no question" in call("eval_base.py", "--run=base", "--max-per-task=0")


def test_the_benchmark_s_two_ways_agree(run_with_bundle, call):
    result = json.loads(call("bench_core.py", "--run=base").strip().splitlines()[-1])
    assert result["same_answers"] == result["questions"] == 2
    assert result["times"] > 0
