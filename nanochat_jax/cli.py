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
from pathlib import Path

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
    NANOCHAT_TRACEBACK=1 shows the traceback all the same. `interrupted` is what to say after a
    Ctrl-C that the script has not seen to itself.
    """
    logging.basicConfig()  # unless a library has done so
    for handler in logging.getLogger().handlers:
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    try:
        main()
    except (ValueError, OSError) as error:
        if os.environ.get("NANOCHAT_TRACEBACK") == "1" or not _is_the_users(error):
            raise
        message = f"error: {error}"
    except KeyboardInterrupt:
        message = interrupted
    else:
        return
    sys.exit(message)  # outside, so that what the error holds on to is gone by then


def _is_the_users(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    parents = Path(frames[-1].filename).resolve().parents if frames else ()
    return PACKAGE in parents or SCRIPTS in parents


@contextmanager
def progress_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """Shows on process 0 how far something is: call it with (done, total).

    A bar on a terminal; elsewhere, as in a log file, a line now and then.
    """
    console = Console(stderr=True)
    if not is_main_process() or not console.is_terminal:
        yield _lines_of_progress(name)
        return
    columns = (TextColumn(name), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _lines_of_progress(name: str) -> Callable[[int, int], None]:
    told = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() >= told + SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            say(f"{name}: {100 * done / total:.0f} %")

    return tell
