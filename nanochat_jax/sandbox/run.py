"""Runs an untrusted Python program: what a language model wrote, with its tests.

    result = run("assert sum([1, 2]) == 3")
    result.finished, result.reason, result.output

The program runs in a process of its own, as nobody, without network, environment or files but
Python's own, with an empty /tmp of 16 MiB, the standard library, and limits on time, memory, files,
threads and output. It is isolated by the first of these backends that the kernel offers:

    bubblewrap    namespaces made by bwrap, where that is installed
    namespaces    user, mount, process, network, IPC and host name namespaces made here
    landlock      Landlock for files and seccomp for all else, as in most containers; then nothing
                  can be written, not even in /tmp

seccomp is added to all of them. Where none works, `run` refuses, unless the caller allows it to
run without. What the program prints and how it ends is never trusted; only a secret, written to the
result pipe behind its last line, makes it count as finished. A program that breaks into its own
interpreter, with forged bytecode, could find the secret and count as finished; it would still not
get out.
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
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Literal

from nanochat_jax.sandbox.kernel import DEVICES

Process = subprocess.Popen[bytes]
Backend = Literal["bubblewrap", "namespaces", "landlock", "none"]

MAX_OUTPUT = 1 << 20  # bytes that a program may print
KEPT_OUTPUT = 1 << 16  # and how many of them are returned
MAX_RESULT = 4096  # bytes in the result pipe
GRACE_S = 30.0  # to isolate it on a busy machine; the supervisor keeps the program's own time
TIMED_OUT, NO_ISOLATION = 124, 125  # child.py
BACKENDS: tuple[Backend, ...] = ("bubblewrap", "namespaces", "landlock")

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
    """How programs are isolated; only the backend "none", where allowed, may lack seccomp."""

    backend: Backend
    seccomp: bool = True

    def __str__(self) -> str:
        with_seccomp = self.seccomp and self.backend != "landlock"
        return self.backend + (" and seccomp" if with_seccomp else "")


def run(
    program: str,
    *,
    timeout_s: float = 5.0,
    memory_mib: int = 256,
    allow_unsandboxed: bool = False,
) -> ProgramResult:
    """Runs `program` as __main__, isolated. ValueError where that is not possible.

    finished: it ran to its last line within `timeout_s` seconds and `memory_mib` MiB of address
    space. With `allow_unsandboxed` it runs, with limits only, where isolation() would refuse.
    """
    if timeout_s <= 0 or memory_mib < 64:
        raise ValueError(
            f"a program needs time and at least 64 MiB, not {timeout_s} s and {memory_mib} MiB"
        )
    if allow_unsandboxed and not _available()[0]:
        how = Isolation("none", seccomp=_try("none") is None)
    else:
        how = isolation()
    return _run(how, program, timeout_s, memory_mib)


def isolation() -> Isolation:
    """The isolation on this machine, tried out once. ValueError, saying why, if there is none."""
    found, refusals = _available()
    if found is None:
        raise ValueError(
            f"there is no way to isolate generated code on this machine ({refusals}); give its "
            "container user namespaces or Landlock, install bubblewrap, or accept that such code "
            "can read and delete your files and pass --allow-unsandboxed"
        )
    return found


# --- which isolation ------------------------------------------------------------------------------


@cache
def _available() -> tuple[Isolation | None, str]:
    """With the first backend that works, or why none does."""
    refusals = []
    for backend in BACKENDS:
        refusal = _try(backend)
        if refusal is None:
            return Isolation(backend), ""
        refusals.append(f"{backend}: {refusal}")
    return None, "; ".join(dict.fromkeys(refusals)) or "none is known"


@cache
def _try(backend: Backend) -> str | None:
    """None when a program runs with this backend and seccomp, else what prevents it."""
    if not sys.platform.startswith("linux"):
        return "only Linux has it"
    if backend == "bubblewrap" and shutil.which("bwrap") is None:
        return "not installed"
    result = _run(Isolation(backend), "", timeout_s=20, memory_mib=256)
    return None if result.finished else result.reason


# --- running --------------------------------------------------------------------------------------


def _run(how: Isolation, program: str, timeout_s: float, memory_mib: int) -> ProgramResult:
    secret = secrets.token_hex(32)
    # File objects, not numbers: to close a number twice could close what another thread has opened.
    read_end, write_end = os.pipe()
    # Without a backend there is no empty /tmp: it starts in a folder made here.
    folder = (
        nullcontext("")
        if how.backend != "none"
        else tempfile.TemporaryDirectory(prefix="nanochat_sandbox_", ignore_cleanup_errors=True)
    )
    with open(read_end, "rb") as result_pipe, open(write_end, "wb") as writer, folder as start:
        payload = {
            "program": program,
            "secret": secret,
            "result_pipe": writer.fileno(),
            "backend": how.backend,
            "seccomp": how.seccomp,
            "visible": visible_paths(),
            "python": _python(),
            "bwrap": _bwrap() if how.backend == "bubblewrap" else [],
            "folder": start,
            "timeout_s": timeout_s,
            "memory_mib": memory_mib,
        }
        with _supervisor(writer.fileno(), json.dumps(payload)) as (process, printed):
            writer.close()
            output, found, cut = _listen(printed, result_pipe, timeout_s + GRACE_S)
            code = _end(process, patience=0 if cut else 0.5)
    finished = code == 0 and found == secret.encode() and not cut
    reason = "finished" if finished else _reason(code, found, output, cut, timeout_s)
    return ProgramResult(finished, reason, output[:KEPT_OUTPUT].decode(errors="replace"))


def _reason(code: int, found: bytes, output: bytes, cut: str, timeout_s: float) -> str:
    if cut:
        return cut
    if code == TIMED_OUT:
        return f"stopped after {timeout_s:g} s"
    if code == NO_ISOLATION:
        return output.decode(errors="replace").strip()[-300:] or "no isolation"
    if code > 128 and code - 128 in [number.value for number in signal.Signals]:
        return f"ended by {signal.Signals(code - 128).name}"
    if code == 1 and found:
        return found.decode(errors="replace")
    return f"it left before its last line (exit code {code})"


def _listen(printed: IO[bytes], result: IO[bytes], seconds: float) -> tuple[bytes, bytes, str]:
    """All output and result until both pipes close, and why that was cut short, if it was."""
    deadline = time.monotonic() + seconds
    output, found = bytearray(), bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(printed, selectors.EVENT_READ, output)
        selector.register(result, selectors.EVENT_READ, found)
        while selector.get_map():
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                return bytes(output), bytes(found), f"no answer in {seconds:g} s"
            for key, _ in ready:
                part = os.read(key.fd, 1 << 16)
                key.data.extend(part)
                if not part:
                    selector.unregister(key.fileobj)
            if len(output) > MAX_OUTPUT or len(found) > MAX_RESULT:
                return bytes(output), b"", f"it printed more than {MAX_OUTPUT:,} bytes"
    return bytes(output), bytes(found), ""


def _end(process: Process, patience: float) -> int:
    """The supervisor's exit code: it may exit by itself, then gets SIGTERM, and then SIGKILL."""
    steps = ((patience, process.terminate), (5, lambda: os.killpg(process.pid, signal.SIGKILL)))
    for seconds, stop in steps:
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        if process.returncode is None:
            stop()
    code = process.wait()
    return code if code >= 0 else 128 - code


@contextmanager
def _supervisor(result_pipe: int, payload: str) -> Iterator[tuple[Process, IO[bytes]]]:
    """A running supervisor and its output; it is gone at the end, whatever happens."""
    # One arena: glibc takes 64 MiB of the bounded address space for each, so for each thread.
    env = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "MALLOC_ARENA_MAX": "1"}
    if "LD_LIBRARY_PATH" in os.environ:  # some interpreters cannot start without it
        env["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    process = subprocess.Popen(
        [*_python(), str(_PACKAGE / "sandbox/child.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=(result_pipe,),
        env=env,
        cwd="/",
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdout:
        try:
            with suppress(BrokenPipeError), process.stdin:
                process.stdin.write(payload.encode())
            yield process, process.stdout
        finally:
            _end(process, patience=0)


def _python() -> list[str]:
    return [_interpreter(), "-I", "-S", "-B", "-X", "utf8"]


def _bwrap() -> list[str]:
    """The command that makes the root of kernel.build_root, but for complete_bwrap."""
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
