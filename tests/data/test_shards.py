"""Which files belong to a data set, what is said about unusable ones, and reading in blocks."""

import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_tools import write_shard

from nanochat_jax.data.shards import (
    BLOCK_DOCS,
    HUB_DATASETS,
    DocumentBlocks,
    list_shards,
    shard_name,
    survey_shards,
)


@pytest.fixture
def base(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path / "base_data"


# ---- listing ---------------------------------------------------------------------------------


def test_the_last_shard_is_for_validation(make_shards):
    shards = make_shards([[["a"]], [["b"]], [["c"]]])
    assert [path.name for path in shards.train] == [shard_name(0), shard_name(1)]
    assert [path.name for path in shards.val] == [shard_name(2)]


def test_a_name_stands_for_a_folder_of_the_base_directory(base):
    folder = base / "mine"
    folder.mkdir(parents=True)
    for index in range(2):
        write_shard(folder / shard_name(index), [["text"]])
    (folder / "notes.txt").write_text("not a shard")
    (folder / f".{shard_name(9)}").write_bytes(b"hidden")
    (folder / f"{shard_name(9)}.tmp").write_bytes(b"unfinished")
    assert list_shards("mine") == list_shards(folder) == list_shards(str(folder))


def test_a_hub_data_set_needs_its_own_validation_shard(base):
    """Otherwise the validation text would move with the number of downloaded shards."""
    folder = base / "climbmix"
    folder.mkdir(parents=True)
    for index in range(3):
        write_shard(folder / shard_name(index), [["text"]])
    with pytest.raises(ValueError, match=r"shard_06542\.parquet is missing; run .*download\.py"):
        list_shards("climbmix")
    write_shard(folder / shard_name(HUB_DATASETS["climbmix"].last_shard), [["text"]])
    shards = list_shards("climbmix")
    assert len(shards.train) == 3
    assert shards.val[0].name == "shard_06542.parquet"


def test_missing_folders_and_shards_say_what_to_do(base, tmp_path):
    with pytest.raises(ValueError, match=r"no data set at .*fineweb-edu.*--dataset fineweb-edu"):
        list_shards("fineweb-edu")
    with pytest.raises(ValueError, match=r"no data set at .*--dataset local"):
        list_shards("local")
    with pytest.raises(ValueError, match=r"no data set at .*--from FOLDER"):
        list_shards(tmp_path / "nowhere")
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"holds no \.parquet shards; .*--from FOLDER"):
        list_shards(texts)
    write_shard(texts / "only.parquet", [["text"]])
    with pytest.raises(ValueError, match=r"only one shard, only\.parquet"):
        list_shards(texts)


# ---- unusable files --------------------------------------------------------------------------


def damaged_files(folder: Path) -> dict[str, Path]:
    whole = write_shard(folder / "whole.parquet", [["text"] * 50])
    (folder / "zero.parquet").touch()
    (folder / "truncated.parquet").write_bytes(whole.read_bytes()[:-20])
    (folder / "text_file.parquet").write_text("this is no Parquet file at all")
    pq.write_table(pa.table({"a": ["a"], "b": ["b"], "id": [1]}), folder / "two.parquet")
    pq.write_table(pa.table({"id": [1]}), folder / "no_text.parquet")
    pq.write_table(pa.table({"text": [["a", "b"]]}), folder / "lists.parquet")
    pq.write_table(pa.table({"text": [1, 2]}), folder / "numbers.parquet")
    return {path.stem: path for path in folder.iterdir() if path != whole}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("zero", "cannot be read as Parquet"),
        ("truncated", "cannot be read as Parquet"),
        ("text_file", "cannot be read as Parquet"),
        ("two", r"no column `text` \(its columns: a, b, id\)"),
        ("no_text", "no column `text`"),
        ("lists", "holds list<.*>, not strings"),
        ("numbers", "holds int64, not strings"),
    ],
)
def test_an_unusable_file_is_named(tmp_path, kind, message):
    path = damaged_files(tmp_path)[kind]
    with pytest.raises(ValueError, match=message) as error:
        DocumentBlocks([tmp_path / "whole.parquet", path])
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


# ---- the parts of a folder -------------------------------------------------------------------


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_names_of_splits_say_what_is_for_what(tmp_path):
    for name in (
        "test-00000-of-00001",
        "train-00000-of-00002",
        "train-00001-of-00002",
        "validation-0",
    ):
        write_shard(tmp_path / f"{name}.parquet", [[name]])
    shards = list_shards(tmp_path)
    assert names(shards.train) == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    assert names(shards.val) == ["validation-0.parquet"]
    (tmp_path / "validation-0.parquet").unlink()
    assert names(list_shards(tmp_path).val) == ["train-00001-of-00002.parquet"]
    (tmp_path / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match="only one shard, train-00000"):  # never on the test split
        list_shards(tmp_path)
    (tmp_path / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(
        ValueError, match=r"no \.parquet shards to train on \(test split passed over"
    ):
        list_shards(tmp_path)


def test_splits_can_be_folders_and_words_that_begin_alike_are_none(tmp_path):
    for name in (
        "train/a",
        "train/b",
        "dev/a",
        "test/a",
        "training_notes",
        "testimony",
        "valuable",
    ):
        path = tmp_path / f"{name}.parquet"
        path.parent.mkdir(exist_ok=True)
        write_shard(path, [[name]])
    found = survey_shards(tmp_path)
    assert names(found.train) == [
        *("testimony.parquet", "a.parquet", "b.parquet"),
        *("training_notes.parquet", "valuable.parquet"),
    ]
    assert found.val == [tmp_path / "dev" / "a.parquet"]
    assert found.passed_over == [(tmp_path / "test" / "a.parquet", "test split")]
    listed = "\n".join(found.lines())
    assert "validation: dev/a.parquet" in listed
    assert "passed over (test split): test/a.parquet" in listed


def test_what_spark_leaves_is_passed_over(tmp_path):
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / ".part-00000.parquet.crc").write_bytes(b"crc")
    for index, texts in enumerate([["a"], ["b"], []]):
        pq.write_table(
            pa.table({"text": pa.array(texts, pa.string())}), tmp_path / f"part-{index}.parquet"
        )
    found = survey_shards(tmp_path)
    assert names(found.train + found.val) == ["part-0.parquet", "part-1.parquet"]
    assert (tmp_path / "part-2.parquet", "no documents") in found.passed_over


def test_a_shard_that_changes_in_use_is_named(make_shards):
    shards = make_shards([[["one"], ["two"]], [["three"]]])
    blocks = DocumentBlocks(shards.train)
    assert blocks[0] == ["one"]
    write_shard(shards.train[0], [["eins"], ["zwei"]])
    with pytest.raises(ValueError, match=f"{shards.train[0].name} has changed or gone"):
        blocks[1]
    shards.train[0].unlink()
    with pytest.raises(ValueError, match=f"{shards.train[0].name} has changed or gone"):
        blocks[1]


# ---- blocks ----------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(
        st.lists(st.integers(1, 20) | st.integers(1000, 3000), min_size=1, max_size=3),
        min_size=1,
        max_size=3,
    ),
    min_blocks=st.integers(1, 12),
)
def test_blocks_hold_every_document_once_and_in_order(sizes, min_blocks):
    documents = [str(number) for number in range(sum(map(sum, sizes)))]
    numbers = iter(documents)
    with tempfile.TemporaryDirectory() as folder:
        paths = [
            write_shard(
                Path(folder) / shard_name(index),
                [[next(numbers) for _ in range(size)] for size in file],
            )
            for index, file in enumerate(sizes)
        ]
        if len(documents) < min_blocks:
            with pytest.raises(ValueError, match=f"{len(documents)} documents"):
                DocumentBlocks(paths, min_blocks)
            return
        blocks = DocumentBlocks(paths, min_blocks)
        read = [blocks[index] for index in range(len(blocks))]
        picked = [blocks.pick(index, [len(texts) - 1, 0]) for index, texts in enumerate(read)]
    assert [text for texts in read for text in texts] == documents
    assert len(blocks) >= min_blocks
    assert max(map(len, read)) <= BLOCK_DOCS
    assert picked == [[texts[-1], texts[0]] for texts in read]


def test_a_published_row_group_is_one_block(make_shards):
    shards = make_shards([[["a"] * 1024, ["b"] * 1024, ["c"] * 7], [["d"]]])
    blocks = DocumentBlocks(shards.train)
    assert [len(blocks[index]) for index in range(len(blocks))] == [1024, 1024, 7]


def test_a_null_is_a_document_without_text(tmp_path):
    path = tmp_path / "nulls.parquet"
    pq.write_table(pa.table({"text": pa.array(["a", None, "b"], pa.large_string())}), path)
    assert DocumentBlocks([path])[0] == ["a", "", "b"]


def test_the_fingerprint_changes_with_the_files(make_shards):
    one = make_shards([[["a", "b"]], [["c"]]], name="one").train
    same = make_shards([[["x", "y"]], [["c"]]], name="same").train
    other = make_shards([[["a"], ["b"]], [["c"]]], name="other").train
    assert DocumentBlocks(one).fingerprint == DocumentBlocks(same).fingerprint
    assert DocumentBlocks(one).fingerprint != DocumentBlocks(other).fingerprint
