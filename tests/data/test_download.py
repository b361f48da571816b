"""Downloads from a hub on this machine that cuts connections, forgets ranges and corrupts files."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import huggingface_hub
import pytest
from filelock import FileLock
from hub_server import Hub, Served
from shard_tools import write_shard

from nanochat_jax.data import download as downloads
from nanochat_jax.data.download import download_shards
from nanochat_jax.data.shards import HUB_DATASETS, list_shards, shard_name

ROOT = Path(__file__).resolve().parents[2]
VAL = shard_name(HUB_DATASETS["climbmix"].last_shard)
FIRST = shard_name(0)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with three training shards and the validation shard, about 70 kB each."""
    served = Hub(HUB_DATASETS["climbmix"].repo_id)
    for index, name in enumerate([shard_name(0), shard_name(1), shard_name(2), VAL]):
        words = random.Random(index)
        texts = [f"{name} {words.getrandbits(12_000)}" for _ in range(40)]
        path = write_shard(tmp_path / "source.parquet", [texts])
        served.files[name] = Served(path.read_bytes())
    monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(downloads, "PAUSE", 0.0)
    yield served
    huggingface_hub.close_session()
    served.close()


class Counting:
    """Sums what the progress bar would show."""

    def __init__(self) -> None:
        self.files = self.size = self.done = 0
        self._lock = threading.Lock()

    def expect(self, files: int, size: int) -> None:
        self.files, self.size = files, size

    def advance(self, size: int) -> None:
        with self._lock:
            self.done += size


def assert_complete(folder: Path, hub: Hub, names: list[str]) -> None:
    visible = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    assert visible == sorted(names)
    assert all((folder / name).read_bytes() == hub.files[name].content for name in names)
    assert not list(folder.glob(".*.part"))


def test_fetches_the_first_shards_and_always_the_validation_shard(hub):
    progress = Counting()
    folder = download_shards("climbmix", 2, progress=progress)
    names = [shard_name(0), shard_name(1), VAL]
    assert_complete(folder, hub, names)
    assert [path.name for path in list_shards("climbmix").val] == [VAL]
    total = sum(len(hub.files[name].content) for name in names)
    assert (progress.files, progress.size, progress.done) == (3, total, total)


def test_what_is_there_needs_no_network(hub, monkeypatch):
    download_shards("climbmix", 2)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    download_shards("climbmix", 2)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    hub.gets.clear()
    folder = download_shards("climbmix", 3)
    assert [name for name, _ in hub.gets] == [shard_name(2)]
    assert_complete(folder, hub, list(hub.files))


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_connection_is_continued(hub, ranges):
    hub.files[FIRST].cut_after = [30_000, 10_000]
    hub.files[FIRST].ranges = ranges
    progress = Counting()
    folder = download_shards("climbmix", 1, progress=progress)
    assert_complete(folder, hub, [FIRST, VAL])
    assert progress.done == progress.size
    asked = [bytes_range for name, bytes_range in hub.gets if name == FIRST]
    if ranges:
        assert asked == [None, "bytes=30000-", "bytes=40000-"]
    else:
        assert asked == [None, "bytes=30000-", "bytes=10000-"]


def test_a_broken_line_is_an_error_and_the_next_run_continues(hub):
    hub.files[FIRST].cut_after = [20_000] + [0] * 20
    with pytest.raises(ValueError, match="cannot reach"):
        download_shards("climbmix", 1)
    folder = downloads.dataset_folder("climbmix")
    assert not (folder / FIRST).exists()
    hub.files[FIRST].cut_after = []
    hub.gets.clear()
    download_shards("climbmix", 1)
    assert (FIRST, "bytes=20000-") in hub.gets
    assert_complete(folder, hub, [FIRST, VAL])


def test_a_corrupt_file_is_fetched_again(hub):
    hub.files[FIRST].corrupt = 1
    progress = Counting()
    folder = download_shards("climbmix", 1, progress=progress)
    assert_complete(folder, hub, [FIRST, VAL])
    assert progress.done == progress.size


def test_a_file_that_stays_corrupt_is_never_left_as_a_shard(hub):
    hub.files[FIRST].corrupt = 100
    with pytest.raises(ValueError, match=f"twice delivered a {FIRST}"):
        download_shards("climbmix", 1)
    folder = downloads.dataset_folder("climbmix")
    assert not (folder / FIRST).exists()
    assert not list(folder.glob(f".{FIRST}.*.part"))


def test_a_truncated_shard_is_replaced_and_verify_finds_altered_ones(hub):
    folder = download_shards("climbmix", 2)
    content = hub.files[FIRST].content
    (folder / FIRST).write_bytes(content[: len(content) // 2])
    altered = bytearray(hub.files[shard_name(1)].content)
    altered[1000] ^= 1
    (folder / shard_name(1)).write_bytes(altered)
    download_shards("climbmix", 2)
    assert (folder / FIRST).read_bytes() == content
    assert (folder / shard_name(1)).read_bytes() == altered  # its footer is in order
    hub.gets.clear()
    download_shards("climbmix", 2, verify=True)
    assert [name for name, _ in hub.gets] == [shard_name(1)]
    assert_complete(folder, hub, [FIRST, shard_name(1), VAL])


def test_mistakes_and_troubles_are_explained(hub, monkeypatch):
    with pytest.raises(ValueError, match="1 to 6542 training shards, not 0"):
        download_shards("climbmix", 0)
    with pytest.raises(ValueError, match=rf"has no {shard_name(3)} in the data set karpathy/"):
        download_shards("climbmix", 4)
    hub.files[FIRST].announced_size = 10**18
    with pytest.raises(ValueError, match="GB free; ask for fewer shards"):
        download_shards("climbmix", 1)
    folder = downloads.dataset_folder("climbmix")
    with (
        FileLock(folder / ".download.lock"),
        pytest.raises(ValueError, match="another download into"),
    ):
        download_shards("climbmix", 1)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"check the network .*--dataset local"):
        download_shards("climbmix", 1)


def test_the_script_survives_kill_9_in_the_middle_of_a_file(hub, tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "download.py"), "--shards", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    hub.files[FIRST].stall = threading.Event()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    folder = tmp_path / "base" / "base_data" / "climbmix"
    half = len(hub.files[FIRST].content) // 2
    deadline = time.monotonic() + 120
    while not any(part.stat().st_size == half for part in folder.glob(f".{FIRST}.*.part")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (folder / FIRST).exists()
    hub.files[FIRST].stall.set()
    hub.gets.clear()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert (FIRST, f"bytes={half}-") in hub.gets
    assert_complete(folder, hub, [FIRST, VAL])
    assert "training: 1 shards, 40 documents" in done.stdout
