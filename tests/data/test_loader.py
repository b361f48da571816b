"""The input pipeline: the same rows on any number of processes and after any interruption."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_tools import write_shard

from nanochat_jax.data.loader import merge_states
from nanochat_jax.data.packing import BestFitPacker, Document
from nanochat_jax.data.shards import DocumentBlocks, Shards
from nanochat_jax.data.text import (
    REFILL_DOCS,
    cropped_share,
    stream_text,
    train_loader,
    val_batches,
)

ROOT = Path(__file__).resolve().parents[2]


def story(number: int) -> str:
    """A document of 3 to 90 characters that names itself."""
    length = random.Random(number).randint(3, 90)
    return (f"{number} " * 40)[:length]


@pytest.fixture
def shards(make_shards) -> Shards:
    """11 training row groups of uneven sizes in 3 files, and 2 for validation."""
    sizes = [[40, 7, 130, 25], [300, 1, 60], [150, 33, 90, 12], [120, 35]]
    numbers = iter(range(100_000))
    return make_shards([[[story(n) for n in islice(numbers, k)] for k in file] for file in sizes])


def take(loader, steps: int) -> list[np.ndarray]:
    with loader:
        return [next(loader) for _ in range(steps)]


# ---- order -----------------------------------------------------------------------------------


@pytest.mark.golden
def test_documents_come_in_the_original_order_where_the_definitions_coincide(golden, make_shards):
    """With one rank they always coincide; resuming is exact here and approximate there.

    With several ranks the original begins anew in each file (rank r reads the row groups r, r+W, …
    of a file) while our streams stride over the row groups of all files. So the order is the same
    up to the end of the first file whose number of row groups is no multiple of W.
    """
    recorded = golden.json("packing")["document_batches"]
    shards = make_shards(recorded["shards"])
    for case in recorded["cases"]:
        if case["resume"] is not None:
            continue
        paths = shards.train if case["split"] == "train" else shards.val
        passes, ranks = case["split"] == "val", case["world_size"]
        text = stream_text(DocumentBlocks(paths, min_blocks=1), case["rank"], ranks, passes)
        expected = [doc for batch in case["yields"] for doc in batch["texts"]]
        comparable = len(expected) if ranks == 1 else documents_of_rank(recorded, case)
        ours: list[str] = []
        for block in text:
            ours += block
            if len(ours) >= comparable:
                break
        assert comparable > 0
        assert ours[:comparable] == expected[:comparable]


def documents_of_rank(recorded: dict, case: dict) -> int:
    """How many documents a rank reads up to the first file with an uneven number of row groups."""
    count = 0
    for row_groups in recorded["shards"][:-1]:
        count += sum(map(len, row_groups[case["rank"] :: case["world_size"]]))
        if len(row_groups) % case["world_size"]:
            break
    return count


def naive_packer(paths: list[Path], tokenizer, stream: int, streams: int, row_len: int):
    """What packs a stream's rows, from the definition: list the blocks, refill, scan."""
    blocks = DocumentBlocks(paths, min_blocks=streams)
    deliver = (
        [
            Document(0, 0, len(ids), np.array(ids[:row_len], np.int32))
            for ids in tokenizer.encode_batch(texts[at : at + REFILL_DOCS], prepend_bos=True)
        ]
        for visit in count()
        for texts in [blocks[(stream + visit * streams) % len(blocks)]]
        for at in range(0, len(texts), REFILL_DOCS)
    )
    return BestFitPacker(row_len, 100, lambda: next(deliver))


def test_rows_of_a_step_are_ordered_by_stream(shards, byte_tokenizer):
    loader = train_loader(
        shards, byte_tokenizer, rows=12, sequence_len=48, streams=4, buffer_docs=100
    )
    steps = take(loader, 6)
    for stream in range(4):
        packer = naive_packer(shards.train, byte_tokenizer, stream, 4, 49)
        expected = [packer.row() for _ in range(18)]
        ours = [row for step in steps for row in step[stream * 3 : stream * 3 + 3]]
        np.testing.assert_array_equal(ours, expected)
    assert all(step.shape == (12, 49) and step.dtype == np.int32 for step in steps)


@pytest.mark.parametrize("long_documents", ["crop", "continue"])
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_together_give_the_rows_of_one(shards, byte_tokenizer, processes, long_documents):
    shape = {"rows": 8, "sequence_len": 64, "streams": 4, "buffer_docs": 50}
    shape |= {"long_documents": long_documents}
    alone = take(train_loader(shards, byte_tokenizer, **shape), 5)
    parts = [
        take(
            train_loader(shards, byte_tokenizer, process_index=p, process_count=processes, **shape),
            5,
        )
        for p in range(processes)
    ]
    for step, rows in enumerate(alone):
        np.testing.assert_array_equal(np.concatenate([part[step] for part in parts]), rows)


# ---- interruption ----------------------------------------------------------------------------


@settings(max_examples=16, deadline=None)
@given(
    streams=st.sampled_from([1, 2, 3]),
    rows_per_stream=st.integers(1, 3),
    sequence_len=st.integers(8, 120),
    buffer_docs=st.sampled_from([1, 20, 150, 1500]),
    long_documents=st.sampled_from(["crop", "continue"]),
    steps=st.integers(0, 12),
)
def test_the_same_rows_follow_after_restoring_from_json(
    interrupted_shards,
    byte_tokenizer,
    streams,
    rows_per_stream,
    sequence_len,
    buffer_docs,
    long_documents,
    steps,
):
    shape = {
        "rows": streams * rows_per_stream,
        "sequence_len": sequence_len,
        "streams": streams,
        "buffer_docs": buffer_docs,
        "long_documents": long_documents,
    }
    with train_loader(interrupted_shards, byte_tokenizer, **shape) as loader:
        for _ in range(steps):
            next(loader)
        state = json.loads(json.dumps(loader.get_state()))
        expected = [next(loader) for _ in range(6)]
        later, counts = loader.get_state(), loader.cropped_and_packed
    with train_loader(interrupted_shards, byte_tokenizer, state=state, **shape) as resumed:
        assert resumed.get_state() == state
        for done, rows in enumerate(expected):
            assert resumed.step == steps + done
            np.testing.assert_array_equal(next(resumed), rows)
        assert resumed.get_state() == later
        assert resumed.cropped_and_packed == counts


@pytest.fixture(scope="module")
def interrupted_shards(tmp_path_factory) -> Shards:
    folder = tmp_path_factory.mktemp("interrupted")
    numbers = iter(range(10_000))
    for index, sizes in enumerate([[200, 3, 70], [140, 1], [20]]):
        groups = [[story(n) for n in islice(numbers, size)] for size in sizes]
        write_shard(folder / f"shard_{index:05d}.parquet", groups)
    paths = sorted(folder.iterdir())
    return Shards(train=paths[:-1], val=paths[-1:])


@pytest.mark.parametrize("long_documents", ["crop", "continue"])
def test_another_number_of_processes_can_resume(shards, byte_tokenizer, long_documents):
    shape = {"rows": 8, "sequence_len": 40, "streams": 4, "buffer_docs": 64}
    shape |= {"long_documents": long_documents}

    def loaders(count: int, state=None):
        return [
            train_loader(
                shards, byte_tokenizer, process_index=p, process_count=count, state=state, **shape
            )
            for p in range(count)
        ]

    uninterrupted = take(train_loader(shards, byte_tokenizer, **shape), 8)
    state = None
    done = 0
    for processes, steps in [(4, 3), (1, 2), (2, 3)]:
        running = loaders(processes, state)
        for _ in range(steps):
            rows = np.concatenate([next(loader) for loader in running])
            np.testing.assert_array_equal(rows, uninterrupted[done])
            done += 1
        state = json.loads(json.dumps(merge_states([loader.get_state() for loader in running])))
        for loader in running:
            loader.close()


def test_the_state_does_not_grow_with_the_text(shards, byte_tokenizer):
    with train_loader(
        shards, byte_tokenizer, rows=4, sequence_len=64, streams=4, buffer_docs=100
    ) as loader:
        sizes = [len(json.dumps(loader.get_state())) for _ in range(20) if next(loader) is not None]
    documents = 4 * (100 + REFILL_DOCS)
    assert max(sizes) < 6 * documents + 1000


RUN = """
    import hashlib, json, sys
    sys.path[:0] = sys.argv[1:3]
    from shard_tools import ByteTokenizer
    from nanochat_jax.data.shards import list_shards
    from nanochat_jax.data.text import train_loader
    loader = train_loader(
        list_shards(sys.argv[3]),
        ByteTokenizer(),
        rows=4,
        sequence_len=64,
        streams=2,
        buffer_docs=99,
        long_documents=sys.argv[4],
    )
    for rows in loader:
        line = {"rows": rows.tolist(), "state": loader.get_state()}
        print(json.dumps(line), flush=True)
"""


@pytest.mark.parametrize("long_documents", ["crop", "continue"])
def test_kill_9_at_any_moment_loses_nothing(shards, byte_tokenizer, tmp_path, long_documents):
    """A process is killed while it works; the last state it printed gives exactly what follows."""
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(RUN), encoding="utf-8")
    out = tmp_path / "out.jsonl"
    here = str(Path(__file__).parent)
    with out.open("wb") as stream:
        process = subprocess.Popen(
            [
                sys.executable,
                str(script),
                here,
                str(ROOT),
                str(shards.train[0].parent),
                long_documents,
            ],
            stdout=stream,
        )
        while out.stat().st_size < 200_000 and process.poll() is None:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    whole_lines = out.read_text(encoding="utf-8").split("\n")[:-1]
    lines = [json.loads(line) for line in whole_lines]
    assert len(lines) > 3
    shape = {"rows": 4, "sequence_len": 64, "streams": 2, "buffer_docs": 99}
    shape |= {"long_documents": long_documents}
    for line, following in [(lines[0], lines[1:4]), (lines[-2], lines[-1:])]:
        with train_loader(shards, byte_tokenizer, state=line["state"], **shape) as loader:
            for expected in following:
                np.testing.assert_array_equal(next(loader), expected["rows"])


def test_a_state_from_before_documents_could_continue_is_one_of_cropping(shards, byte_tokenizer):
    shape = {"rows": 4, "sequence_len": 30, "streams": 2}
    with train_loader(shards, byte_tokenizer, long_documents="crop", **shape) as loader:
        for _ in range(5):
            next(loader)
        state = json.loads(json.dumps(loader.get_state()))
        expected = [next(loader) for _ in range(5)]
    del state["long_documents"]
    for stream in state["streams"].values():
        assert stream.keys() - {"packed", "cropped"} == {"next", "tokens", "buffer"}
        del stream["packed"], stream["cropped"]
    with train_loader(
        shards, byte_tokenizer, long_documents="crop", state=state, **shape
    ) as resumed:
        np.testing.assert_array_equal([next(resumed) for _ in range(5)], expected)
        assert resumed.cropped_and_packed[1] == 5 * 4 * 31  # known from here on
    with pytest.raises(ValueError, match="long_documents = crop, this run has continue"):
        train_loader(shards, byte_tokenizer, long_documents="continue", state=state, **shape)


# ---- what is lost ----------------------------------------------------------------------------


def test_what_was_cropped_up_to_a_step_is_known(shards, byte_tokenizer):
    shape = {"rows": 4, "sequence_len": 48, "streams": 4, "buffer_docs": 100}
    packers = [naive_packer(shards.train, byte_tokenizer, s, 4, 49) for s in range(4)]
    parts = [
        train_loader(shards, byte_tokenizer, process_index=p, process_count=2, **shape)
        for p in range(2)
    ]
    with train_loader(shards, byte_tokenizer, **shape) as loader, parts[0], parts[1]:
        for step in range(1, 30):
            for source in (loader, *parts):
                next(source)
            for packer in packers:
                packer.row()
            cropped = sum(packer.cropped for packer in packers)
            assert loader.cropped_and_packed == (cropped, 4 * 49 * step)
            of_parts = [part.cropped_and_packed for part in parts]
            assert tuple(map(sum, zip(*of_parts, strict=True))) == loader.cropped_and_packed
    assert cropped > 0
    shape |= {"long_documents": "continue"}
    with train_loader(shards, byte_tokenizer, **shape) as loader:
        next(loader)
        assert loader.cropped_and_packed == (0, 4 * 49)


@pytest.mark.parametrize(("length", "share"), [(299, 2 / 3), (99, 0), (149, 1 / 3), (9, 0)])
def test_the_share_that_cropping_loses_is_measured(make_shards, byte_tokenizer, length, share):
    """Of documents that fill a row of 100 exactly, or three, or one and a half, or a tenth."""
    shards = make_shards([[["x" * length] * 300], [["y"]]])
    assert cropped_share(shards, byte_tokenizer, 99) == pytest.approx(share, abs=0.005)


def test_a_text_of_a_few_long_documents_is_read_to_its_end(make_shards, byte_tokenizer):
    """Each stream's documents take turns, and none starts again before it is used up."""
    books = [chr(ord("A") + i) * 400 for i in range(24)]
    shards = make_shards([[books], [books[:1]]])
    shape = {"rows": 16, "sequence_len": 40, "streams": 8, "long_documents": "continue"}
    with train_loader(shards, byte_tokenizer, **shape) as loader:
        steps = [next(loader) for _ in range(24 * 10 // 16)]  # a row holds 40 letters
    used = np.bincount(np.concatenate(steps).ravel(), minlength=257)[ord("A") :][:24]
    assert all(used == 400)
    for step in steps[:12]:
        assert len({bytes(row[1:2].astype(np.uint8)) for row in step}) == 16


# ---- mistakes --------------------------------------------------------------------------------


def test_a_state_of_something_else_is_refused(shards, make_shards, byte_tokenizer):
    shape = {"rows": 4, "sequence_len": 32, "streams": 2}
    with train_loader(shards, byte_tokenizer, **shape) as loader:
        next(loader)
        state = loader.get_state()
    with pytest.raises(ValueError, match="sequence_len"):
        train_loader(shards, byte_tokenizer, state=state, **(shape | {"sequence_len": 33}))
    other = make_shards([[["one", "two"]], [["three"]]], name="other")
    with pytest.raises(ValueError, match="data"):
        train_loader(other, byte_tokenizer, state=state, **shape)
    half = state | {"streams": {"0": state["streams"]["0"]}}
    with pytest.raises(ValueError, match="lacks stream 1"):
        train_loader(shards, byte_tokenizer, state=half, **shape)

    class Doubling:
        def encode_batch(self, texts, *, prepend_bos=False, threads=1):
            return [ids * 2 for ids in byte_tokenizer.encode_batch(texts, prepend_bos=prepend_bos)]

    with pytest.raises(ValueError, match="tokenizer"):
        train_loader(shards, Doubling(), state=state, **shape)
    with pytest.raises(ValueError, match="different"):
        merge_states([state, state | {"step": 7}])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 6}, "use 2 streams"),
        ({"process_count": 3}, "multiple of the number of processes"),
        ({"streams": 2000, "rows": 2000}, "fewer streams"),
    ],
)
def test_a_layout_that_does_not_divide_says_what_would(shards, byte_tokenizer, change, message):
    with pytest.raises(ValueError, match=message):
        train_loader(
            shards, byte_tokenizer, **({"rows": 8, "sequence_len": 32, "streams": 4} | change)
        )


def test_a_damaged_row_group_stops_the_run_and_names_the_file(shards, byte_tokenizer):
    damaged = shards.train[1]
    content = bytearray(damaged.read_bytes())
    content[4:400] = bytes(396)  # the first pages; the footer stays readable
    damaged.write_bytes(content)
    loader = train_loader(shards, byte_tokenizer, rows=1, sequence_len=64, streams=1, buffer_docs=9)
    with pytest.raises(ValueError, match=damaged.name):
        list(islice(loader, 500))
    with pytest.raises(ValueError, match="closed"):
        next(loader)


def test_close_ends_the_threads(shards, byte_tokenizer):
    before = set(threading.enumerate())
    loader = train_loader(shards, byte_tokenizer, rows=4, sequence_len=32, streams=4)
    next(loader)
    assert set(threading.enumerate()) - before
    loader.close()
    loader.close()
    assert not set(threading.enumerate()) - before


# ---- validation ------------------------------------------------------------------------------


@pytest.mark.parametrize("long_documents", ["crop", "continue"])
def test_validation_is_the_same_each_time_and_on_any_number_of_processes(
    shards, byte_tokenizer, long_documents
):
    shape = {"rows": 8, "sequence_len": 32, "n_batches": 3, "streams": 4}
    shape |= {"long_documents": long_documents}
    first = list(val_batches(shards, byte_tokenizer, **shape))
    again = list(val_batches(shards, byte_tokenizer, **shape))
    np.testing.assert_array_equal(first, again)
    parts = [
        list(val_batches(shards, byte_tokenizer, process_index=p, process_count=4, **shape))
        for p in range(4)
    ]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), first)


def test_validation_rows_do_not_depend_on_the_batch_size(shards, byte_tokenizer):
    def rows(batch: int) -> list[tuple[int, ...]]:
        batches = val_batches(
            shards, byte_tokenizer, rows=batch, sequence_len=32, n_batches=48 // batch, streams=4
        )
        return sorted(tuple(row) for step in batches for row in step.tolist())

    assert rows(4) == rows(8) == rows(16)


def test_short_validation_text_is_used_up_before_it_repeats(shards, byte_tokenizer):
    """One stream over the 155 validation documents: in each pass every one is begun just once."""
    batches = val_batches(
        shards, byte_tokenizer, rows=1, sequence_len=100, n_batches=200, streams=1
    )
    tokens = np.concatenate([batch[0] for batch in batches])
    starts = np.flatnonzero(tokens == byte_tokenizer.bos_id)
    documents = 155
    assert len(starts) > 2 * documents
    for one_pass in (starts[:documents], starts[documents : 2 * documents]):
        opening = [bytes(tokens[start + 1 : start + 5].clip(0, 255)) for start in one_pass]
        names = [text.split(b" ")[0] for text in opening if b" " in text]  # not cropped too early
        assert len(names) > 140
        assert len(names) == len(set(names))


def test_three_documents_are_enough_to_validate_on(make_shards, byte_tokenizer):
    shards = make_shards([[["train"]], [["a", "bc", "def"]]])
    first, second = val_batches(shards, byte_tokenizer, rows=8, sequence_len=20, n_batches=2)
    assert first.shape == second.shape == (8, 21)
    assert set(np.concatenate([first, second]).ravel()) == {256, *b"abcdef"}


def test_long_validation_documents_are_used_up_before_they_repeat(make_shards, byte_tokenizer):
    """Five documents of one stream: in each pass every byte of theirs comes once, in order."""
    docs = ["".join(map(chr, range(33 + i, 127))) * 3 for i in range(5)]
    shards = make_shards([[["train"]], [docs[:3], docs[3:]]])
    batches = val_batches(
        shards,
        byte_tokenizer,
        rows=1,
        sequence_len=50,
        n_batches=80,
        streams=1,
        long_documents="continue",
    )
    tokens = np.concatenate([batch[0] for batch in batches])
    text = tokens[tokens != byte_tokenizer.bos_id]
    total = sum(map(len, docs))
    assert len(text) > 2 * total
    one_pass = np.bincount(np.frombuffer("".join(docs).encode(), np.uint8))
    for begin in (0, total):
        np.testing.assert_array_equal(np.bincount(text[begin : begin + total]), one_pass)
