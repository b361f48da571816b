"""Scripts called as a person calls them, without the cost of another Python."""

import runpy
import sys

import pytest
from tiny_run import ROOT


@pytest.fixture
def call(monkeypatch, capsys):
    """call("script.py", "--flag=1"): what it prints, or the sentence it ends with."""

    def run(script: str, *args: str) -> str:
        monkeypatch.setattr(sys, "argv", [script, *args])
        try:
            runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
        except SystemExit as end:
            return str(end.code)
        return capsys.readouterr().out

    return run
