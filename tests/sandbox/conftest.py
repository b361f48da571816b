"""Every kind of walls that this machine has, and a record of the keepers that were started."""

import subprocess

import pytest
from walls import WALLS

from nanochat_jax.sandbox import run


@pytest.fixture(params=WALLS, ids=[walls.way for walls in WALLS])
def walls(request):
    refusal = run._try(request.param.way)
    if refusal is not None:
        pytest.skip(f"{request.param}: {refusal}")
    return request.param


@pytest.fixture
def recorded(monkeypatch):
    """The keepers that were started."""
    started = []

    class Recorded(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            started.append(self.pid)

    monkeypatch.setattr(run.subprocess, "Popen", Recorded)
    return started
