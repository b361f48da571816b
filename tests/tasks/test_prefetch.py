"""Fetching task data from a hub on this machine, and checking a copy without one."""

import io
import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import Hub, Served

from nanochat_jax.evals.core_tasks import find_bundle
from nanochat_jax.tasks import sources
from nanochat_jax.tasks.registry import make_task, missing, prepare, source_of
from nanochat_jax.tasks.sources import check, fetch, lacking, read_manifest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "prefetch.py"
GSM = ("gsm8k", "train")
ARC = ("arc-easy", "test")
FIRST, SECOND = (f"openai/gsm8k/main/train/000{at}.parquet" for at in range(2))
ARC_FILE = "allenai/ai2_arc/ARC-Easy/test/0000.parquet"


def parquet(rows):
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def sums(start, count):
    numbers = range(start, start + count)
    return [{"question": f"{i}?" + os.urandom(9).hex(), "answer": f"#### {i}"} for i in numbers]


@pytest.fixture
def hub(monkeypatch):
    """A hub with GSM8K in two files, and ARC-Easy in one."""
    served = Hub()
    arc = {"question": "?", "choices": {"text": ["x"], "label": ["A"]}, "answerKey": "A"}
    served.files = {
        FIRST: Served(parquet(sums(0, 500))),
        SECOND: Served(parquet(sums(500, 500))),
        ARC_FILE: Served(parquet([arc])),
    }
    with served.used(monkeypatch):
        yield served


def test_a_task_fetches_what_it_lacks_once(hub, task_data):
    assert missing([GSM, ARC, ("arithmetic", "train")]) == [
        "openai--gsm8k/main/train",
        "allenai--ai2_arc/ARC-Easy/test",
    ]
    task = make_task(*GSM)
    answers = {one["messages"][1]["content"][0]["text"] for one in task}
    assert answers == {f"#### {i}" for i in range(1000)}
    folder = task_data / "openai--gsm8k" / "main" / "train"
    assert json.loads((folder / "manifest.json").read_text()) == ["00000.parquet", "00001.parquet"]
    assert (folder / "00001.parquet").read_bytes() == hub.files[SECOND].content
    assert not (task_data / ".incoming").exists()
    before = hub.n_requests
    assert len(make_task(*GSM)) == 1000
    assert hub.n_requests == before


def test_the_manifest_has_every_file(hub, task_data):
    prepare([GSM, ARC])
    wanted = [source_of(*GSM), source_of(*ARC)]
    assert check(wanted) == ([], [])
    manifest = read_manifest()
    assert len(manifest) == 3
    name = "openai--gsm8k/main/train/00000.parquet"
    content = hub.files[FIRST].content
    assert manifest[name]["size"] == len(content)
    assert manifest[name]["url"].startswith(hub.endpoint)
    (task_data / name).write_bytes(content[:-1] + b"!")
    assert check(wanted)[0] == [f"{name} has other content than when it was downloaded"]
    (task_data / name).write_bytes(content[:-1])
    assert "bytes instead of" in check(wanted)[0][0]
    (task_data / name).unlink()
    assert check(wanted)[0] == ["openai--gsm8k/main/train is missing"]
    fetch(wanted)
    assert check(wanted) == ([], [])
    (task_data / "manifest.json").unlink()
    assert len(check(wanted)[1]) == 3
    (task_data / "manifest.json").write_text('{"files": {"x": {}}}')
    with pytest.raises(ValueError, match=r"manifest.json is damaged"):
        check(wanted)


def test_data_that_changed_since_it_was_downloaded_is_refused(hub, task_data, caplog):
    make_task(*ARC)
    path = next(task_data.rglob("ARC-Easy/test/*.parquet"))
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 16
    path.write_bytes(content)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"^{path} has other content .*; delete it and run"):
            make_task(*ARC)
    assert not caplog.messages
    path.unlink()
    make_task(*ARC)
    (task_data / "manifest.json").unlink()
    os.utime(path, (1, 1))  # what has been compared is not compared again
    make_task(*ARC)
    assert caplog.messages == [f"{path} is not verified: manifest.json does not have it"]


@pytest.mark.parametrize(
    ("source", "content", "read"),
    [
        (sources.WORD_LIST, b"apple pear plum", lambda: make_task("spelling")),
        (sources.IDENTITY, b'[{"role": "user"}]', lambda: make_task("identity")),
        (sources.CORE_BUNDLE, b"PK", lambda: find_bundle(None)),
    ],
)
def test_single_files_are_compared_with_the_manifest_too(task_data, source, content, read):
    task_data.mkdir()
    source.path.write_bytes(content)
    sources._add_to_manifest({source.name: source.url})
    source.path.write_bytes(content[:-1] + b"?")
    with pytest.raises(ValueError, match=f"^{source.path} has other content"):
        read()


def test_wrong_bytes_never_stay(hub, task_data):
    hub.files[ARC_FILE].corrupt = 2
    with pytest.raises(ValueError, match=r"twice delivered a allenai--ai2_arc/ARC-Easy/test/0000"):
        prepare([ARC])
    assert missing([ARC]) == ["allenai--ai2_arc/ARC-Easy/test"]
    assert not list((task_data / "allenai--ai2_arc").rglob("*.parquet"))


def test_single_files_come_from_elsewhere_and_are_continued(hub, task_data):
    words = sources.SingleFile("words_alpha.txt", hub.url("elsewhere/words_alpha.txt"))
    served = hub.files["elsewhere/words_alpha.txt"] = Served(b"apple\r\n" * 1000)
    served.cut_after = [3000] + [0] * 20
    with pytest.raises(ValueError, match="cannot reach"):
        fetch([words])
    assert lacking([words]) == [words]
    served.cut_after, hub.gets = [], []
    fetch([words])
    assert [asked for _, asked in hub.gets] == ["bytes=3000-"]
    assert words.path.read_bytes() == served.content
    assert read_manifest()["words_alpha.txt"]["size"] == 7000
    assert sorted(path.name for path in task_data.glob("[!.]*")) == ["manifest.json", words.name]
    assert not list(task_data.glob("*.part"))


def test_without_a_network_it_says_at_once_what_lacks(task_data, monkeypatch):
    """No server listens at HF_ENDPOINT here."""
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"cannot reach http://127.0.0.1:9 .*copy .*task_data"):
        make_task(*GSM)
    lacks = r"task_data lacks openai--gsm8k/main/train, allenai--ai2_arc/ARC-Easy/test; run scripts"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=lacks):
        prepare([GSM, ARC])
    with pytest.raises(ValueError, match=r"task_data lacks openai--gsm8k/main/train; run"):
        make_task(*GSM)
    assert time.monotonic() - began < 20  # no long retries


def test_a_data_set_that_the_hub_does_not_have(hub):
    with pytest.raises(ValueError, match=r"has no all/test in the data set cais/mmlu"):
        make_task("mmlu", "test")


def run_script(*args):
    command = [sys.executable, str(SCRIPT), *args]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_script_fetches_all_of_a_stage_and_checks_a_copy(hub, task_data, tmp_path, monkeypatch):
    hub.files["openai/gsm8k/main/test/0000.parquet"] = Served(parquet(sums(0, 10)))
    done = run_script("--stages", "rl")
    assert done.returncode == 0, done.stderr
    assert "3 files" in done.stdout
    copy = tmp_path / "copy"
    task_data.rename(copy)
    monkeypatch.setenv("NANOCHAT_TASK_DATA", str(copy))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    done = run_script("--stages", "rl", "--offline")
    assert done.returncode == 0, done.stderr
    assert "complete" in done.stdout
    done = run_script("--tasks", "gsm8k:test, arc-easy:test", "--offline")
    assert done.returncode == 1
    assert "allenai--ai2_arc/ARC-Easy/test is missing" in done.stderr
    assert "Traceback" not in done.stderr


def test_mistakes_on_the_command_line():
    prefetch = SimpleNamespace(**runpy.run_path(str(SCRIPT)))
    for settings, message in (
        ({"stages": "rl,sleep"}, "--stages knows midtrain, sft, rl, eval, core, not sleep"),
        ({"tasks": "gsm8k"}, "--tasks wants NAME:SPLIT"),
        ({"tasks": "gsm9k:test"}, "there is no task 'gsm9k'"),
    ):
        with pytest.raises(ValueError, match=message):
            prefetch.wanted_sources(prefetch.PrefetchConfig(**settings))
    with pytest.raises(ValueError, match="--workers must be at least 1, not 0"):
        fetch([source_of(*GSM)], workers=0)
