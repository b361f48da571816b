"""The process that sandbox.py starts: raises the walls, watches the program, leaves nothing behind.

    keeper                      keeps the time, kills and reaps
      └ builder                 where there are namespaces: mounts the new root; or it is bwrap
          └ init                the first process of the process namespace; or it is bwrap's
              └ program         limits, Landlock, seccomp, and at last the program itself

Started by the bare interpreter (-I -S), never imported by the package. Reads one JSON job from its
standard input; its exit code is that of the program, TIMED_OUT, or NO_WALLS. bwrap starts this file
once more, as the program, with the descriptor to report to as its argument.
"""

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from nanochat_jax import sandbox_kernel as kernel
from nanochat_jax import sandbox_program, sandbox_seccomp

del sys.path[0]  # the program must not find our modules

TIMED_OUT, NO_WALLS = 124, 125
OTHER_FAILURE = 1

Job = dict[str, Any]


def main() -> NoReturn:
    job = json.loads(sys.stdin.buffer.read())
    if len(sys.argv) > 1:
        _program(job, ready=int(sys.argv[1]))
    kernel.die_with_parent(signal.SIGTERM)
    kernel.adopt_orphans()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, signal.SIGTERM})
    ready, tell_ready = os.pipe()
    child = _fork(lambda: _inside(job, tell_ready))
    os.close(tell_ready)
    if not os.read(ready, 1):  # the walls are up, or whoever raised them is gone
        _kill_all()
        os._exit(NO_WALLS)
    code = _watch(child, time.monotonic() + job["timeout_s"])
    _kill_all()
    os._exit(code)


def _watch(child: int, deadline: float) -> int:
    """Waits for the child's end, for the deadline, or until it is told to stop."""
    while True:
        left = deadline - time.monotonic()
        found = signal.sigtimedwait({signal.SIGCHLD, signal.SIGTERM}, max(0.0, left))
        if found is None or found.si_signo == signal.SIGTERM:
            return TIMED_OUT
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            code = _code(status)
            return code if code not in (TIMED_OUT, NO_WALLS) else OTHER_FAILURE


def _kill_all() -> None:
    """Kills and reaps every descendant: orphans become children of the keeper."""
    while True:
        for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _inside(job: Job, ready: int) -> NoReturn:
    """Behind the keeper: namespaces if they are ours to make, then the program."""
    kernel.die_with_parent()
    kernel.offer_to_the_oom_killer()
    if job["way"] == "namespaces":
        kernel.unshare()
        kernel.build_root(job["visible"])
        kernel.die_with_parent()  # forgotten when the user namespace was made
        _hand_over(lambda: _hand_over(lambda: _program(job, ready)))
    if job["way"] == "bubblewrap":
        _become_bwrap(job, ready)
    _program(job, ready)


def _become_bwrap(job: Job, ready: int) -> NoReturn:
    """The same job, in bwrap's namespaces."""
    letter = os.memfd_create("job")
    os.write(letter, json.dumps(job).encode())
    os.lseek(letter, 0, os.SEEK_SET)
    os.dup2(letter, 0)
    os.set_inheritable(ready, True)
    os.set_inheritable(job["report"], True)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD, signal.SIGTERM})
    os.execv(job["bwrap"][0], [*job["bwrap"], str(ready)])


def _hand_over(then: Callable[[], NoReturn]) -> NoReturn:
    """Runs `then` in a child, whose exit code becomes this process's; reaps orphans on the way."""

    def behind() -> NoReturn:
        kernel.die_with_parent()
        then()

    child = _fork(behind)
    pid, status = os.wait()
    while pid != child:
        pid, status = os.wait()
    os._exit(_code(status))


def _program(job: Job, ready: int) -> NoReturn:
    """The last steps, each of which takes away the means for the ones before it."""
    report = job["report"]
    if job["folder"]:
        os.chdir(job["folder"])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD, signal.SIGTERM})
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    kernel.limit(job["memory_mib"], math.ceil(job["timeout_s"]) + 1)
    if job["way"] == "landlock":
        kernel.lock_files(job["visible"])
    kernel.drop_capabilities()
    kernel.die_with_parent()
    if job["seccomp"]:
        sandbox_seccomp.install(os.getpid(), may_write=job["way"] != "landlock")
    os.write(ready, b".")
    for number in range(3, kernel.OPEN_FILES):
        if number != report:
            with suppress(OSError):
                os.close(number)
    sandbox_program.run_program(job, report)


def _fork(then: Callable[[], NoReturn]) -> int:
    """A child that does `then`, and never comes back from here; returns its number."""
    child = os.fork()
    if child:
        return child
    try:
        then()
    except BaseException as error:
        print(error, flush=True)
    os._exit(OTHER_FAILURE)


def _code(status: int) -> int:
    """The exit code of a wait status; 128 + number for a signal, as shells do."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    main()
