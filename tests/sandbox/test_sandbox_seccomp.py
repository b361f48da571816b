"""The system-call filter, run as the kernel would, and by the kernel."""

import platform
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from isolations import ROOT

from nanochat_jax.sandbox import seccomp

# --- the filter -----------------------------------------------------------------------------------

ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x50001, 0x50026
ME, INTERPRETER = 42, 64


def verdict(machine: str, number: int, *arguments: int, may_write: bool = True) -> int:
    """Runs the filter as the kernel would."""
    architecture = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine]
    data = struct.pack("<iIQ6Q", number, architecture, 0, *(*arguments, *[0] * 6)[:6])
    code = seccomp.build(ME, INTERPRETER, may_write, machine)
    accumulator = position = 0
    while True:
        operation, if_true, if_false, value = struct.unpack("HBBI", code[position])
        position += 1
        match operation:
            case 0x20:
                accumulator = struct.unpack_from("<I", data, value)[0]
            case 0x54:
                accumulator &= value
            case 0x06:
                return value
            case _:
                holds = {
                    0x15: accumulator == value,
                    0x35: accumulator >= value,
                    0x45: bool(accumulator & value),
                }[operation]
                position += if_true if holds else if_false


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_says_what_it_should(machine):
    calls = {  # name: numbers on x86-64 and aarch64
        **{"read": (0, 63), "socket": (41, 198), "socketpair": (53, 199), "kill": (62, 129)},
        **{"clone": (56, 220), "clone3": (435, 435), "execve": (59, 221), "execveat": (322, 281)},
        **{"ptrace": (101, 117), "mkdirat": (258, 34)},
    }
    number = {name: both[machine == "aarch64"] for name, both in calls.items()}
    thread, fork, new_user = 0x3D0F00, 0x1200011, 0x10010000
    assert verdict(machine, number["read"]) == ALLOW
    assert verdict(machine, number["socket"], 2, 1) == EPERM
    assert verdict(machine, number["socketpair"], 1, 0o2000001) == ALLOW
    assert verdict(machine, number["socketpair"], 1, 2) == EPERM
    assert verdict(machine, number["socketpair"], 2, 1) == EPERM
    assert verdict(machine, number["kill"], ME) == ALLOW
    assert verdict(machine, number["kill"], ME + 1) == EPERM
    assert verdict(machine, number["kill"], 2**32 - 1) == EPERM
    assert verdict(machine, number["clone"], thread) == ALLOW
    assert verdict(machine, number["clone"], fork) == EPERM
    assert verdict(machine, number["clone"], new_user) == EPERM
    assert verdict(machine, number["clone3"]) == ENOSYS
    assert verdict(machine, number["execve"]) == EPERM
    assert verdict(machine, number["execveat"], INTERPRETER) == ALLOW
    assert verdict(machine, number["execveat"], INTERPRETER - 1) == EPERM
    assert verdict(machine, number["ptrace"]) == EPERM
    assert verdict(machine, number["mkdirat"]) == ALLOW
    assert verdict(machine, number["mkdirat"], may_write=False) == EPERM
    assert verdict(machine, 449 + 30) == ENOSYS
    assert verdict(machine, 0x40000000 + number["read"]) == KILL


@pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of x86-64")
def test_the_kernel_obeys_the_filter():
    if not Path("/proc/sys/kernel/seccomp/actions_avail").exists():
        pytest.skip("no seccomp in this kernel")
    numbers = {
        **{"ptrace": 101, "mount": 165, "bpf": 321, "unshare": 272, "keyctl": 250, "shmget": 29},
        **{"io_uring_setup": 425, "process_vm_readv": 310, "perf_event_open": 298, "vfork": 58},
        **{"userfaultfd": 323, "memfd_create": 319, "init_module": 175, "personality": 135},
    }
    program = f"""
import ctypes, os
from nanochat_jax.sandbox import seccomp
libc = ctypes.CDLL(None, use_errno=True)
seccomp.install(os.getpid(), interpreter=64, may_write=False)
for name, number in {numbers!r}.items():
    assert libc.syscall(number, 0, 0, 0, 0, 0, 0) == -1 and ctypes.get_errno() == 1, name
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60)
