"""Progress in a log file, and outputs that nobody takes any more."""

import subprocess
import sys
from pathlib import Path

import pytest

from nanochat_jax import cli


def test_progress_is_lines_in_a_log_file(capsys, monkeypatch):
    monkeypatch.setattr(cli, "SECONDS_BETWEEN_LINES", 0)
    with cli.progress_bar("CORE") as bar:
        bar(1, 8)
        bar(8, 8)
    assert capsys.readouterr().out == "CORE: 12 %\nCORE: 100 %\n"


def test_short_work_prints_no_progress_in_a_log_file(capsys):
    with cli.progress_bar("CORE") as bar:
        for done in range(1, 9):
            bar(done, 8)
    assert capsys.readouterr() == ("", "")


SCRIPT = """
import os, sys
from pathlib import Path
from nanochat_jax.cli import run_script
from nanochat_jax.distributed import say

def main():
    for i in range(20_000):
        say(f"step {i} Σ")
    print("also on the other", file=sys.stderr)
    Path(sys.argv[1]).write_text("finished")

run_script(main)
"""


@pytest.mark.parametrize(
    ("shell", "said"),
    [
        ("{} | head -n 1", "step 0 Σ\nthe output cannot be written (was closed); going on without"),
        ("{} >&-", "also on the other"),
        ("{} > /dev/full", "the output cannot be written (No space left on device)"),
        ("{} 2>&1 | head -n 1", "step 0 Σ\n"),
        ("{} 2>&- | tail -n 1", "step 19999 Σ"),
        ("PYTHONIOENCODING=latin-1 {} | tail -n 1", "step 19999 ?"),
    ],
)
def test_a_closed_output_ends_no_script_and_is_said_once(tmp_path, shell, said):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = shell.format(f"{sys.executable} {tmp_path / 'script.py'} {tmp_path / 'done'}")
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ".", "PATH": "/usr/bin:/bin", "PYTHONUTF8": "1"},
    )
    output = done.stdout + done.stderr
    assert said in output
    assert "Traceback" not in output
    assert "Exception" not in output
    assert output.count("cannot be written") <= 1
    assert (tmp_path / "done").read_text() == "finished"
    # What was wanted is lost there, and nobody closed it.
    assert done.returncode == (1 if "/dev/full" in shell else 0)
