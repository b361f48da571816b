"""The trainer in Rust, through its border: merges, sources, limits, errors, signals, threads."""

import base64
import io
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_jax import _rustbpe
from nanochat_jax.tokenizer import SPLIT_PATTERN

DOCS = [
    f"Document {i}: the cat sat on the mat, wasn't it {i * 37}?\n\nÜber 日本語 ½"
    for i in range(400)
]


def train(texts=None, parquet=(), **changes):
    settings = {
        "column": "text",
        "pattern": SPLIT_PATTERN,
        "vocab_size": 400,
        "doc_cap": None,
        "max_chars": None,
        "threads": 2,
        "progress": None,
    }
    return _rustbpe.train(texts, list(parquet), **(settings | changes))


def write(path: Path, texts, column="text", **options) -> Path:
    pq.write_table(pa.table({"id": range(len(texts)), column: texts}), path, **options)
    return path


# --- merges ---------------------------------------------------------------------------------------


@pytest.fixture(params=["iterator", "Parquet", "shuffled"])
def golden_train(request, golden, tmp_path):
    """Trains on the golden documents in each way that must make no difference."""
    docs = golden.json(golden.json("tokenizer")["docs_file"].removesuffix(".json"))
    if request.param == "Parquet":
        path = write(tmp_path / "docs.parquet", docs, row_group_size=50)
        return lambda **settings: train(parquet=[path], **settings)
    if request.param == "shuffled":
        random.Random(5).shuffle(docs)
    return lambda **settings: train(iter(docs), **settings)


@pytest.mark.golden
def test_ranks_of_every_golden_training(golden, golden_train):
    for name, training in golden.json("tokenizer")["trainings"].items():
        expected = [base64.b64decode(token) for token in training["mergeable_ranks_b64"]]
        requested = training["requested_vocab"] - len(training["special_tokens"])
        trained = golden_train(pattern=training["pattern"], vocab_size=requested)
        assert trained["ranks"] == expected, name


def test_threads_make_no_difference():
    alone = train(DOCS, threads=1)
    assert train(DOCS, threads=7)["ranks"] == alone["ranks"]
    assert (alone["documents"], alone["chars"]) == (400, sum(map(len, DOCS)))
    assert alone["bytes"] == sum(len(doc.encode()) for doc in DOCS)


def test_a_small_corpus_gives_fewer_tokens():
    assert train(["abc"])["ranks"][256:] == [b"ab", b"abc"]


# --- sources and limits ---------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd", "lz4"])
@pytest.mark.parametrize("layout", ["dictionary", "plain", "v2"])
def test_any_parquet_layout_is_the_same_text(tmp_path, compression, layout):
    options = {
        "dictionary": {"use_dictionary": True},
        "plain": {"use_dictionary": False, "row_group_size": 64},
        "v2": {"data_page_version": "2.0", "data_page_size": 700},
    }[layout]
    texts = pa.array([*DOCS[:100], None, "", *DOCS[100:]], pa.large_string())
    path = write(tmp_path / "docs.parquet", texts, compression=compression, **options)
    trained = train(parquet=[path])
    assert trained["ranks"] == train(DOCS)["ranks"]
    assert trained["documents"] == len(DOCS) + 1  # the empty one counts, the null does not


def test_files_are_read_in_order_and_columns_by_name(tmp_path):
    paths = [write(tmp_path / f"{i}.parquet", [DOCS[i]] * 3, column="body") for i in range(3)]
    trained = train(parquet=paths, column="body", max_chars=3 * len(DOCS[0]) + len(DOCS[1]))
    assert trained["documents"] == 5  # the fifth passes the limit
    assert trained["ranks"] == train([*[DOCS[0]] * 3, *[DOCS[1]] * 2])["ranks"]


def test_the_cap_counts_characters():
    capped = train(DOCS, doc_cap=60)
    assert capped["ranks"] == train([doc[:60] for doc in DOCS])["ranks"]
    assert capped["chars"] == sum(len(doc[:60]) for doc in DOCS) < sum(map(len, DOCS))


def test_the_limit_ends_the_reading_of_an_endless_iterator():
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield "twelve chars"

    assert train(endless(), max_chars=120)["documents"] == len(taken) == 11


def test_memory_does_not_grow_with_the_text():
    script = """
import re
from pathlib import Path
from tests.test_rustbpe import train

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

page = " ".join(f"word{i % 1000} {i}" for i in range(2000))
before = peak()
assert train((page for _ in range(4000)))["bytes"] > 50e6
print(peak() - before)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc")
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    assert float(done.stdout) < 25  # MiB for 66 MB of text


# --- progress, signals, threads -------------------------------------------------------------------


def test_progress_runs_through_both_stages():
    seen = []
    many = (doc for _ in range(200) for doc in DOCS)
    train(many, vocab_size=300, max_chars=10**9, progress=lambda *now: seen.append(now))
    stages = [[now for now in seen if now[0] == stage] for stage in ("count", "merge")]
    assert seen == [*stages[0], *stages[1]]
    for stage, total in zip(stages, (10**9, 44), strict=True):
        assert stage, "each is reported at least once"
        assert all(now[2] == total for now in stage)
        assert [now[1] for now in stage] == sorted(now[1] for now in stage)
    assert seen[-1] == ("merge", 44, 44)


@pytest.mark.parametrize("raised_by", ["iterator", "progress"])
def test_an_exception_of_the_caller_comes_back(raised_by):
    class Unusual(Exception):
        pass

    def texts():
        for i in range(10**9):
            if raised_by == "iterator" and i == 3000:
                raise Unusual("mine")
            yield DOCS[i % 400]

    def progress(*now):
        raise Unusual("mine")

    with pytest.raises(Unusual, match="mine"):
        train(texts(), progress=progress if raised_by == "progress" else None)


@pytest.mark.parametrize("source", ["iterator", "Parquet"])
def test_ctrl_c_ends_the_counting(tmp_path, source):
    shard = write(tmp_path / "shard.parquet", DOCS * 10)
    arguments = "itertools.repeat('some text ' * 50)"
    if source == "Parquet":
        arguments = f"parquet=itertools.islice(itertools.repeat({str(shard)!r}), 100_000)"
    script = (
        "import itertools; from tests.test_rustbpe import train\n"
        f"print('started', flush=True)\ntrain({arguments})"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.5)
        assert process.poll() is None, "it should still be training"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors


def test_ctrl_c_ends_the_merging():
    chunks = random.Random(1)
    docs = ["".join(chunks.choices("abcdefgh", k=400)) for _ in range(2000)]

    def interrupt(stage, done, total):
        if stage == "merge":
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(docs, vocab_size=100_000, progress=interrupt)


def test_other_python_threads_run_meanwhile(tmp_path):
    shard = write(tmp_path / "shard.parquet", DOCS * 20)
    ticks, over = [], threading.Event()

    def tick():
        while not over.wait(0.002):
            ticks.append(1)

    clock = threading.Thread(target=tick)
    clock.start()
    try:
        before = len(ticks)
        train(parquet=[shard] * 60)
        during = len(ticks) - before
    finally:
        over.set()
        clock.join()
    assert during >= 5, "with the GIL held, no other thread could have counted"


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_an_empty_corpus(texts):
    with pytest.raises(ValueError, match="corpus is empty"):
        train(texts)


def test_an_empty_parquet_file(tmp_path):
    with pytest.raises(ValueError, match="corpus is empty"):
        train(parquet=[write(tmp_path / "empty.parquet", pa.array([], pa.string()))])


def test_a_vocabulary_below_the_bytes():
    with pytest.raises(ValueError, match=r"vocabulary of 255 is impossible.* at least 256"):
        train(["text"], vocab_size=255)


@pytest.mark.parametrize("pattern", ["(", "[z-a]", r"\p{Klingon}"])
def test_a_bad_pattern(pattern):
    with pytest.raises(ValueError, match="is not a valid regular expression"):
        train(["text"], pattern=pattern)


def test_a_pattern_that_backtracks_for_ever():
    with pytest.raises(ValueError, match="the split pattern failed on a document"):
        train(["ab" * 64] * 5000, pattern="(a|b|ab)*(?>c)")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("a\ud800b", "document 2 is not valid Unicode: it has a lone surrogate"),
        (b"bytes", "document 2 is of type bytes, not str"),
        (None, "document 2 is of type NoneType, not str"),
    ],
)
def test_a_document_that_is_no_text(document, message):
    with pytest.raises(ValueError, match=message):
        train(["fine", "fine", document, "fine"])


def test_a_source_that_is_not_iterable():
    with pytest.raises(TypeError):
        train(42)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "cannot be read as a Parquet file: No such file"),
        (lambda path: path.mkdir(), "cannot be read as a Parquet file"),
        (lambda path: path.write_bytes(b""), "cannot be read as a Parquet file"),
        (lambda path: path.write_text("plain text " * 99), "cannot be read as a Parquet file"),
        (
            lambda path: path.write_bytes(write(path, DOCS).read_bytes()[:-50]),
            "cannot be read as a Parquet file",
        ),
        (lambda path: write(path, DOCS, column="body"), 'no column "text".* are: id, body'),
        (lambda path: write(path, list(range(9))), 'column "text" of .* holds INT64'),
        (lambda path: write(path, [["a"], ["b", "c"]]), 'no column "text"'),
        (lambda path: write(path, [b"\xff\xfe", b"ok"]), "row group 0: .*utf-?8"),
    ],
    ids=["absent", "folder", "empty", "text", "cut", "column", "integers", "lists", "no-utf8"],
)
def test_a_parquet_file_that_will_not_do(tmp_path, make, message):
    path = tmp_path / "bad shard.parquet"
    make(path)
    good = write(tmp_path / "good.parquet", DOCS)
    with pytest.raises(ValueError, match=f"(?i){message}") as error:
        train(parquet=[good, path])
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_damaged_bytes_give_text_or_an_error_but_never_a_panic(tmp_path):
    path, chance = tmp_path / "shard.parquet", random.Random(0)
    outcomes = set()
    for compression in ("none", "snappy", "gzip", "zstd"):
        buffer = io.BytesIO()
        table = pa.table({"text": DOCS[:100]})
        pq.write_table(table, buffer, compression=compression, data_page_size=600)
        for _ in range(60):
            damaged = bytearray(buffer.getvalue())
            for _ in range(chance.choice([1, 2, 8])):
                damaged[chance.randrange(len(damaged))] = chance.randrange(256)
            path.write_bytes(damaged)
            try:
                train(parquet=[path], vocab_size=260)
                outcomes.add("text")
            except ValueError as error:
                outcomes.add("names the file" if str(path) in str(error) else str(error))
    assert outcomes == {"text", "names the file"}
