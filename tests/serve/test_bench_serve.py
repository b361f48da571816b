"""bench_serve as a person starts it, with a server that it starts."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from running import script_environment

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_serve.py"


def test_many_clients_of_whom_some_hang_up_leave_nothing_behind(run_folder):
    flags = ("--start", "--clients=6", "--requests=20", "--sequential=2", "--max-tokens=24")
    done = subprocess.run(
        [sys.executable, SCRIPT, *flags, "--slots=4", "--disconnects=0.4"],
        env=script_environment(run_folder),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["requests"] == 20
    assert 0 < result["hung_up"] < 20
    assert result["errors_4xx"] == result["errors_5xx"] == result["errors_connection"] == 0
    assert result["stuck_slots"] == 0
    measured = ("tokens_per_s", "sequential_tokens_per_s", "concurrent_over_sequential")
    assert all(result[key] > 0 for key in (*measured, "ttft_p50_ms", "ttft_p99_ms", "itl_p99_ms"))
    assert "rss_growth_mib" in result


def test_a_server_that_cannot_start_is_one_sentence(run_folder, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(run_folder.parent.parent))
    monkeypatch.syspath_prepend(SCRIPT.parent)
    bench = importlib.import_module("bench_serve")
    config = bench.BenchServeConfig(start=True, run="nothing")
    with pytest.raises(ValueError, match="did not start"), bench.server(config):
        pass
