"""metrics.jsonl survives a sudden end, and wandb works offline."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

from nanochat_jax.runs import METRICS_FILE, Tracker, cut_metrics, read_metrics


def write(folder, steps):
    tracker = Tracker(folder)
    for step in steps:
        tracker.log("train", step, loss=1.0 / (step + 1))
    tracker.close()


def test_every_record_is_on_disk_when_log_returns(tmp_path):
    tracker = Tracker(tmp_path)
    tracker.log("train", 0, loss=0.1 + 0.2)
    assert json.loads((tmp_path / METRICS_FILE).read_text())["loss"] == 0.1 + 0.2  # exactly
    tracker.close()


def test_numbers_that_json_lacks_become_null(tmp_path):
    tracker = Tracker(tmp_path)
    tracker.log("train", 0, loss=math.nan, nested={"x": math.inf})
    tracker.close()
    line = json.loads((tmp_path / METRICS_FILE).read_text(), parse_constant=lambda name: 1 / 0)
    assert line == {"kind": "train", "step": 0, "loss": None, "nested": {"x": None}}


def test_a_torn_line_is_left_out_and_cut_away(tmp_path):
    write(tmp_path, range(3))
    whole = (tmp_path / METRICS_FILE).read_bytes()
    torn = '{"kind": "sample", "step": 3, "texts": ["caf\u00e9'.encode()[:-1]  # inside the é
    (tmp_path / METRICS_FILE).write_bytes(whole + torn)
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1, 2]
    cut_metrics(tmp_path, lambda record: True)
    assert (tmp_path / METRICS_FILE).read_bytes() == whole


def test_a_damaged_line_that_is_not_the_last_is_named(tmp_path, caplog):
    write(tmp_path, range(4))
    path = tmp_path / METRICS_FILE
    lines = path.read_text().splitlines(keepends=True)
    for damaged in ('{"kind": "train", "st\n', "[1]\n", "\0\0\0\n"):
        caplog.clear()
        path.write_text("".join([*lines[:2], damaged, *lines[3:]]))
        assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1, 3]
        assert [record.message for record in caplog.records] == [
            f"{path}: line 3 is damaged and left out"
        ]


def test_cutting_keeps_what_is_asked_for_and_appending_goes_on(tmp_path):
    write(tmp_path, range(5))
    cut_metrics(tmp_path, lambda record: record["step"] < 3)
    write(tmp_path, [3, 4])
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1, 2, 3, 4]
    cut_metrics(tmp_path / "nothing", lambda record: True)  # no file, no matter


def test_only_the_first_process_writes(tmp_path):
    tracker = Tracker(tmp_path, write=False, wandb_mode="offline")
    tracker.log("train", 0, loss=1.0)
    tracker.close()
    assert not list(tmp_path.iterdir())


WANDB_RUN = """
import sys
from pathlib import Path
from nanochat_jax.runs import Tracker
for steps in ([0, 1], [2, 3]):  # the second is a resumed run
    tracker = Tracker(Path(sys.argv[1]), name="n", config={"depth": 2}, wandb_mode="offline")
    for step in steps:
        tracker.log("train", step, loss=1.0, note="words")
    tracker.close()
"""


def test_wandb_offline_writes_into_the_run_folder_under_one_id(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WANDB_RUN, str(tmp_path)],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    run_id = (tmp_path / "wandb_id.txt").read_text()
    files = list(tmp_path.glob(f"wandb/offline-run-*-{run_id}/*.wandb"))
    assert files
    assert all(b"train/loss" in path.read_bytes() for path in files)
    assert len(read_metrics(tmp_path)) == 4
