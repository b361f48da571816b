"""The process that run.py starts: isolates the program, watches it, leaves nothing behind.

    supervisor                  enforces the time limit, kills and reaps
      └ mounter                 where there are namespaces: mounts the new root; or it is bwrap
          └ init                the first process of the process namespace; or it is bwrap's
              └ program         limits, Landlock, seccomp; becomes program.py in the end

Started by the bare interpreter (-I -S), never imported by the package. Reads its payload, one JSON
object, from standard input; its exit code is that of the program, TIMED_OUT, or NO_ISOLATION. bwrap
starts this file once more, as the program; its argument then is the descriptor to signal readiness.
"""

import fcntl
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

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from nanochat_jax.sandbox import kernel, seccomp

del sys.path[0]

TIMED_OUT, NO_ISOLATION = 124, 125
OTHER_FAILURE = 1

type Payload = dict[str, Any]

# Read now: its file cannot be opened from inside.
_RUNNER = Path(__file__).with_name("program.py").read_text(encoding="utf-8")


def main() -> NoReturn:
    payload = json.loads(sys.stdin.buffer.read())
    # Numbered beyond what the program may open, so that the filter can tell it from all others.
    interpreter = os.open(payload["python"][0], os.O_RDONLY)
    payload["interpreter"] = fcntl.fcntl(interpreter, fcntl.F_DUPFD_CLOEXEC, kernel.OPEN_FILES)
    os.close(interpreter)
    if len(sys.argv) > 1:
        kernel.complete_bwrap()
        _program(payload, ready=int(sys.argv[1]))
    _children()  # fails now where /proc does not list them
    kernel.die_with_parent(signal.SIGTERM)
    kernel.prctl(kernel.SET_SUBREAPER, 1)  # orphans become our children, which we can reap
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a parent may ignore it, and we inherit that
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, signal.SIGTERM})
    ready, signal_ready = os.pipe()
    child = _fork(lambda: _isolate(payload, signal_ready))
    os.close(signal_ready)
    if not os.read(ready, 1):  # empty: whoever should have isolated the program is gone
        _kill_all()
        os._exit(NO_ISOLATION)
    code = _watch(child, time.monotonic() + payload["timeout_s"])
    _kill_all()
    if payload["folder"]:  # here too, as the parent may be gone
        import shutil  # each import takes time from every program

        shutil.rmtree(payload["folder"], ignore_errors=True)
    os._exit(code)


def _watch(child: int, deadline: float) -> int:
    """Waits for the child's end, for the deadline, or for SIGTERM."""
    while True:
        left = deadline - time.monotonic()
        found = signal.sigtimedwait({signal.SIGCHLD, signal.SIGTERM}, max(0.0, left))
        if found is None or found.si_signo == signal.SIGTERM:
            return TIMED_OUT
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            code = _exit_code(status)
            return code if code not in (TIMED_OUT, NO_ISOLATION) else OTHER_FAILURE


def _kill_all() -> None:
    """Kills and reaps every descendant: orphans become children of the supervisor."""
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
        raise kernel.Refused(f"/proc does not list child processes ({error.strerror})") from None


def _isolate(payload: Payload, ready: int) -> NoReturn:
    """Below the supervisor: namespaces, made here or by bwrap, then the program."""
    with suppress(OSError):  # helpful, not needed: first to be killed when memory runs out
        Path("/proc/self/oom_score_adj").write_text("1000")
    if payload["backend"] == "bubblewrap":
        _write_stdin(payload)
        os.set_inheritable(ready, True)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD, signal.SIGTERM})
        os.execv(payload["bwrap"][0], [*payload["bwrap"], str(ready)])
    if payload["backend"] == "namespaces":
        kernel.unshare()
        kernel.build_root(payload["visible"])
        kernel.die_with_parent()  # forgotten when the user namespace was made
        _delegate(lambda: _delegate(lambda: _program(payload, ready)))
    _program(payload, ready)


def _write_stdin(payload: Payload) -> None:
    """Makes `payload` the standard input of the program that this process becomes."""
    memory = os.memfd_create("payload")
    os.write(memory, json.dumps(payload).encode())
    os.lseek(memory, 0, os.SEEK_SET)
    os.dup2(memory, 0)
    os.close(memory)


def _delegate(then: Callable[[], NoReturn]) -> NoReturn:
    """Runs `then` in a child, whose exit code becomes this process's; reaps orphans meanwhile."""
    child = _fork(then)
    pid, status = os.wait()
    while pid != child:
        pid, status = os.wait()
    os._exit(_exit_code(status))


def _program(payload: Payload, ready: int) -> NoReturn:
    """The last steps, each of which takes away the means for the ones before it."""
    if payload["folder"]:
        os.chdir(payload["folder"])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD, signal.SIGTERM})
    _write_stdin({name: payload[name] for name in ("program", "secret")})
    # Where it shares its user with all else that runs, memory bounds its threads.
    count_tasks = payload["backend"] in ("bubblewrap", "namespaces") or not payload["seccomp"]
    kernel.limit(payload["memory_mib"], math.ceil(payload["timeout_s"]) + 1, count_tasks)
    if payload["backend"] == "landlock":
        kernel.lock_files(payload["visible"], payload["python"][0])
    kernel.drop_capabilities()
    kernel.die_with_parent()
    if payload["seccomp"]:
        may_write = payload["backend"] != "landlock"
        seccomp.install(os.getpid(), payload["interpreter"], may_write)
    # A new interpreter: in this one, ctypes would give the program the raw memory.
    os.set_inheritable(ready, True)
    command = [*payload["python"], "-c", _RUNNER, str(payload["result_pipe"]), str(ready)]
    os.execve(payload["interpreter"], command, os.environ)


def _fork(then: Callable[[], NoReturn]) -> int:
    """A child that does `then`, and ends with its parent; returns its process id."""
    child = os.fork()
    if child:
        return child
    try:
        kernel.die_with_parent()
        then()
    except BaseException as error:
        print(error, flush=True)
    os._exit(OTHER_FAILURE)


def _exit_code(status: int) -> int:
    """The exit code of a wait status; 128 + number for a signal, as shells do."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    try:
        main()
    except Exception as error:  # of the supervisor, or inside bwrap
        print(error, flush=True)
        os._exit(NO_ISOLATION)
