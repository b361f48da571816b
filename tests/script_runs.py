"""Scripts of training stages, run as people run them, on a tiny base directory.

What the tests of the stages share: text and a tokenizer, starting and killing, reading records.
"""

import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_jax.runs import read_metrics
from nanochat_jax.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
TIMES = {"dt", "tokens_per_s", "data_wait", "mfu", "eta_seconds", "train_seconds"}
TEXT = (
    "the of and to in a is that it was for on are with as his they at be this from have or by one "
    "had not but what all were when we there can an your which their said if do will each about how"
)
WORDS = TEXT.split()


def document(rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(5, 120))) + "."


def write_dataset(folder: Path, n_shards: int) -> None:
    rng = random.Random(0)
    folder.mkdir(parents=True)
    for index in range(n_shards):
        texts = pa.table({"text": [document(rng) for _ in range(100)]})
        pq.write_table(texts, folder / f"shard_{index:05d}.parquet", row_group_size=20)


def make_base(folder: Path) -> None:
    """A base directory with the data set and the tokenizer `tiny`."""
    write_dataset(folder / "base_data" / "tiny", 3)
    rng = random.Random(1)
    tokenizer = Tokenizer.train((document(rng) for _ in range(300)), vocab_size=300)
    tokenizer.save(folder / "tokenizer" / "tiny")
    cache = ROOT / ".pytest_cache" / "jax"  # what conftest.py uses: most runs compile nothing
    cache.mkdir(parents=True, exist_ok=True)
    (folder / "jax_cache").symlink_to(cache)


class Script:
    """Runs scripts/NAME with settings as flags, as so many simulated devices."""

    def __init__(self, base: Path, name: str, settings: dict[str, Any]):
        self.base, self.name, self.settings = base, name, settings

    def start(self, *flags: str, devices: int = 1, environment=(), **settings) -> subprocess.Popen:
        flags += tuple(f"--{name}={value}" for name, value in (self.settings | settings).items())
        return self.start_plain(*flags, devices=devices, environment=environment)

    def start_plain(self, *flags: str, devices: int = 1, environment=()) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-W", "error", str(ROOT / "scripts" / self.name), *flags],
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "NANOCHAT_BASE_DIR": str(self.base),
                "JAX_PLATFORMS": "cpu",
                "PYTHONFAULTHANDLER": "1",
                "JAX_NUM_CPU_DEVICES": str(devices),
                **dict(environment),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *flags: str, expect: int = 0, **how) -> str:
        return finish(self.start(*flags, **how), expect)

    def run_cluster(self, n_processes: int, **settings) -> list[str]:
        """One run of several processes; what each of them printed."""
        with socket.create_server(("127.0.0.1", 0)) as probe:
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        cluster = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(n_processes)}
        processes = [
            self.start(environment=cluster | {"JAX_PROCESS_ID": str(index)}, **settings)
            for index in range(n_processes)
        ]
        return [finish(process, 0) for process in processes]

    def folder(self, run: str) -> Path:
        return self.base / "runs" / run

    def trace(self, run: str) -> list[dict]:
        """The records without what depends on the clock."""
        return [
            {name: value for name, value in record.items() if name not in TIMES}
            for record in read_metrics(self.folder(run))
        ]

    def losses(self, run: str) -> list[float]:
        return [record["loss"] for record in self.trace(run) if record["kind"] == "train"]

    def steps(self, run: str) -> set[str]:
        return {path.name for path in (self.folder(run) / "checkpoints").iterdir()}


def finish(process: subprocess.Popen, expect: int) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == expect, output
    return output


def wait_for(condition, process: subprocess.Popen, seconds: float = 200) -> None:
    """Until the condition holds; the process has to live so long."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.002)


def n_train_records(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b'"train"') if path.exists() else 0
