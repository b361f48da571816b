"""Runs a Python program that nobody has read: what a language model wrote, with its tests.

    result = run("assert sum([1, 2]) == 3")
    result.finished, result.reason, result.output

The program runs in a process of its own, as nobody, without network, environment or files but
Python's own, with an empty /tmp of 16 MiB, the standard library, and limits on time, memory, files,
threads and output. The walls are the first of these that the kernel offers:

    bubblewrap    namespaces made by bwrap, where that is installed
    namespaces    user, mount, process, network, IPC and host name namespaces made here
    landlock      Landlock for files and seccomp for all else, as in most containers; then nothing
                  can be written, not even in /tmp

seccomp stands behind all of them. Where none works, `run` refuses, unless told that it may go on
all the same. What the program prints and how it ends is never trusted; only a secret, given out
behind its last line, makes it count as finished. A program that breaks into its own interpreter,
with forged bytecode, could find the secret and count as finished; it would still not get out.
"""

import json
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Literal

from nanochat_jax.sandbox.kernel import DEVICES

Process = subprocess.Popen[bytes]
Way = Literal["bubblewrap", "namespaces", "landlock", "none"]

MAX_OUTPUT = 1 << 20  # bytes that a program may print
KEPT_OUTPUT = 1 << 16  # and how many of them are given back
MAX_REPORT = 4096
GRACE_S = 30.0  # for raising the walls on a busy machine; the keeper minds the program's own time
TIMED_OUT, NO_WALLS = 124, 125  # child.py
WAYS: tuple[Way, ...] = ("bubblewrap", "namespaces", "landlock")

_PACKAGE = Path(__file__).resolve().parent.parent
_CHILD_FILES = (
    "__init__.py",
    *(f"sandbox/{name}.py" for name in ("__init__", "child", "kernel", "program", "seccomp")),
)
_LIBRARIES = (
    *("/lib", "/lib32", "/lib64", "/libx32", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libx32"),
    *("/usr/local/lib", "/etc/ld.so.cache", "/nix/store", "/gnu/store"),
)


@dataclass(frozen=True)
class ProgramResult:
    """How a program ended. `output` is what it printed, standard error included."""

    finished: bool
    reason: str
    output: str


@dataclass(frozen=True)
class Isolation:
    """Behind which walls programs run; only a `way` of "none", where allowed, may lack seccomp."""

    way: Way
    seccomp: bool = True

    def __str__(self) -> str:
        return self.way + (" and seccomp" if self.seccomp and self.way != "landlock" else "")


def run(
    program: str,
    *,
    timeout_s: float = 5.0,
    memory_mib: int = 256,
    allow_unsandboxed: bool = False,
) -> ProgramResult:
    """Runs `program` as __main__ behind walls. ValueError where there are none to be had.

    finished: it ran to its last line within `timeout_s` seconds and `memory_mib` MiB of address
    space. `allow_unsandboxed` goes on, with limits only, where isolation() would refuse.
    """
    if timeout_s <= 0 or memory_mib < 64:
        raise ValueError(
            f"a program needs time and at least 64 MiB, not {timeout_s} s and {memory_mib} MiB"
        )
    walls = _without_walls() if allow_unsandboxed and not _found()[0] else isolation()
    return _run(walls, program, timeout_s, memory_mib)


def isolation() -> Isolation:
    """The walls of this machine, tried out once. ValueError, saying why, where there are none."""
    found, refusals = _found()
    if found is None:
        raise ValueError(
            f"there is no way to isolate generated code on this machine ({refusals}); give its "
            "container user namespaces or Landlock, install bubblewrap, or accept that such code "
            "can read and delete your files and pass --allow-unsandboxed"
        )
    return found


# --- which walls ----------------------------------------------------------------------------------


@cache
def _found() -> tuple[Isolation | None, str]:
    """The first way that works, or why none does."""
    refusals = []
    for way in WAYS:
        refusal = _try(way)
        if refusal is None:
            return Isolation(way), ""
        refusals.append(f"{way}: {refusal}")
    return None, "; ".join(dict.fromkeys(refusals)) or "none is known"


def _try(way: Way) -> str | None:
    """None when a program runs behind these walls and seccomp, else what stands against it."""
    if not sys.platform.startswith("linux"):
        return "only Linux has it"
    if way == "bubblewrap" and shutil.which("bwrap") is None:
        return "not installed"
    result = _run(Isolation(way), "", timeout_s=20, memory_mib=256)
    return None if result.finished else result.reason


@cache
def _without_walls() -> Isolation:
    return Isolation("none", seccomp=_try("none") is None)


# --- running --------------------------------------------------------------------------------------


def _run(walls: Isolation, program: str, timeout_s: float, memory_mib: int) -> ProgramResult:
    secret = secrets.token_hex(32)
    # Objects, not numbers: closing those twice could close what another thread has opened.
    read_end, write_end = os.pipe()
    with open(read_end, "rb") as reader, open(write_end, "wb") as writer, _start(walls) as start:
        job = {
            "program": program,
            "secret": secret,
            "report": writer.fileno(),
            "way": walls.way,
            "seccomp": walls.seccomp,
            "visible": visible_paths(),
            "python": _python(),
            "bwrap": _bwrap() if walls.way == "bubblewrap" else [],
            "folder": start,
            "timeout_s": timeout_s,
            "memory_mib": memory_mib,
        }
        with _started(writer.fileno(), json.dumps(job)) as (process, printed):
            writer.close()
            output, report, cut = _listen(printed, reader, timeout_s + GRACE_S)
            code = _end(process, patience=0 if cut else 0.5)
    finished = code == 0 and report == secret.encode() and not cut
    reason = "finished" if finished else _reason(code, report, output, cut, timeout_s)
    return ProgramResult(finished, reason, output[:KEPT_OUTPUT].decode(errors="replace"))


def _reason(code: int, report: bytes, output: bytes, cut: str, timeout_s: float) -> str:
    if cut:
        return cut
    if code == TIMED_OUT:
        return f"stopped after {timeout_s:g} s"
    if code == NO_WALLS:
        return output.decode(errors="replace").strip()[-300:] or "no walls"
    if code > 128 and code - 128 in [number.value for number in signal.Signals]:
        return f"ended by {signal.Signals(code - 128).name}"
    if code == 1 and report:
        return report.decode(errors="replace")
    return f"it left before its last line (exit code {code})"


def _listen(printed: IO[bytes], reported: IO[bytes], seconds: float) -> tuple[bytes, bytes, str]:
    """What is printed and reported until both ends close; and why it was cut short, if it was."""
    deadline = time.monotonic() + seconds
    output, report = bytearray(), bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(printed, selectors.EVENT_READ, output)
        selector.register(reported, selectors.EVENT_READ, report)
        while selector.get_map():
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                return bytes(output), bytes(report), f"no answer in {seconds:g} s"
            for key, _ in ready:
                part = os.read(key.fd, 1 << 16)
                key.data.extend(part)
                if not part:
                    selector.unregister(key.fileobj)
            if len(output) > MAX_OUTPUT or len(report) > MAX_REPORT:
                return bytes(output), b"", f"it printed more than {MAX_OUTPUT:,} bytes"
    return bytes(output), bytes(report), ""


def _end(process: Process, patience: float) -> int:
    """The keeper's exit code. It may leave by itself, is asked to, and is made to at last."""
    asks = ((patience, process.terminate), (5, lambda: os.killpg(process.pid, signal.SIGKILL)))
    for seconds, ask in asks:
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        if process.returncode is None:
            ask()
    code = process.wait()
    return code if code >= 0 else 128 - code


@contextmanager
def _started(report: int, job: str) -> Iterator[tuple[Process, IO[bytes]]]:
    """The keeper at work, and what it prints; it is gone at the end, whatever happens."""
    process = subprocess.Popen(
        [*_python(), str(_PACKAGE / "sandbox/child.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=(report,),
        env=_environment(),
        cwd="/",
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdout:
        try:
            with suppress(BrokenPipeError), process.stdin:
                process.stdin.write(job.encode())
            yield process, process.stdout
        finally:
            _end(process, patience=0)


def _environment() -> dict[str, str]:
    """What a program finds in os.environ, and what some interpreters cannot start without."""
    needed = {name: value for name, value in os.environ.items() if name == "LD_LIBRARY_PATH"}
    # One arena: glibc takes 64 MiB of the bounded address space for each, so for each thread.
    fixed = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "MALLOC_ARENA_MAX": "1"}
    return fixed | needed


def _python() -> list[str]:
    return [_interpreter(), "-I", "-S", "-B", "-X", "utf8"]


def _bwrap() -> list[str]:
    """The command that builds the world of kernel.build_root, up to complete_bwrap."""
    command = [shutil.which("bwrap") or "bwrap", "--unshare-all", "--die-with-parent"]
    command += ["--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN"]  # until complete_bwrap is done
    command += ["--unshare-user", "--uid", "65534", "--gid", "65534", "--hostname", "sandbox"]
    command += ["--perms", "1777", "--tmpfs", "/tmp"]
    for path in filter(os.path.exists, DEVICES):
        command += ["--dev-bind", path, path]
    for path in visible_paths():
        link = os.path.islink(path)
        command += ["--symlink", os.readlink(path), path] if link else ["--ro-bind", path, path]
    command += ["--ro-bind", _interpreter(), _interpreter()]
    for name in _CHILD_FILES:
        command += ["--ro-bind", str(_PACKAGE / name), f"/sandbox/nanochat_jax/{name}"]
    return [*command, "--remount-ro", "/", *_python(), "/sandbox/nanochat_jax/sandbox/child.py"]


def _interpreter() -> str:
    """The interpreter itself, not the one of a virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def visible_paths() -> list[str]:
    """What a program may read: the standard library and the shared libraries of the system."""
    python = (os.path.join(sys.base_prefix, "lib"), os.path.dirname(os.path.abspath(os.__file__)))
    found = [path for path in (*_LIBRARIES, *python) if os.path.exists(path)]
    above = [path for path in found if not os.path.islink(path)]
    return [
        path
        for path in dict.fromkeys(found)
        if not any(path.startswith(other.rstrip("/") + "/") for other in above)
    ]


@contextmanager
def _start(walls: Isolation) -> Iterator[str]:
    """The folder that the program starts in; "" where the walls bring one along."""
    if walls.way != "none":
        yield ""
        return
    prefix = "nanochat_sandbox_"
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as folder:
        yield folder
