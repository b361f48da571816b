"""Shards made of a user's files and of the prose on this machine."""

import ast
import gzip
import inspect
import json
import shutil
import sysconfig
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shard_tools import write_shard

from nanochat_jax.data.corpus import convert_folder, make_dataset, make_local_dataset, split_long
from nanochat_jax.data.prose import (
    clean,
    docstrings,
    find_prose,
    python_folders,
    reads_like_english,
)
from nanochat_jax.data.reader import read_documents
from nanochat_jax.data.shards import DocumentBlocks, Shards, list_shards


@pytest.fixture
def base(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base" / "base_data"


def texts_of(paths: list[Path]) -> list[str]:
    return [text for path in paths for text in pq.read_table(path)["text"].to_pylist()]


def made_of(source: Path, files: dict[str, bytes]) -> Shards:
    """The data set `mine` made of these files."""
    for name, content in files.items():
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    convert_folder(source, "mine", listed=lambda line: None)
    return list_shards("mine")


# ---- your own text ---------------------------------------------------------------------------


def test_all_kinds_of_files_become_one_data_set(base, tmp_path):
    source = tmp_path / "texts"
    (source / "deeper").mkdir(parents=True)
    write_shard(source / "a.parquet", [["from parquet"], ["and more"]])
    lines = ['{"text": "from json", "id": 1}', "", '{"text": "more \\u00e9"}', '{"text": "  "}']
    (source / "deeper" / "b.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (source / "c.txt").write_text("\ufefffrom a text file", encoding="utf-8")
    (source / "D.MD").write_text("# from markdown")
    (source / "again.txt").write_text("from json")
    (source / "e.csv").write_text("passed over")
    (source / ".hidden.txt").write_text("passed over")
    folder = convert_folder(source, "mine")
    shards = list_shards("mine")
    assert folder == base / "mine"
    assert sorted(texts_of(shards.train + shards.val)) == [
        "# from markdown",
        "and more",
        "from a text file",
        "from json",
        "from parquet",
        "more é",
    ]
    assert len(texts_of(shards.val)) == 1


def test_compressed_files_and_arrays_and_separators_inside_strings(base, tmp_path):
    lines = ['{"text": "one\u2028line"}', '{"text": null}', '{"text": "two\u0085more"}']
    packed = pa.BufferOutputStream()
    with pa.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(b'{"content": "of zstd", "id": 3}\n')
    shards = made_of(
        tmp_path / "texts",
        {
            "a.jsonl.gz": gzip.compress("\ufeff".encode() + "\n".join(lines).encode()),
            "b.JSONL.zst": packed.getvalue().to_pybytes(),
            "c.json": b'[\n {"text": "three"},\n {"text": "four"}\n]',
            "d.txt.gz": gzip.compress(b"five\r\nsix"),
        },
    )
    assert sorted(texts_of(shards.train + shards.val)) == sorted(
        ["one\u2028line", "two\u0085more", "of zstd", "three", "four", "five\nsix"]
    )


def test_a_clone_of_a_data_set_gives_its_documents_alone(base, tmp_path, capsys):
    source = tmp_path / "clone"
    files = {
        "README.md": b"---\nlicense: mit\n---\n# Dataset card",
        "LICENSE.txt": b"Permission is hereby granted",
        "dataset_infos.json": b"{}",
        "data/train-0.jsonl": b'{"text": "a"}\n{"text": "b"}\n{"text": ""}\n',
        "data/validation-0.jsonl": b'{"text": "v"}\n',
        "data/test-0.jsonl": b'{"text": "t"}\n',
        "notes.csv": b"a,b",
    }
    for name, content in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    convert_folder(source, "mine")
    listed = capsys.readouterr().out
    shards = list_shards("mine")
    assert sorted(texts_of(shards.train)) == ["a", "b"]
    assert texts_of(shards.val) == ["v"]
    for line in (
        "training: data/train-0.jsonl",
        "validation: data/validation-0.jsonl",
        "passed over (test split): data/test-0.jsonl",
        "passed over (licence): LICENSE.txt",
        "passed over (about the data set): README.md, dataset_infos.json",
        "1 documents without text skipped",
    ):
        assert line in listed
    assert "notes.csv" in listed


def test_documents_of_records_stay_whole_and_a_long_file_is_cut_no_finer_than_it_must(
    base, tmp_path
):
    record = json.dumps({"text": "word " * 50_000}).encode()
    novels = {
        f"{i}.txt": (f"Novel {i}. " + "A sentence of it. " * 1500).encode() for i in range(300)
    }
    shards = made_of(tmp_path / "texts", {"a.jsonl": record, **novels})
    lengths = sorted(map(len, texts_of(shards.train + shards.val)))
    assert lengths[-1] == 250_000  # the record
    assert len(lengths) == 301  # and every novel


STRINGS = {
    "string": pa.array(["a", None, "ü", ""]),
    "large": pa.array(["a", None, "ü", ""], pa.large_string()),
    "view": pa.array(["a", None, "ü", ""], pa.string_view()),
    "categories": pa.array(["a", None, "ü", ""]).dictionary_encode(),
    "bytes": pa.array([b"a", None, "ü".encode(), b""]),
}


@pytest.mark.parametrize("kind", STRINGS)
@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "brotli", "zstd", "lz4"])
def test_every_parquet_is_the_same_text_to_every_reader(tmp_path, kind, compression):
    path = tmp_path / "a.parquet"
    table = pa.table({"id": range(4), "text": STRINGS[kind]})
    pq.write_table(table, path, compression=compression, row_group_size=3)
    assert list(read_documents(path)) == ["a", "", "ü", ""]
    blocks = DocumentBlocks([path])
    assert [blocks[i] for i in range(2)] == [["a", "", "ü"], [""]]


@pytest.mark.parametrize("column", ["content", "the only one"])
def test_another_column_of_strings_is_taken(tmp_path, column):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [1], column: ["text"]}), path)
    assert list(read_documents(path)) == ["text"]


def test_bytes_that_are_no_text_are_named_by_their_row(tmp_path):
    path = tmp_path / "latin.parquet"
    raw = pa.array([b"fine"] * 70 + [b"caf\xe9"]).buffers()
    pq.write_table(
        pa.table({"text": pa.Array.from_buffers(pa.string(), 71, raw)}), path, row_group_size=9
    )
    with pytest.raises(ValueError, match=r"latin\.parquet, row 71: not valid UTF-8 \(byte 3\)"):
        list(read_documents(path))


def test_a_flipped_bit_in_a_shard_made_here_is_noticed(base, tmp_path):
    lines = "\n".join(json.dumps({"text": f"document {i} " * 20}) for i in range(200))
    shard = made_of(tmp_path / "texts", {"a.jsonl": lines.encode()}).train[0]
    whole = shard.read_bytes()
    for at in range(50, len(whole) - 2000, len(whole) // 12):
        shard.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=shard.name):
            list(read_documents(shard))


def test_order_and_split_depend_on_the_texts_alone(base, tmp_path):
    documents = [f"document number {number}" for number in range(3000)]
    for name, order in (("one", documents), ("two", documents[::-1] + documents[:100])):
        source = tmp_path / name
        source.mkdir()
        lines = "\n".join(json.dumps({"text": text}) for text in order)
        (source / f"{name}.jsonl").write_text(lines)
        convert_folder(source, name)
    one, two = list_shards("one"), list_shards("two")
    assert texts_of(one.train) == texts_of(two.train)
    assert texts_of(one.val) == texts_of(two.val)
    assert len(texts_of(one.val)) == 150
    assert sorted(texts_of(one.train + one.val)) == sorted(documents)
    assert texts_of(one.train) != sorted(texts_of(one.train))
    footer = pq.read_metadata(one.train[0])
    assert [footer.row_group(i).num_rows for i in range(3)] == [1024, 1024, 802]
    assert footer.row_group(0).column(0).compression == "ZSTD"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", b'{"text": "a"}\n\n{"text": \n', r"bad\.jsonl, line 3: not a JSON object"),
        ("bad.jsonl", b'{"text": "a"}\n{"body": "b"}\n', r'line 2: .* string under "text"'),
        ("bad.jsonl", b'{"text": 1}\n', r'line 1: .* string under "text"'),
        ("bad.jsonl", b'{"text": null}\n', "are none"),
        ("bad.jsonl", b'{"a": "b", "c": "d"}\n', r'line 1: .* string under "text"'),
        ("bad.jsonl", b'{"text": "a"}\n{"text": ' + b"[" * 100_000, "line 2: .*nested too deeply"),
        ("bad.jsonl", b'{"text": ' + b"9" * 5000 + b"}", "line 1: not a JSON object"),
        ("bad.json", b'[{"text": "a"}, {"text": 2}]', r"bad\.json, entry 2: expected an object"),
        ("bad.json", b'[{"text": "a"}, {"text"', r"bad\.json: not a JSON object"),
        (
            "bad.jsonl.gz",
            gzip.compress(b'{"text": "a"}\n' * 99)[:-9],
            r"bad\.jsonl\.gz cannot be read",
        ),
        ("bad.jsonl.zst", b"no such thing", r"bad\.jsonl\.zst cannot be read"),
        (
            "test-00000.jsonl",
            b'{"text": "a"}\n',
            r"to train on in .*; test-00000\.jsonl: test split",
        ),
        ("bad.jsonl", b'["text"]\n', r'line 1: .* string under "text"'),
        ("bad.jsonl", b'{"text": "\\ud800"}\n', r"line 1: not valid Unicode"),
        ("bad.jsonl", b'{"text": "\xff"}\n', r"line 1: not valid Unicode"),
        ("bad.txt", b"abc\xff", r"bad\.txt is not valid UTF-8 \(byte 3\)"),
        ("bad.parquet", b"PAR1", r"bad\.parquet cannot be read"),
        ("one.txt", b"a single document", "only one"),
        ("blank.txt", b" \n", "are none"),
        ("other.csv", b"a,b", r"no \.parquet, \.jsonl, .* files to train on .*other\.csv"),
    ],
)
def test_unusable_files_are_named_and_nothing_is_left_behind(
    base, tmp_path, name, content, message
):
    source = tmp_path / "texts"
    source.mkdir()
    (source / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        convert_folder(source, "mine")
    assert [path for path in base.glob("*") if not path.name.endswith(".lock")] == []


@pytest.mark.parametrize("name", ["climbmix", "local", "", "../up", "a/b", ".hidden"])
def test_a_name_that_would_hide_something_else_is_refused(base, tmp_path, name):
    with pytest.raises(ValueError, match="cannot name a data set"):
        convert_folder(tmp_path, name)


@given(st.text(alphabet="ab \n", max_size=400), st.integers(5, 60))
def test_long_texts_are_cut_without_losing_a_word(text, limit):
    pieces = split_long(text, limit)
    assert all(len(piece) <= limit for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())
    if len(text) <= limit:
        assert pieces == [text]


def test_a_novel_is_cut_at_blank_lines(base, tmp_path, real_data):
    source = tmp_path / "texts"
    source.mkdir()
    shutil.copy(real_data / "tinyshakespeare" / "input.txt", source)
    convert_folder(source, "plays")
    shards = list_shards("plays")
    documents = texts_of(shards.train + shards.val)
    whole = (source / "input.txt").read_text(encoding="utf-8")
    lengths = sorted(map(len, documents))
    assert lengths[-1] <= len(whole) / 200 < 2 * lengths[1]  # only the last piece may be short
    assert all(document in whole for document in documents)
    assert sum(map(len, documents)) > 0.99 * len(whole)


# ---- making a data set -----------------------------------------------------------------------


def test_a_data_set_is_made_once_and_leftovers_are_thrown_away(base):
    leftover = base / ".mine.unfinished"
    leftover.mkdir(parents=True)
    (leftover / "shard_00007.parquet").write_bytes(b"of a process that was killed")
    made = []

    def documents():
        made.append(threading.current_thread())
        return (f"text {number}" for number in range(30))

    threads = [threading.Thread(target=make_dataset, args=("mine", documents)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert sorted(path.name for path in (base / "mine").iterdir()) == [
        "shard_00000.parquet",
        "shard_00001.parquet",
    ]
    assert not leftover.exists()


def test_a_failure_in_the_middle_leaves_nothing(base):
    def documents():
        yield from (f"text {number}" for number in range(3000))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_dataset("mine", documents)
    assert not (base / "mine").exists()
    assert not (base / ".mine.unfinished").exists()


# ---- the prose of this machine ---------------------------------------------------------------

PROSE = (
    "The morning was clear and it was not yet hot when we set out for the hills that can be seen "
    "from the town. It is a long way, but the road is good, and those who have walked on it before "
    "will tell you that there is nothing to be afraid of on the other side."
)


def test_prose_is_found_and_everything_else_is_not(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    numbered = [PROSE.replace("morning", word) for word in ("night", "noon", "week", "day", "year")]
    (package / "module.py").write_text(
        f'#!/usr/bin/env python\n"""{numbered[0]}\n"""\nraise SystemExit("never run")\n'
        f'def function(a,\n             b):  # comment\n    r"""{numbered[1]}"""\n'
        f'class Klass:\n\n    """\n    {numbered[2]}\n    """\n'
        f'value = """{PROSE.replace("clear", "grey")}"""\n',
        encoding="utf-8",
    )
    (package / "README.md").write_text(numbered[3] + "\n\n```python\nprint('code')\n```\n")
    (package / "guide.rst").write_text(numbered[4])
    (package / "same.txt").write_text(numbered[4].upper())  # the same words again
    (package / "LICENSE.txt").write_text(PROSE.replace("hills", "courts"))
    (package / "table.txt").write_text("1.5 2.5 3.5\n" * 100)
    (package / "names.txt").write_text("alpha beta gamma delta\n" * 30)
    (package / "latin.txt").write_bytes(PROSE.encode() + b"\xe9")
    (package / "broken.py").write_text('def f(:\n    """' + PROSE + "\n")
    assert sorted(find_prose([tmp_path])) == sorted(numbered)


@pytest.mark.parametrize("module", ["typing.py", "argparse.py", "asyncio/tasks.py", "turtle.py"])
def test_docstrings_are_those_that_a_parser_finds(module):
    source = Path(sysconfig.get_paths()["stdlib"], module).read_text(encoding="utf-8")
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    parsed = {ast.get_docstring(node) for node in nodes} - {None}
    long = {inspect.cleandoc(text) for text in parsed if len(text) >= 200}
    found = {text for text in docstrings(source) if len(text) >= 200}
    assert long
    assert found == long


def test_cleaning_keeps_sentences_and_drops_code():
    text = """\
Adds numbers, for example::

    add(1, 2)

    add(3)
And so on.

Parameters
----------
a : int
    The first number.

>>> add(1, 2)
3

.. note::
   Drop this.

Done.
"""
    assert clean(text) == (
        "Adds numbers, for example:\n\nAnd so on.\n\nParameters\na : int\n    The first number.\n\n"
        "Done."
    )
    assert reads_like_english(PROSE)
    assert not reads_like_english(PROSE[:150])
    assert not reads_like_english("x = f(a, b) + g[c]; " * 20)


def test_this_machine_yields_a_data_set_once(base, monkeypatch):
    stdlib, *packages = python_folders()
    assert all(folder.is_dir() for folder in packages)
    monkeypatch.setattr("nanochat_jax.data.prose.python_folders", lambda: [stdlib])
    folder = make_local_dataset()
    shards = list_shards("local")
    train, val = texts_of(shards.train), texts_of(shards.val)
    assert len(train) + len(val) > 2000
    assert len(val) == pytest.approx(0.05 * (len(train) + len(val)), abs=1)
    assert not set(train) & set(val)
    assert all(len(text) <= 4000 for text in train)
    assert sum(pq.read_metadata(path).num_row_groups for path in shards.train) >= 3
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert make_local_dataset() == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
