"""The process that run.py starts: raises the walls, watches the program, leaves nothing behind.

    keeper                      keeps the time, kills and reaps
      └ builder                 where there are namespaces: mounts the new root; or it is bwrap
          └ init                the first process of the process namespace; or it is bwrap's
              └ program         limits, Landlock, seccomp; becomes program.py at last

Started by the bare interpreter (-I -S), never imported by the package. Reads one JSON job from its
standard input; its exit code is that of the program, TIMED_OUT, or NO_WALLS. bwrap starts this file
once more, as the program, with the descriptor that tells that the walls are up as its argument.
"""

import fcntl
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from nanochat_jax.sandbox import kernel, seccomp

del sys.path[0]

TIMED_OUT, NO_WALLS = 124, 125
OTHER_FAILURE = 1

Job = dict[str, Any]

# Read now: behind the walls its file is out of sight.
_RUNNER = Path(__file__).with_name("program.py").read_text(encoding="utf-8")


def main() -> NoReturn:
    job = json.loads(sys.stdin.buffer.read())
    # Numbered beyond what the program may open, so that the filter can tell it from all others.
    interpreter = os.open(job["python"][0], os.O_RDONLY)
    job["interpreter"] = fcntl.fcntl(interpreter, fcntl.F_DUPFD_CLOEXEC, kernel.OPEN_FILES)
    os.close(interpreter)
    if len(sys.argv) > 1:
        kernel.complete_bwrap()
        _program(job, ready=int(sys.argv[1]))
    _children()  # says now that they cannot be found
    kernel.die_with_parent(signal.SIGTERM)
    kernel.adopt_orphans()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a parent may ignore it, and we inherit that
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, signal.SIGTERM})
    ready, tell_ready = os.pipe()
    child = _fork(lambda: _inside(job, tell_ready))
    os.close(tell_ready)
    if not os.read(ready, 1):  # the walls are up, or whoever raised them is gone
        _kill_all()
        os._exit(NO_WALLS)
    code = _watch(child, time.monotonic() + job["timeout_s"])
    _kill_all()
    if job["folder"]:  # here too, as the parent may be gone
        import shutil  # each import takes time from every program

        shutil.rmtree(job["folder"], ignore_errors=True)
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
        for child in _children():
            os.kill(child, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _children() -> list[int]:
    try:
        return [*map(int, Path("/proc/thread-self/children").read_text().split())]
    except OSError as error:
        raise kernel.Refused(f"/proc does not tell the children ({error.strerror})") from None


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
    _hand_in(job)
    os.set_inheritable(ready, True)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD, signal.SIGTERM})
    os.execv(job["bwrap"][0], [*job["bwrap"], str(ready)])


def _hand_in(letter: Job) -> None:
    """Makes `letter` the standard input of what this process becomes."""
    sheet = os.memfd_create("letter")
    os.write(sheet, json.dumps(letter).encode())
    os.lseek(sheet, 0, os.SEEK_SET)
    os.dup2(sheet, 0)
    os.close(sheet)


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
    if job["folder"]:
        os.chdir(job["folder"])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD, signal.SIGTERM})
    _hand_in({name: job[name] for name in ("program", "secret")})
    # Where it shares its user with all else that runs, memory bounds its threads.
    count_tasks = job["way"] in ("bubblewrap", "namespaces") or not job["seccomp"]
    kernel.limit(job["memory_mib"], math.ceil(job["timeout_s"]) + 1, count_tasks)
    if job["way"] == "landlock":
        kernel.lock_files(job["visible"], job["python"][0])
    kernel.drop_capabilities()
    kernel.die_with_parent()
    if job["seccomp"]:
        may_write = job["way"] != "landlock"
        seccomp.install(os.getpid(), job["interpreter"], may_write)
    # A new interpreter: in this one, ctypes would give the program the raw memory.
    os.set_inheritable(ready, True)
    command = [*job["python"], "-c", _RUNNER, str(job["report"]), str(ready)]
    os.execve(job["interpreter"], command, os.environ)


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
    try:
        main()
    except Exception as error:  # of the keeper, or behind bwrap
        print(error, flush=True)
        os._exit(NO_WALLS)
