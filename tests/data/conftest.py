"""Fixtures of the data tests: small shards with known documents, and a tokenizer of bytes."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from shard_tools import ByteTokenizer, write_shard

from nanochat_jax.data.shards import Shards, list_shards


@pytest.fixture(scope="session")
def byte_tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., Shards]:
    """make_shards([[row group, …], …]) writes one file per outer item; the last is validation."""

    def make(files: Sequence[Sequence[Sequence[str]]], name: str = "shards") -> Shards:
        folder = tmp_path / name
        folder.mkdir()
        for index, row_groups in enumerate(files):
            write_shard(folder / f"shard_{index:05d}.parquet", row_groups)
        return list_shards(folder)

    return make
