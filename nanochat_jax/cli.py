"""What every script does: errors that people can read, and progress.

A user's mistake ends a script with one sentence; a traceback means a fault of ours.
"""

import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from nanochat_jax.distributed import PACKAGE, is_main_process, say

SCRIPTS = PACKAGE.parent / "scripts"
SECONDS_BETWEEN_LINES = 20  # of progress, where there is no terminal


def run_script(main: Callable[[], None], interrupted: str = "interrupted") -> None:
    """Runs a script's main; a mistake of the user becomes one sentence and exit code 1.

    That is a ValueError raised by our own code, or an OSError (no file, no right, no space).
    NANOCHAT_TRACEBACK=1 shows the traceback all the same. A reader that closes the output, as
    `| head` does, ends nothing. `interrupted` is what to say after a Ctrl-C that the script has not
    handled itself.
    """
    logging.basicConfig()  # unless a library has done so
    for handler in logging.getLogger().handlers:
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    try:
        with lasting_output():
            main()
    except (ValueError, OSError) as error:
        if os.environ.get("NANOCHAT_TRACEBACK") == "1" or not _is_the_users(error):
            raise
        message = f"error: {error}"
    except KeyboardInterrupt:
        message = interrupted
    else:
        return
    sys.exit(message)  # outside, so that the objects that the error refers to are freed first


def _is_the_users(error: Exception) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    parents = Path(frames[-1].filename).resolve().parents if frames else ()
    return isinstance(error, OSError) or PACKAGE in parents or SCRIPTS in parents


class OutputStream:
    """A stream whose end is not the end of the script.

    When it can no longer be written to (`| head` has read enough, a terminal was closed, the disk
    behind a redirection is full), what is printed is dropped from then on, and stderr says so.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.error: OSError | None = None
        if isinstance(stream, TextIOWrapper):  # a terminal may lack the letters that a model writes
            stream.reconfigure(errors="replace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, write: Callable[..., Any], *text: str) -> None:
        try:
            write(*text)
        except OSError as error:
            self.error = error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # also for what is still buffered
            os.close(nowhere)
            if sys.stdout is self:
                reason = "was closed" if isinstance(error, BrokenPipeError) else error.strerror
                print(f"the output cannot be written ({reason}); going on without", file=sys.stderr)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Inside, closed outputs are dropped; OSError at the end for one that failed in another way."""
    before = sys.stdout, sys.stderr
    for number, name in enumerate(("stdout", "stderr"), 1):
        setattr(sys, name, OutputStream(getattr(sys, name) or _nowhere(number)))
    out = cast(OutputStream, sys.stdout)
    try:
        yield
    finally:
        out.flush()
        sys.stdout, sys.stderr = before
    if out.error is not None and not isinstance(out.error, BrokenPipeError):
        raise OSError(f"a part of the output is lost ({out.error.strerror})")


def _nowhere(number: int) -> TextIO:
    """For an output that was closed from the start: else a file of ours would get its number."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.fstat(number)
    except OSError:
        os.dup2(nowhere, number)
    return os.fdopen(nowhere, "w")


@contextmanager
def progress_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """Shows on process 0 how far something is: call it with (done, total).

    A bar on a terminal; elsewhere, as in a log file, a line every SECONDS_BETWEEN_LINES.
    """
    console = Console(stderr=True)
    if is_main_process() and console.is_terminal:
        columns = (TextColumn(name), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(name, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    last_line = time.monotonic()

    def print_line(done: int, total: int) -> None:
        nonlocal last_line
        if time.monotonic() >= last_line + SECONDS_BETWEEN_LINES:
            last_line = time.monotonic()
            say(f"{name}: {100 * done / total:.0f} %")

    yield print_line
