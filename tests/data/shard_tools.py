"""A tokenizer of bytes that needs no training, and shards written as a test wants them."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import tiktoken


class ByteTokenizer:
    """A tiktoken encoding whose tokens are the 256 bytes; <|bos|> is 256."""

    bos_id = 256

    def __init__(self) -> None:
        self.encoding = tiktoken.Encoding(
            "bytes",
            pat_str=r"\S+|\s+",
            mergeable_ranks={bytes([byte]): byte for byte in range(256)},
            special_tokens={"<|bos|>": self.bos_id},
        )

    def encode_batch(
        self, texts: list[str], *, prepend_bos: bool = False, threads: int = 1
    ) -> list[list[int]]:
        prefix = [self.bos_id] if prepend_bos else []
        encoded = self.encoding.encode_ordinary_batch(texts, num_threads=threads)
        return [prefix + ids for ids in encoded]


def write_shard(path: Path, row_groups: Sequence[Sequence[str]]) -> Path:
    with pq.ParquetWriter(path, pa.schema([("text", pa.string())]), compression="zstd") as writer:
        for texts in row_groups:
            writer.write_table(pa.table({"text": list(texts)}), row_group_size=len(texts))
    return path
