"""What the tests of the sandbox share: running with a given isolation, finding what is left."""

from pathlib import Path

import pytest

from nanochat_jax.sandbox import run
from nanochat_jax.sandbox.run import Isolation, ProgramResult, isolation

ROOT = Path(__file__).resolve().parent.parent.parent
ISOLATIONS = [Isolation(backend) for backend in run.BACKENDS]


def within(
    how: Isolation, program: str, seconds: float = 10, memory_mib: int = 256
) -> ProgramResult:
    return run._run(how, program, seconds, memory_mib)


def check(how: Isolation, program: str, **options) -> ProgramResult:
    """The program's own assertions hold."""
    result = within(how, program, **options)
    assert result.finished, (result.reason, result.output)
    return result


def any_isolation() -> Isolation:
    try:
        return isolation()
    except ValueError as error:
        pytest.skip(str(error))


def leftovers(supervisors: list[int]) -> list[int]:
    """Processes, zombies too, that belong to the session of one of the supervisors."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) in supervisors:
            found.append(int(stat.parent.name))
    return found
