"""Fetching task data from a hub on this machine, and checking a copy without one."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from task_hub import TaskHub

from nanochat_jax.data import download as downloads
from nanochat_jax.tasks import sources
from nanochat_jax.tasks.registry import make_task, missing, prepare, source_of
from nanochat_jax.tasks.sources import check, fetch, lacking, read_manifest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "prefetch.py"
GSM = ("gsm8k", "train")
ARC = ("arc-easy", "test")
FIRST, SECOND = "main/train/0000.parquet", "main/train/0001.parquet"


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
    served = TaskHub()
    arc = {"question": "?", "choices": {"text": ["x"], "label": ["A"]}, "answerKey": "A"}
    served.files = {
        ("openai/gsm8k", FIRST): parquet(sums(0, 500)),
        ("openai/gsm8k", SECOND): parquet(sums(500, 500)),
        ("allenai/ai2_arc", "ARC-Easy/test/0000.parquet"): parquet([arc]),
    }
    monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
    monkeypatch.setattr(downloads, "PAUSE", 0.0)
    yield served
    huggingface_hub.close_session()
    served.close()


def gets(hub, name):
    return [asked for method, path, asked in hub.log if method == "GET" and path.endswith(name)]


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
    assert (folder / "00001.parquet").read_bytes() == hub.files["openai/gsm8k", SECOND]
    assert not list(task_data.rglob("*.part"))
    hub.log.clear()
    assert len(make_task(*GSM)) == 1000
    assert hub.log == []


def test_the_manifest_vouches_for_every_file(hub, task_data):
    prepare([GSM, ARC])
    wanted = [source_of(*GSM), source_of(*ARC)]
    assert check(wanted) == ([], [])
    manifest = read_manifest()
    assert len(manifest) == 3
    name = "openai--gsm8k/main/train/00000.parquet"
    content = hub.files["openai/gsm8k", FIRST]
    assert manifest[name]["size"] == len(content)
    assert manifest[name]["url"].startswith(hub.endpoint)
    (task_data / name).write_bytes(content[:-1] + b"!")
    assert check(wanted)[0] == [f"{name} has another content than it had"]
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


def test_a_cut_connection_is_continued_and_wrong_bytes_never_stay(hub, task_data):
    hub.cut[FIRST] = 1000
    prepare([GSM])
    assert gets(hub, FIRST) == [None, "bytes=1000-"]
    arc = "ARC-Easy/test/0000.parquet"
    hub.corrupt.add(arc)
    with pytest.raises(ValueError, match=r"twice delivered a allenai--ai2_arc/ARC-Easy/test/0000"):
        prepare([ARC])
    assert missing([GSM, ARC]) == ["allenai--ai2_arc/ARC-Easy/test"]
    assert not list((task_data / "allenai--ai2_arc").rglob("*.parquet"))


def test_single_files_come_from_elsewhere(hub, task_data, monkeypatch):
    words = sources.SingleFile("words_alpha.txt", f"{hub.endpoint}/elsewhere/words_alpha.txt")
    hub.files["", "words_alpha.txt"] = b"apple\r\nbread\r\n"
    fetch([words])
    assert words.path.read_bytes() == b"apple\r\nbread\r\n"
    assert read_manifest()["words_alpha.txt"]["size"] == 14
    assert lacking([words]) == []


def test_without_a_network_it_says_at_once_what_lacks(task_data, monkeypatch):
    """Nobody answers at HF_ENDPOINT here."""
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"cannot reach http://127.0.0.1:9 .*copy .*task_data"):
        make_task(*GSM)
    lacks = r"task_data lacks openai--gsm8k/main/train, allenai--ai2_arc/ARC-Easy/test; run scripts"
    with pytest.raises(ValueError, match=lacks):
        prepare([GSM, ARC], offline=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
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
    hub.files["openai/gsm8k", "main/test/0000.parquet"] = parquet(sums(0, 10))
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


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--stages", "rl,sleep"], "--stages knows midtrain, sft, rl, eval, core, not sleep"),
        (["--tasks", "gsm8k"], "--tasks wants NAME:SPLIT"),
        (["--tasks", "gsm9k:test"], "there is no task 'gsm9k'"),
        (["--tasks", "gsm8k:test", "--workers", "0"], "--workers must be at least 1, not 0"),
    ],
)
def test_mistakes_on_the_command_line(args, message):
    done = run_script(*args)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_kill_9_in_the_middle_of_a_file(hub, task_data):
    hub.stall = threading.Event()
    command = [sys.executable, str(SCRIPT), "--tasks", "gsm8k:train"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 60
    half = len(hub.files["openai/gsm8k", FIRST]) // 2
    while not any(p.stat().st_size >= half for p in task_data.rglob(".00000.parquet.*.part")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert missing([GSM]) == ["openai--gsm8k/main/train"]
    hub.stall.set()
    hub.log.clear()
    done = run_script("--tasks", "gsm8k:train")
    assert done.returncode == 0, done.stderr
    assert gets(hub, FIRST) == [f"bytes={half}-"]
    assert len(make_task(*GSM)) == 1000
