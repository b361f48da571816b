"""Every isolation that this machine offers, and a record of the supervisors that were started."""

import subprocess

import pytest
from isolations import ISOLATIONS

from nanochat_jax.sandbox import run


@pytest.fixture(params=ISOLATIONS, ids=[how.backend for how in ISOLATIONS])
def how(request):
    if (why := run._try(request.param.backend)) is not None:
        pytest.skip(f"{request.param}: {why}")
    return request.param


@pytest.fixture
def recorded(monkeypatch):
    """The supervisors that were started."""
    started = []

    class Recorded(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            started.append(self.pid)

    monkeypatch.setattr(run.subprocess, "Popen", Recorded)
    return started
