"""Downloads from a hub on this machine that cuts connections, forgets ranges and corrupts files."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock
from hub_server import Hub, Served
from shard_tools import write_shard

from nanochat_jax.data.download import download_shards
from nanochat_jax.data.shards import HUB_DATASETS, dataset_folder, list_shards, shard_name

ROOT = Path(__file__).resolve().parents[2]
FIRST, SECOND, THIRD = map(shard_name, range(3))
VAL = shard_name(HUB_DATASETS["climbmix"].last_shard)


class ShardHub(Hub):
    """A hub whose files are named as in the data set."""

    def shard(self, name: str) -> Served:
        return self.files[f"{HUB_DATASETS['climbmix'].repo_id}/{name}"]

    def fetched(self) -> list[str]:
        return [name.rpartition("/")[2] for name, _ in self.gets]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with three training shards and the validation shard, about 70 kB each."""
    served = ShardHub()
    for index, name in enumerate([FIRST, SECOND, THIRD, VAL]):
        words = random.Random(index)
        texts = [f"{name} {words.getrandbits(12_000)}" for _ in range(40)]
        content = write_shard(tmp_path / "source.parquet", [texts]).read_bytes()
        served.files[f"{HUB_DATASETS['climbmix'].repo_id}/{name}"] = Served(content)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    with served.used(monkeypatch):
        yield served


def assert_complete(folder: Path, hub: ShardHub, names: list[str]) -> None:
    visible = sorted(path.name for path in folder.iterdir() if path.name != ".download.lock")
    assert visible == sorted(names)
    assert all((folder / name).read_bytes() == hub.shard(name).content for name in names)


def test_what_is_there_needs_no_network_and_is_not_fetched_again(hub, monkeypatch):
    folder = download_shards("climbmix", 2)
    assert_complete(folder, hub, [FIRST, SECOND, VAL])
    assert [path.name for path in list_shards("climbmix").val] == [VAL]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # no server listens there
    download_shards("climbmix", 2)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    hub.gets.clear()
    download_shards("climbmix", 3)
    assert hub.fetched() == [THIRD]
    assert_complete(folder, hub, [FIRST, SECOND, THIRD, VAL])


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_connection_is_continued(hub, ranges):
    hub.shard(FIRST).cut_after = [30_000, 10_000]
    hub.shard(FIRST).ranges = ranges
    folder = download_shards("climbmix", 1)
    assert_complete(folder, hub, [FIRST, VAL])
    asked = [bytes_range for name, bytes_range in hub.gets if name.endswith(FIRST)]
    assert asked[:2] == [None, "bytes=30000-"]


def test_a_broken_line_is_an_error_and_the_next_run_fetches_the_rest(hub):
    hub.shard(FIRST).cut_after = [20_000] + [0] * 20
    with pytest.raises(ValueError, match="cannot reach"):
        download_shards("climbmix", 1)
    folder = dataset_folder("climbmix")
    assert not (folder / FIRST).exists()
    hub.shard(FIRST).cut_after = []
    download_shards("climbmix", 1)
    assert_complete(folder, hub, [FIRST, VAL])


def test_a_corrupt_file_is_fetched_again_and_never_left_as_a_shard(hub):
    hub.shard(FIRST).corrupt = 1
    folder = download_shards("climbmix", 1)
    assert_complete(folder, hub, [FIRST, VAL])
    hub.shard(SECOND).corrupt = 100
    with pytest.raises(ValueError, match=f"twice delivered a {SECOND}"):
        download_shards("climbmix", 2)
    assert not list(folder.rglob(SECOND))


def test_a_truncated_shard_is_replaced_and_verify_finds_altered_ones(hub):
    folder = download_shards("climbmix", 2)
    content = hub.shard(FIRST).content
    (folder / FIRST).write_bytes(content[: len(content) // 2])
    altered = bytearray(hub.shard(SECOND).content)
    altered[1000] ^= 1
    (folder / SECOND).write_bytes(altered)
    download_shards("climbmix", 2)
    assert (folder / FIRST).read_bytes() == content
    assert (folder / SECOND).read_bytes() == altered  # its footer is in order
    hub.gets.clear()
    download_shards("climbmix", 2, verify=True)
    assert hub.fetched() == [SECOND]
    assert_complete(folder, hub, [FIRST, SECOND, VAL])


def test_mistakes_and_troubles_are_explained(hub, monkeypatch):
    with pytest.raises(ValueError, match="1 to 6542 training shards, not 0"):
        download_shards("climbmix", 0)
    with pytest.raises(ValueError, match=rf"has no {shard_name(3)} in the data set karpathy/"):
        download_shards("climbmix", 4)
    hub.shard(FIRST).announced_size = 10**18
    with pytest.raises(ValueError, match="GB free; ask for fewer shards"):
        download_shards("climbmix", 1)
    hub.shard(FIRST).announced_size = 0
    hub.shard(FIRST).status = 403
    with pytest.raises(ValueError, match=r"refuses access to .* \(403\); set HF_TOKEN"):
        download_shards("climbmix", 1)
    folder = dataset_folder("climbmix")
    with (
        FileLock(folder / ".download.lock"),
        pytest.raises(ValueError, match="another download into"),
    ):
        download_shards("climbmix", 1)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"check the network .*--dataset local"):
        download_shards("climbmix", 1)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_the_script_continues_after_an_interruption_in_the_middle_of_a_file(hub, tmp_path, sent):
    command = [sys.executable, str(ROOT / "scripts" / "download.py"), "--shards", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    hub.shard(FIRST).stall = threading.Event()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    folder = tmp_path / "base" / "base_data" / "climbmix"
    deadline = time.monotonic() + 120
    while FIRST not in hub.fetched() or not (folder / VAL).exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(sent)
    said, _ = process.communicate(timeout=20)  # it does not wait for the rest of the file
    if sent == signal.SIGINT:
        assert "interrupted; run the same command again to continue" in said
        assert "Traceback" not in said
    assert not (folder / FIRST).exists()
    hub.shard(FIRST).stall.set()
    hub.gets.clear()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert hub.fetched() == [FIRST]
    assert_complete(folder, hub, [FIRST, VAL])
    assert "training: 1 shards, 40 documents" in done.stdout
