"""What the tests of the sandbox share: running behind given walls, finding what is left."""

from pathlib import Path

import pytest

from nanochat_jax.sandbox import run
from nanochat_jax.sandbox.run import Isolation, ProgramResult, isolation

ROOT = Path(__file__).resolve().parent.parent.parent
WALLS = [Isolation(way) for way in run.WAYS]


def within(
    walls: Isolation, program: str, seconds: float = 10, memory_mib: int = 256
) -> ProgramResult:
    return run._run(walls, program, seconds, memory_mib)


def check(walls: Isolation, program: str, **options) -> ProgramResult:
    """The program's own assertions hold."""
    result = within(walls, program, **options)
    assert result.finished, (result.reason, result.output)
    return result


def isolated() -> Isolation:
    try:
        return isolation()
    except ValueError as error:
        pytest.skip(str(error))


def leftovers(keepers: list[int]) -> list[int]:
    """Processes, zombies too, that belong to the session of one of the keepers."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) in keepers:
            found.append(int(stat.parent.name))
    return found
