"""Conversations as rows: the original's rows, no token lost or invented, exact states."""

import json
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_jax.data.conversations import (
    COUNTS,
    PackedRows,
    RenderedDataset,
    conversation_loader,
    cut_to_row,
    estimate_epoch,
    first_batches,
    render_tasks,
)
from nanochat_jax.data.loader import merge_states
from nanochat_jax.tokenizer import SPECIAL_TOKENS, ConversationError, Tokenizer

BOS, END = 500, 501


class Listed(list):
    """(ids, mask) pairs in the place of conversations."""

    def where(self, i: int) -> str:
        return f"listed, example {i}"


def rendering(pairs, packing="best-fit", row_len=65) -> RenderedDataset:
    return RenderedDataset(Listed(pairs), lambda pair: pair, END, packing, row_len)


def answered(length: int, name: int, turns: int = 1) -> tuple[list[int], list[int]]:
    """A conversation of `length` tokens that name it; its turns, of equal length, end with END."""
    ids = [BOS] + [name] * (length - 1)
    mask = [0] + [1] * (length - 1)
    for turn in range(1, turns + 1):
        ids[turn * length // turns - 1] = END
    return ids, mask


def batches(source: RenderedDataset, n: int, **layout) -> list[PackedRows]:
    layout = {"rows": 2, "streams": 1} | layout
    return list(first_batches(source, BOS, n, **layout))


def total(rows: list[PackedRows]) -> dict[str, int]:
    counts = sum(np.asarray(r.counts_RC).sum(0) for r in rows)
    return dict(zip(COUNTS, counts.tolist(), strict=True))


# ---- against the original --------------------------------------------------------------------


@pytest.mark.golden
def test_best_fit_rows_are_those_of_the_original(golden):
    sft = golden.json("packing")["sft"]
    pairs = [(c["ids"], c["mask"]) for c in sft["conversations"]]
    assert sft["runs"]
    for run in sft["runs"]:
        rank, world = run["ddp_rank"], run["ddp_world_size"]
        source = rendering(pairs, row_len=run["max_seq_len"] + 1)
        loader = conversation_loader(
            source,
            golden.json("packing")["bos"],
            rows=run["device_batch_size"] * world,  # a rank of the original is a stream of ours
            streams=world,
            buffer=run["buffer_size"],
            process_index=rank,
            process_count=world,
        )
        with loader:
            for batch in run["batches"]:
                rows = next(loader)
                np.testing.assert_array_equal(rows.inputs_RT, batch["inputs"])
                np.testing.assert_array_equal(rows.targets_RT, batch["targets"])
                taken = loader.get_state()["streams"][str(rank)]["next"]
                assert (rank + taken * world) // len(pairs) + 1 == batch["current_epoch"]


@pytest.mark.golden
def test_conversations_longer_than_a_row_no_longer_clog_the_buffer(golden):
    clogged = golden.json("packing")["sft_clogged"]
    run = clogged["run"]
    pairs = [(c["ids"], c["mask"]) for c in clogged["conversations"]]
    fitting = [pair for pair in pairs if len(pair[0]) <= run["max_seq_len"] + 1]
    assert len(fitting) < len(pairs)
    how = {"rows": run["device_batch_size"], "buffer": run["buffer_size"]}
    rows = batches(rendering(pairs, row_len=run["max_seq_len"] + 1), 100, **how)
    without = batches(rendering(fitting, row_len=run["max_seq_len"] + 1), 100, **how)
    for ours, theirs in zip(rows, without, strict=True):
        np.testing.assert_array_equal(ours.inputs_RT, theirs.inputs_RT)
        np.testing.assert_array_equal(ours.targets_RT, theirs.targets_RT)
    assert all((r.targets_RT >= 0).any() for r in rows)
    assert total(rows)["dropped"] > 0
    only_long = [pair for pair in pairs if pair not in fitting]
    with pytest.raises(ValueError, match=f"none of {len(only_long)} conversations can be used"):
        batches(rendering(only_long, row_len=run["max_seq_len"] + 1), 1)


# ---- what goes in comes out ------------------------------------------------------------------

lengths = st.lists(st.integers(3, 20), min_size=1, max_size=30)


@settings(max_examples=25, deadline=None)
@given(lengths, st.integers(1, 8), st.sampled_from(["best-fit", "one-per-row"]))
def test_every_conversation_is_used_whole_and_as_often_as_any_other(lengths, buffer, packing):
    pairs = [answered(length, name) for name, length in enumerate(lengths)]
    source = rendering(pairs, packing, row_len=20)
    used: list[int] = []
    for rows in batches(source, 2 * len(pairs), rows=1, buffer=buffer):
        ids, targets = rows.inputs_RT[0], rows.targets_RT[0]
        start = 0
        while start + 1 < len(ids) and ids[start + 1] != BOS:
            name = int(ids[start + 1])
            inside = [name] * (lengths[name] - 2)
            end = start + lengths[name]
            assert [*ids[start:end], targets[-1]][: lengths[name]] == [BOS, *inside, END]
            assert targets[start : end - 1].tolist() == [*inside, END]
            used.append(name)
            start = end
        assert (targets[start:] == -1).all()
        assert (ids[start:] == BOS).all()
    # All were taken equally often; what waits in the buffer is late.
    times = np.bincount(used, minlength=len(lengths))
    assert times.max() - times.min() <= 1 + buffer


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(2, 24))
def test_a_stream_of_tokens_loses_none_and_learns_all(lengths, row_len):
    pairs = [([BOS] + [name] * (n - 1), [1] * n) for name, n in enumerate(lengths)]
    text = [i for ids, _ in pairs for i in ids]
    rows = batches(rendering(pairs, "stream", row_len), 12, rows=2)
    inputs = np.concatenate([r.inputs_RT.reshape(-1) for r in rows])
    targets = np.concatenate([r.targets_RT.reshape(-1) for r in rows])
    endless = text * (len(inputs) // len(text) + 2)
    np.testing.assert_array_equal(inputs, endless[: len(inputs)])
    np.testing.assert_array_equal(targets, endless[1 : len(inputs) + 1])
    assert total(rows) == dict.fromkeys(COUNTS, 0)


def test_padding_is_counted_and_never_learned():
    rows = batches(rendering([answered(9, 7)], "one-per-row", row_len=17), 1)[0]
    assert rows.inputs_RT.shape == (2, 16)
    assert (rows.inputs_RT[0, 9:] == BOS).all()
    np.testing.assert_array_equal(rows.targets_RT[0], [7] * 7 + [END] + [-1] * 8)
    assert total([rows]) == {"padding": 14, "dropped": 0, "cut": 0, "skipped": 0}


def test_a_long_conversation_is_cut_after_an_answer_or_dropped():
    ids, mask = map(np.array, answered(40, 7, turns=4))
    for row_len, kept in ((40, 40), (39, 30), (30, 30), (29, 20), (10, 10), (9, 0)):
        cut = cut_to_row(ids, mask, row_len, END)
        assert len(cut.ids) == len(cut.mask) == kept
        assert cut.is_cut == (0 < kept < 40)
    pairs = [answered(40, 1, turns=4), answered(40, 2), answered(8, 3)]
    rows = batches(rendering(pairs, "one-per-row", row_len=25), 3)
    assert [int(r[1]) for batch in rows for r in batch.inputs_RT] == [1, 3] * 3
    assert total(rows)["cut"] == 3
    assert total(rows)["dropped"] == 3


def test_rows_without_anything_to_learn_are_skipped_and_counted():
    silent = ([BOS, 1, 2], [0, 0, 0])
    rows = batches(rendering([silent, silent, answered(5, 9)], "one-per-row", row_len=9), 4, rows=1)
    assert [int(batch.inputs_RT[0, 1]) for batch in rows] == [9] * 4
    assert total(rows)["skipped"] == 8
    with pytest.raises(ValueError, match="nothing to learn"):
        batches(rendering([silent]), 1)


def test_a_conversation_that_cannot_be_rendered_is_left_out_by_name(caplog):
    def render(pair):
        if pair is None:
            raise ConversationError("message 3 has no role")
        return pair

    pairs = Listed([None, answered(5, 9), None])
    rows = batches(RenderedDataset(pairs, render, END, "one-per-row", 9), 3, rows=1)
    assert total(rows)["dropped"] >= 4
    assert caplog.messages == ["listed, example 0 is left out: message 3 has no role"]
    with pytest.raises(ValueError, match="no conversation at all"):
        rendering([])


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), ValueError("no JSON")])
def test_a_conversation_that_cannot_be_read_ends_the_run(error):
    class Damaged(Listed):
        def __getitem__(self, i):
            if i == 5:
                raise error
            return super().__getitem__(i)

    source = RenderedDataset(Damaged([answered(9, 7)] * 12), lambda pair: pair, END, "best-fit", 33)
    with pytest.raises(ValueError, match=r"^listed, example 5 cannot be read: .*(error|JSON)"):
        batches(source, 4, buffer=3)


def test_a_tokenizer_without_the_tokens_of_conversations_is_no_reason_to_leave_them_out():
    trained = Tokenizer.train(["a few words of text " * 20], vocab_size=270)
    lacking = [name for name in SPECIAL_TOKENS if name != "<|user_end|>"]
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    source = render_tasks(
        Listed([{"messages": talk}]), Tokenizer(trained.ranks, special_tokens=lacking), "stream", 9
    )
    with pytest.raises(ValueError, match=r"no special token '<\|user_end\|>'"):
        batches(source, 1)


# ---- parts of streams without anything to learn ----------------------------------------------

SILENT = ([BOS, 1, 2], [0, 0, 0])


@settings(max_examples=20, deadline=None)
@given(
    st.integers(8, 40),
    st.sets(st.integers(0, 39), min_size=1, max_size=3),
    st.sampled_from([SILENT, answered(50, 1)]),
    st.sampled_from(["best-fit", "one-per-row"]),
)
def test_what_one_stream_finds_does_not_speak_for_all(n, usable, other, packing):
    usable = {i % n for i in usable}
    pairs = [answered(6, 10 + i) if i in usable else other for i in range(n)]
    layout = {"rows": 8, "streams": 8, "buffer": 2}
    source = rendering(pairs, packing, row_len=9)
    whole = batches(source, 60, **layout)
    learned = np.concatenate([rows.targets_RT[rows.targets_RT >= 0] for rows in whole])
    assert set(learned) == {END} | {10 + i for i in usable}
    assert all((row >= 0).any() for row in whole[0].targets_RT)
    at = n % 7 + 1
    states = []
    for process in range(2):
        how = {"process_index": process, "process_count": 2}
        with conversation_loader(source, BOS, **layout, **how) as loader:
            list(islice(loader, at))
            states.append(loader.get_state())
    state = json.loads(json.dumps(merge_states(states)))
    with conversation_loader(source, BOS, **layout, state=state) as loader:
        assert_same(whole[at:], list(islice(loader, 60 - at)))


def test_a_state_from_before_streams_read_the_parts_of_others_continues_its_own():
    pairs = [answered(6, 10 + i) for i in range(8)]
    layout = {"rows": 4, "streams": 4}
    source = rendering(pairs, "one-per-row", row_len=9)
    whole = batches(source, 12, **layout)
    with conversation_loader(source, BOS, **layout) as loader:
        list(islice(loader, 5))
        state = loader.get_state()
    for stream in state["streams"].values():
        del stream["fruitful"]
    with conversation_loader(source, BOS, **layout, state=state) as loader:
        assert_same(whole[5:], list(islice(loader, 7)))


def test_a_stream_learns_all_but_messages_of_weight_0():
    tokenizer = Tokenizer.train(["a few words of text " * 20], vocab_size=270)
    question, answer = ({"role": r, "content": f"words {r}"} for r in ("user", "assistant"))
    wrong = {"role": "assistant", "content": "never text", "weight": 0}
    talks = [[question, answer], [question, wrong, question, answer]]
    source = render_tasks(Listed([{"messages": t} for t in talks]), tokenizer, "stream", 500)
    assert source[0].mask.all()
    unlearned = source[1].ids[~source[1].mask].tolist()
    assert unlearned == [*tokenizer.encode("never text"), tokenizer.special_id("<|assistant_end|>")]


def test_conversations_of_a_tokenizer(caplog):
    tokenizer = Tokenizer.train(["a few words of text " * 20], vocab_size=270)
    question = {"role": "user", "content": "a few words"}
    talk = [question, {"role": "assistant", "content": "of <|assistant_end|> text"}] * 6
    source = render_tasks(Listed([{"messages": talk}]), tokenizer, "best-fit", 90)
    rendered = source[0]
    assert rendered.is_cut
    ids, mask = tokenizer.render_conversation({"messages": talk[:4]}, 10**6)
    end = tokenizer.special_id("<|assistant_end|>")
    n_turns = int((rendered.ids == end).sum())
    ids, mask = tokenizer.render_conversation({"messages": talk[: 2 * n_turns]}, 10**6)
    np.testing.assert_array_equal(rendered.ids, ids)
    np.testing.assert_array_equal(rendered.mask, mask)
    assert 91 - (len(ids) - 1) / n_turns < len(ids) <= 91  # one more turn would not fit


# ---- states ----------------------------------------------------------------------------------


def many(n: int = 200) -> list[tuple[list[int], list[int]]]:
    rng = np.random.default_rng(0)
    return [answered(int(rng.integers(3, 90)), i % 400, turns=2) for i in range(n)]


def assert_same(ours: list[PackedRows], theirs: list[PackedRows]) -> None:
    for left, right in zip(ours, theirs, strict=True):
        for a, b in zip(left, right, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("packing", ["best-fit", "one-per-row", "stream"])
def test_any_number_of_processes_continues_with_the_same_rows(packing):
    source = rendering(many(), packing, row_len=33)
    layout = {"rows": 8, "streams": 4, "buffer": 10}
    whole = batches(source, 14, **layout)
    for at in (1, 5, 9):
        states = []
        for process in range(2):
            loader = conversation_loader(
                source, BOS, **layout, process_index=process, process_count=2
            )
            with loader:
                half = list(islice(loader, at))
                states.append(loader.get_state())
            rows = slice(4 * process, 4 * process + 4)
            assert_same([PackedRows(*(a[rows] for a in r)) for r in whole[:at]], half)
        state = json.loads(json.dumps(merge_states(states)))
        with conversation_loader(source, BOS, **layout, state=state) as loader:
            assert_same(whole[at:], list(islice(loader, 14 - at)))
            assert loader.step == 14


def test_a_state_of_other_conversations_is_refused():
    layout = {"rows": 2, "streams": 1, "buffer": 10}
    source = rendering(many())
    with conversation_loader(source, BOS, **layout) as loader:
        next(loader)
        state = loader.get_state()
    longer = [(ids[:-1], mask[:-1]) for ids, mask in many()]
    for other, message in (
        (rendering(many(199)), "data = 200 conversations, this run has 199"),
        (rendering(longer), "other lengths now"),
        (rendering(many(), "stream"), "packing = best-fit"),
    ):
        with pytest.raises(ValueError, match=message):
            conversation_loader(other, BOS, **layout, state=state)
    with pytest.raises(ValueError, match="multiple of the number of processes"):
        conversation_loader(source, BOS, **layout, process_count=2)


# ---- how much there is -----------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["best-fit", "one-per-row", "stream"])
def test_a_pass_is_estimated_from_its_beginning(packing):
    pairs = many(400)
    source = rendering(pairs, packing, row_len=91)
    found, estimate = estimate_epoch(source, BOS), estimate_epoch(source, BOS, sample=150)
    assert found.conversations == 400
    assert 400 <= found.sampled < 410  # a row may reach into the next pass
    assert estimate.sampled < 160
    assert estimate.rows == pytest.approx(found.rows, rel=0.15)
    tokens = sum(len(ids) for ids, _ in pairs)
    if packing == "one-per-row":
        assert found.rows == 400
    elif packing == "stream":
        assert found.rows == pytest.approx(tokens / 90, abs=1)
        assert found.padding_share == 0
    else:
        assert found.rows * (1 - found.padding_share) == pytest.approx(tokens / 90, rel=0.03)
    assert found.digest == estimate_epoch(source, BOS).digest != estimate.digest
