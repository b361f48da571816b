"""The system calls that the sandbox needs: namespaces, mounts, Landlock, limits, capabilities.

Runs in the sandbox's own process (child.py) and needs nothing but the standard library. The
numbers are the kernel's interface: include/uapi/linux/{mount,prctl,landlock,capability}.h.
"""

import ctypes
import errno
import os
import platform
import resource
import signal
import stat
from collections.abc import Sequence
from pathlib import Path

TMP_MIB = 16  # what a program can write, in its empty /tmp
LARGEST_FILE = 8 << 20  # bytes
OPEN_FILES, THREADS = 64, 64
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
NOBODY = 65534

SET_SUBREAPER, NO_NEW_PRIVILEGES, SET_SECCOMP = 36, 38, 22  # for prctl
_SET_DEATH_SIGNAL, _DROP_FROM_BOUNDS = 1, 24
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442  # system calls, on every architecture
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_PIVOT_ROOT, _CAPSET = {"x86_64": (155, 126), "aarch64": (41, 91)}.get(
    platform.machine(), (None, None)
)
_HERE, _EMPTY_PATH, _RECURSIVE, _CLONE_TREE, _CLOSE_ON_EXEC = -100, 0x1000, 0x8000, 1, 0o2000000
_READ_ONLY, _NO_SETUID, _NO_DEVICES, _NO_EXECUTE = 1, 2, 4, 8
_PRIVATE, _ALL_BELOW, _REMOUNT, _DETACH = 1 << 18, 0x4000, 0x20, 2

_libc = ctypes.CDLL(None, use_errno=True)


class Refused(Exception):
    """The kernel does not grant what the isolation needs; the message says what."""


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Signals this process when its parent ends. A change of user or capabilities undoes it."""
    prctl(_SET_DEATH_SIGNAL, number)


# --- namespaces -----------------------------------------------------------------------------------


def unshare() -> None:
    """Own user, mount, process, network, IPC and host name namespaces.

    Root without the right to make user namespaces does without that one.
    """
    flags = os.CLONE_NEWNS | os.CLONE_NEWPID | os.CLONE_NEWNET | os.CLONE_NEWIPC | os.CLONE_NEWUTS
    user, group = os.geteuid(), os.getegid()
    try:
        os.unshare(os.CLONE_NEWUSER | flags)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{NOBODY} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{NOBODY} {group} 1")
    except OSError as error:
        if user != 0:
            raise Refused(f"no user namespace ({error.strerror})") from None
        try:
            os.unshare(flags)
        except OSError as error:
            raise Refused(f"no namespaces ({error.strerror})") from None
    _libc.sethostname(b"sandbox", 7)


def build_root(visible: Sequence[str]) -> None:
    """A root directory with nothing but `visible`, read-only, some devices and an empty /tmp."""
    _mount(None, "/", None, _PRIVATE | _ALL_BELOW)
    trees = {path: _clone_tree(path, _READ_ONLY | _NO_DEVICES) for path in _real(visible)}
    trees |= {path: _clone_tree(path, _READ_ONLY | _NO_EXECUTE) for path in _real(DEVICES)}
    links = {path: os.readlink(path) for path in visible if os.path.islink(path)}
    # Any directory will do: the trees are held by their descriptors.
    _mount("tmpfs", "/usr", "tmpfs", _NO_SETUID | _NO_DEVICES, "size=1m,mode=755")
    os.chdir("/usr")
    os.mkdir("./tmp")  # first, for an interpreter may live below it
    _mount_tmp("./tmp")
    for path, tree in trees.items():
        _attach(tree, path)
    for path, target in links.items():
        os.makedirs(os.path.dirname("." + path), exist_ok=True)
        os.symlink(target, "." + path)
    _mount(None, ".", None, _REMOUNT | _READ_ONLY | _NO_SETUID | _NO_DEVICES, "size=1m,mode=755")
    _syscall("pivot_root", _PIVOT_ROOT, b".", b".")
    if _libc.umount2(b".", _DETACH):
        _refuse("umount")
    os.chdir("/tmp")


def complete_bwrap() -> None:
    """What bwrap has no flags for: few files in /tmp, and devices whose modes cannot be changed.

    Mounted read-only, devices can still be written to: that is not writing to a file system.
    """
    _mount_tmp("/tmp", again=_REMOUNT)
    for path in _real(DEVICES):
        _set_attributes(_HERE, path, _READ_ONLY | _NO_EXECUTE)
    os.chdir("/tmp")


def _mount_tmp(path: str, again: int = 0) -> None:
    size = f"size={TMP_MIB}m,nr_inodes=1024,mode=1777"
    _mount("tmpfs", path, "tmpfs", again | _NO_SETUID | _NO_DEVICES | _NO_EXECUTE, size)


def _real(paths: Sequence[str]) -> list[str]:
    return [path for path in paths if os.path.exists(path) and not os.path.islink(path)]


def _clone_tree(path: str, attributes: int) -> int:
    """A descriptor of a detached copy of the mounts at `path`, with attributes set on all."""
    flags = _CLONE_TREE | _CLOSE_ON_EXEC | _RECURSIVE
    tree = _syscall("open_tree", _OPEN_TREE, _HERE, path.encode(), flags)
    _set_attributes(tree, "", attributes)
    return tree


def _set_attributes(folder: int, path: str, attributes: int) -> None:
    """On all mounts at `path` from the descriptor `folder`."""
    wanted = (ctypes.c_uint64 * 4)(attributes | _NO_SETUID, 0, 0, 0)
    how = (_EMPTY_PATH | _RECURSIVE, wanted, ctypes.sizeof(wanted))
    _syscall("mount_setattr", _MOUNT_SETATTR, folder, path.encode(), *how)


def _attach(tree: int, path: str) -> None:
    """Mounts a detached tree at ./path."""
    target = "." + path
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if stat.S_ISDIR(os.stat(tree).st_mode):
        os.makedirs(target, exist_ok=True)
    else:
        os.close(os.open(target, os.O_CREAT))
    _syscall("move_mount", _MOVE_MOUNT, tree, b"", _HERE, target.encode(), 4)
    os.close(tree)


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    texts = [text.encode() if text is not None else None for text in (source, target, kind)]
    if _libc.mount(*texts, ctypes.c_ulong(flags), data.encode()):
        _refuse(f"mount {kind or ''} at {target}")


# --- Landlock -------------------------------------------------------------------------------------


def lock_files(visible: Sequence[str], interpreter: str) -> None:
    """Allows this process to read `visible`, use DEVICES and become `interpreter`; no other file.

    From the third version of Landlock on (Linux 6.2), which also guards against truncation.
    """
    version = _syscall("Landlock", _LANDLOCK_CREATE, None, 0, 1)
    if version < 3:
        raise Refused(f"Landlock has version {version}, 3 is needed")
    every = (1 << (16 if version >= 5 else 15)) - 1
    # Files; TCP from version 4 on; from 6 on abstract sockets and signals.
    known = [every, *([0b11] if version >= 4 else []), *([0b11] if version >= 6 else [])]
    attributes = (ctypes.c_uint64 * len(known))(*known)
    rules = _syscall(
        "Landlock", _LANDLOCK_CREATE, attributes, ctypes.c_size_t(ctypes.sizeof(attributes)), 0
    )
    for path in filter(os.path.exists, visible):
        _allow(rules, path, 0b1101 if os.path.isdir(path) else 0b0100)
    for path in _real(DEVICES):
        _allow(rules, path, 0b0110)
    _allow(rules, interpreter, 0b0101)
    prctl(NO_NEW_PRIVILEGES, 1)
    _syscall("Landlock", _LANDLOCK_RESTRICT, rules, 0)
    os.close(rules)


def _allow(rules: int, path: str, what: int) -> None:
    """what: a sum of LANDLOCK_ACCESS_FS_…: 1 execute, 2 write and 4 read files, 8 list folders."""
    beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = what.to_bytes(8, "little") + beneath.to_bytes(4, "little")
    _syscall("Landlock", _LANDLOCK_ADD, rules, 1, ctypes.c_char_p(rule), 0)
    os.close(beneath)


# --- limits ---------------------------------------------------------------------------------------


def limit(memory_mib: int, cpu_s: int, count_tasks: bool) -> None:
    """Bounds on what one process may use; they can only be lowered afterwards.

    count_tasks: also on the threads and processes that its user has in its user namespace.
    """
    for what, most in (
        (resource.RLIMIT_AS, memory_mib << 20),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, LARGEST_FILE),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        *([(resource.RLIMIT_NPROC, THREADS)] if count_tasks else []),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        hardest = resource.getrlimit(what)[1]
        value = most if hardest == resource.RLIM_INFINITY else min(most, hardest)
        resource.setrlimit(what, (value, value))


def drop_capabilities() -> None:
    """No capability, now or later."""
    for capability in range(64):
        _libc.prctl(_DROP_FROM_BOUNDS, capability, 0, 0, 0)  # fails beyond the last, or without any
    if _CAPSET is not None:
        header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        _syscall("capset", _CAPSET, header, none)
    prctl(NO_NEW_PRIVILEGES, 1)


# --- calling --------------------------------------------------------------------------------------


def prctl(option: int, argument: int, pointer: ctypes.Array | int = 0) -> None:
    if _libc.prctl(option, ctypes.c_ulong(argument), pointer, 0, 0):
        _refuse(f"prctl {option}")


def _syscall(name: str, number: int | None, *arguments: object) -> int:
    if number is None:
        raise Refused(f"{name} is not known on {platform.machine()}")
    result = _libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        _refuse(name)
    return result


def _refuse(what: str) -> None:
    code = ctypes.get_errno()
    missing = "not in this kernel" if code == errno.ENOSYS else os.strerror(code)
    raise Refused(f"{what}: {missing}")
