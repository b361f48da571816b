"""What hostile programs may not read, reach, kill or fill, with every isolation."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from isolations import ROOT, check, leftovers, within

from nanochat_jax.sandbox import run

# --- reading --------------------------------------------------------------------------------------


def test_the_parents_environment_is_out_of_sight(how, monkeypatch):
    monkeypatch.setenv("NANOCHAT_TOKEN", "hunter2")
    result = check(
        how,
        """
import glob, os, sys
print(dict(os.environ), sys.argv, sys.path)
processes = [*map(os.path.basename, glob.glob("/proc/*")), 1, os.getppid(), "self"]
for process in processes:
    try: print(open(f"/proc/{process}/environ", "rb").read())
    except OSError: pass
""",
    )
    assert "hunter2" not in result.output
    assert str(ROOT) not in result.output


def test_files_are_out_of_sight(how, tmp_path):
    (tmp_path / "key").write_text("hunter2")
    (tmp_path / "key").chmod(0o644)
    paths = [tmp_path / "key", "/etc/shadow", "/etc/passwd", "/etc/hostname", Path.home(), ROOT]
    paths += [ROOT / "README.md", "/proc", "/sys", "/var/log", "/root", "/home", "/proc/self/mem"]
    paths += [f"/proc/{os.getpid()}/environ", f"/proc/{os.getpid()}/cwd", "/proc/1/root/etc/shadow"]
    result = check(
        how,
        f"""
import os
for path in {[str(path) for path in paths]!r}:
    for prefix in ("", "/proc/1/root", "/proc/self/root", "../../../../../.."):
        try: open(prefix + path).read()
        except OSError: pass
        else: raise AssertionError(prefix + path)
        # A folder on the backend to Python's own can be there, with nothing else in it.
        try: names = os.listdir(prefix + path)
        except OSError: continue
        assert set(names) <= {{".pyenv", ".local", ".cache"}}, (path, names)
""",
    )
    assert "hunter2" not in result.output


def test_nothing_is_written_outside(how, tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("as it was")
    mine.chmod(0o666)
    tmp_path.chmod(0o777)
    before = mine.stat()
    check(
        how,
        f"""
import os, shutil, sys
mine, folder = {str(mine)!r}, {str(tmp_path)!r}
for attempt in (
    lambda: open(mine, "w"), lambda: open(mine, "a").write("x"), lambda: os.truncate(mine, 0),
    lambda: os.remove(mine), lambda: os.chmod(mine, 0), lambda: os.utime(mine, (1, 1)),
    lambda: os.rename(mine, mine + "2"), lambda: os.symlink(mine, folder + "/link"),
    lambda: os.mkdir(folder + "/new"), lambda: open(folder + "/new", "w"),
    lambda: os.setxattr(mine, "user.x", b"y"), lambda: os.chown(mine, 1, 1),
    lambda: shutil.rmtree(os.path.dirname(os.__file__)),
    lambda: open(os.__file__, "a"), lambda: os.mkdir("/new"), lambda: open("/usr/new", "w"),
    lambda: os.mkfifo("/usr/lib/fifo"),
):
    try: attempt()
    except OSError: continue
    raise AssertionError("it could be written")
""",
    )
    assert mine.read_text() == "as it was"
    after = mine.stat()
    assert (after.st_mode, after.st_mtime, after.st_uid) == (
        before.st_mode,
        before.st_mtime,
        before.st_uid,
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def test_the_devices_of_the_machine_stay_as_they_are(how):
    """Under root, they belong to the program."""
    before = os.stat("/dev/zero")
    program = """
import os
for change in (
    lambda: os.chmod("/dev/zero", 0o600), lambda: os.utime("/dev/zero", (1, 1)),
    lambda: os.fchmod(os.open("/dev/zero", os.O_RDONLY), 0o600),
):
    try: change()
    except OSError: continue
    raise AssertionError("a device was changed")
"""
    try:
        check(how, program)
        assert os.stat("/dev/zero").st_mode == before.st_mode
    finally:
        if os.stat("/dev/zero").st_mode != before.st_mode:
            os.chmod("/dev/zero", before.st_mode & 0o7777)


# --- the network, and other processes -------------------------------------------------------------


def test_there_is_no_network(how, tmp_path):
    name = f"nanochat-{os.getpid()}"
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as abstract,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as named,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
    ):
        abstract.bind("\0" + name)
        named.bind(str(tmp_path / "socket"))
        named.listen()
        udp.bind(("127.0.0.1", 0))
        check(
            how,
            f"""
import socket
def tcp(): socket.create_connection({tcp.getsockname()}, timeout=1)
def udp(): socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", {udp.getsockname()})
def abstract(): socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"x", "\\0{name}")
def named(): socket.socket(socket.AF_UNIX).connect({str(tmp_path / "socket")!r})
def pair():
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    a.sendto(b"x", "\\0{name}")
def netlink(): socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
def listen(): socket.create_server(("127.0.0.1", 0))
for attempt in (tcp, udp, abstract, named, pair, netlink, listen):
    try: attempt()
    except OSError: continue
    raise AssertionError(attempt.__name__)
""",
        )
        for receiver in (tcp, abstract, named, udp):
            receiver.setblocking(False)
        for take in (tcp.accept, named.accept, lambda: abstract.recv(1), lambda: udp.recv(1)):
            with pytest.raises(BlockingIOError):
                take()


def test_no_process_is_started(how):
    check(
        how,
        """
import os, subprocess, multiprocessing
def bomb():
    while True: os.fork()
for attempt in (
    bomb, os.fork, os.forkpty, lambda: subprocess.run(["/bin/true"]),
    lambda: os.execv("/bin/sh", ["sh"]), lambda: os.posix_spawn("/bin/true", ["true"], {}),
    multiprocessing.Process(target=print).start,
):
    try: attempt()
    except OSError: continue
    raise AssertionError("a process was started")
assert os.system("true") != 0
""",
    )


def test_no_other_process_is_signalled(how):
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        check(
            how,
            f"""
import fcntl, os, resource, signal
for pid in (1, os.getppid(), -1, 0, {os.getpid()}, {victim.pid}, -{os.getpgid(0)}):
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP, 0):
        try: os.kill(pid, number)
        except OSError: continue
        raise AssertionError((pid, number))
reader, writer = os.pipe()
for attempt in (
    lambda: fcntl.fcntl(reader, fcntl.F_SETOWN, {victim.pid}),
    lambda: os.setpriority(os.PRIO_PROCESS, {victim.pid}, 19),
    lambda: os.sched_setaffinity({victim.pid}, {{0}}),
    lambda: resource.prlimit({victim.pid}, resource.RLIMIT_CPU, (1, 1)),
    lambda: os.pidfd_open({victim.pid}), lambda: os.setns(reader, 0), lambda: os.chroot("/"),
    lambda: os.unshare(os.CLONE_NEWNS), lambda: os.setuid(0), lambda: os.memfd_create("x"),
    lambda: resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40)),
):
    try: attempt()
    except (OSError, ValueError): continue
    raise AssertionError("allowed")
""",
        )
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


# --- time, memory, disk, output -------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        "while True: pass",
        "import time\nwhile True:\n    try: time.sleep(100)\n    except BaseException: pass",
        "import threading\nthreading.Thread(target=threading.Event().wait).start()\n"
        "threading.Event().wait()",
        "10 ** 10 ** 9",
    ],
    ids=["spins", "sleeps", "threads", "in C"],
)
def test_time_is_up(how, body, recorded):
    ignore = (
        "import signal\nfor s in set(signal.Signals) - {9, 19}: signal.signal(s, signal.SIG_IGN)\n"
    )
    began = time.monotonic()
    result = within(how, ignore + "print('started', flush=True)\n" + body, seconds=0.5)
    assert not result.finished
    assert result.reason == "stopped after 0.5 s"
    assert result.output == "started\n"
    assert time.monotonic() - began < 20  # not the 100 s of a sleep
    assert leftovers(recorded) == []


def test_memory_is_bounded(how):
    assert within(how, "x = bytearray(1 << 30)").reason == "MemoryError"
    program = "x = []\nwhile True: x.append(bytearray(1 << 20))"
    assert not within(how, program, memory_mib=96).finished
    program = """
import socket
pairs, total = [], 0
try:
    while True:
        pairs.append(socket.socketpair())
        for end in pairs[-1]:
            end.setblocking(False)
            try: end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 30)
            except OSError: pass
            try:
                while True: total += end.send(bytes(1 << 16))
            except BlockingIOError: pass
except OSError: pass
assert total < 64 << 20, total
"""
    check(how, program)  # what the kernel holds for it counts too
    program = "import _thread, time\nwhile True: _thread.start_new_thread(time.sleep, (10,))"
    assert "can't start new thread" in within(how, program, memory_mib=96).reason


def test_the_disk_is_bounded(how):
    if how.backend == "landlock":
        pytest.skip("nothing can be written there")
    check(
        how,
        """
import os
total = 0
for folder in ("/tmp", "/dev", "/dev/shm", "/", "/var/tmp", "/run", "/sandbox"):
    try:
        for name in range(100):
            with open(f"{folder}/{name}", "wb", buffering=0) as file:
                while True:
                    try: total += file.write(bytes(1 << 20))
                    except OSError as error:
                        if error.errno == 27: break  # this file is large enough
                        raise
    except OSError as error:
        assert error.errno == 28 or folder != "/tmp", error
assert 4 << 20 < total <= 16 << 20, total
""",
    )


def test_the_number_of_files_is_bounded(how):
    if how.backend == "landlock":
        pytest.skip("nothing can be written there")
    result = within(how, "for i in range(10000): open(f'/tmp/{i}', 'w').close()")
    assert "No space left" in result.reason


def test_much_output_is_cut(how):
    began = time.monotonic()
    result = within(how, "while True: print('x' * 1000)", seconds=30)
    assert not result.finished
    assert "printed more than" in result.reason
    assert len(result.output) == run.KEPT_OUTPUT
    assert time.monotonic() - began < 20
    result = check(how, "print('y' * 200_000)\nimport sys; sys.stderr.write('z')")
    assert len(result.output) == run.KEPT_OUTPUT
    assert check(how, r"import sys; sys.stdout.buffer.write(b'\xff\x00ok')").output == "\ufffd\0ok"
