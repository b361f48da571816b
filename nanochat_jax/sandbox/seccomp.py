"""The system calls that a sandboxed program may make: a seccomp filter, for x86-64 and aarch64.

An allowlist: all else fails with "Operation not permitted". No new process and no new program can
be started (except the interpreter, once), no signal sent to another process, no socket created
except a connected pair (asyncio needs one), and nothing traced, mounted or mapped from elsewhere.
Needs nothing but the standard library. Numbers: asm/unistd_64.h and asm-generic/unistd.h; format:
linux/filter.h.
"""

import ctypes
import errno
import platform
import struct
from functools import partial

from nanochat_jax.sandbox.kernel import NO_NEW_PRIVILEGES, SET_SECCOMP, Refused, prctl

# name:number on x86-64:number on aarch64
_HARMLESS = """
read:0:63 write:1:64 close:3:57 lseek:8:62 pread64:17:67 pwrite64:18:68 readv:19:65 writev:20:66
preadv:295:69 pwritev:296:70 preadv2:327:286 pwritev2:328:287 sendfile:40:71
copy_file_range:326:285 splice:275:76 fsync:74:82 fdatasync:75:83 openat:257:56 open:2:-
access:21:- faccessat:269:48 faccessat2:439:439 stat:4:- lstat:6:- fstat:5:80 newfstatat:262:79
statx:332:291 statfs:137:43 fstatfs:138:44 readlink:89:- readlinkat:267:78 getdents:78:-
getdents64:217:61 getcwd:79:17 chdir:80:49 fchdir:81:50 fadvise64:221:223 flock:73:32 dup:32:23
dup2:33:- dup3:292:24 pipe:22:- pipe2:293:59 poll:7:- ppoll:271:73 select:23:- pselect6:270:72
epoll_create:213:- epoll_create1:291:20 epoll_ctl:233:21 epoll_wait:232:- epoll_pwait:281:22
epoll_pwait2:441:441 eventfd:284:- eventfd2:290:19 close_range:436:436 umask:95:166 mmap:9:222
munmap:11:215 mprotect:10:226 mremap:25:216 madvise:28:233 brk:12:214 msync:26:227
mincore:27:232 membarrier:324:283 rseq:334:293 futex:202:98 futex_waitv:449:449
set_robust_list:273:99 get_robust_list:274:100 set_tid_address:218:96 sched_yield:24:124
sched_getaffinity:204:123 sched_getparam:143:121 sched_getscheduler:145:120
sched_get_priority_max:146:125 sched_get_priority_min:147:126 exit:60:93 exit_group:231:94
rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139 rt_sigpending:127:136
rt_sigtimedwait:128:137 rt_sigsuspend:130:133 sigaltstack:131:132 pause:34:- alarm:37:-
setitimer:38:103 getitimer:36:102 timer_create:222:107 timer_settime:223:110
timer_gettime:224:108 timer_delete:226:111 timer_getoverrun:225:109 restart_syscall:219:128
nanosleep:35:101 clock_nanosleep:230:115 clock_gettime:228:113 clock_getres:229:114
gettimeofday:96:169 time:201:- times:100:153 getrusage:98:165 sysinfo:99:179 uname:63:160
getrandom:318:278 getcpu:309:168 getpid:39:172 getppid:110:173 gettid:186:178 getuid:102:174
geteuid:107:175 getgid:104:176 getegid:108:177 getgroups:115:158 getresuid:118:148
getresgid:120:150 getpgid:121:155 getpgrp:111:- getsid:124:156 getpriority:140:141 capget:125:90
getrlimit:97:163 wait4:61:260 waitid:247:95 sendto:44:206 recvfrom:45:207 sendmsg:46:211
recvmsg:47:212 shutdown:48:210 getsockname:51:204 getpeername:52:205 getsockopt:55:209
arch_prctl:158:-
"""
_WRITING = """
mkdir:83:- mkdirat:258:34 rmdir:84:- unlink:87:- unlinkat:263:35 rename:82:- renameat:264:38
renameat2:316:276 link:86:- linkat:265:37 symlink:88:- symlinkat:266:36 truncate:76:45
ftruncate:77:46 fallocate:285:47 chmod:90:- fchmod:91:52 fchmodat:268:53 chown:92:- fchown:93:55
fchownat:260:54 lchown:94:- utime:132:- utimes:235:- utimensat:280:88 futimesat:261:- creat:85:-
"""
_CHECKED = """
clone:56:220 clone3:435:435 kill:62:129 tgkill:234:131 prlimit64:302:261 fcntl:72:25 ioctl:16:29
prctl:157:167 socketpair:53:199 execveat:322:281
"""

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, AUDIT_ARCH_…
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_MASK = 0x54
_ALLOW, _KILL, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000
_ALLOWED_COMMANDS = {
    # duplicate, flags, locks; not "own", by which a descriptor sends signals
    "fcntl": (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032),
    "ioctl": (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451),  # terminal? size, bytes waiting, …
    "prctl": (15, 16),  # the name of a thread
}
_COMMAND_ARGUMENT = {"fcntl": 1, "ioctl": 1, "prctl": 0}
_CLONE_THREAD, _CLONE_NEW = 0x10000, 0x7E020080  # a thread; any new namespace
_MODE_FILTER = 2
_NEWER_THAN_THIS_TABLE = 450  # a program expects "not implemented" from calls that may be missing

Instructions = list[bytes]


def install(pid: int, interpreter: int, may_write: bool) -> None:
    """Filters the system calls of this process, whose number is `pid`, for good.

    interpreter: the descriptor of the only program that it may become. may_write: it may also
    change files and folders.
    """
    if platform.machine() not in _ARCHITECTURES or ctypes.sizeof(ctypes.c_void_p) != 8:
        raise Refused(f"seccomp: our table does not have the numbers of {platform.machine()}")
    prctl(NO_NEW_PRIVILEGES, 1)
    program = b"".join(build(pid, interpreter, may_write))
    code = ctypes.create_string_buffer(program, len(program))
    count, address = len(program) // 8, ctypes.addressof(code)
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", count, address))
    prctl(SET_SECCOMP, _MODE_FILTER, header)


def build(pid: int, interpreter: int, may_write: bool, machine: str | None = None) -> Instructions:
    """The filter as BPF instructions of 8 bytes."""
    column, architecture = _ARCHITECTURES[machine or platform.machine()]
    checked = _table(_CHECKED, column)
    plain = _table(_HARMLESS, column) | (_table(_WRITING, column) if may_write else {})
    code = [_load(4), _jump(_EQUAL, architecture, 1, 0), _return(_KILL), _load(0)]
    code += [_jump(_AT_LEAST, 0x40000000, 0, 1), _return(_KILL)]  # the x32 numbers of x86-64
    for number in plain.values():
        code += [_jump(_EQUAL, number, 0, 1), _return(_ALLOW)]
    for name in ("kill", "tgkill"):
        code += _only(checked[name], 0, (pid,))
    code += _only(checked["prlimit64"], 0, (0, pid))
    code += _only(checked["execveat"], 0, (interpreter,))
    for name, commands in _ALLOWED_COMMANDS.items():
        code += _only(checked[name], _COMMAND_ARGUMENT[name], commands)
    is_thread = [
        _argument(0),
        _jump(_ANY_BIT, _CLONE_NEW, 1, 0),
        _jump(_ANY_BIT, _CLONE_THREAD, 1, 0),
        _return(_FAIL | errno.EPERM),
        _return(_ALLOW),
    ]
    # AF_UNIX and SOCK_STREAM: a datagram pair could write to other sockets by their names.
    is_stream_pair = [
        _argument(0),
        _jump(_EQUAL, 1, 0, 3),
        _argument(1),
        _instruction(_MASK, 0xF),
        _jump(_EQUAL, 1, 1, 0),
        _return(_FAIL | errno.EPERM),
        _return(_ALLOW),
    ]
    code += _when(checked["clone"], is_thread)
    code += _when(checked["socketpair"], is_stream_pair)
    code += _when(checked["clone3"], [_return(_FAIL | errno.ENOSYS)])  # the C library tries clone
    code += [_jump(_AT_LEAST, _NEWER_THAN_THIS_TABLE, 0, 1), _return(_FAIL | errno.ENOSYS)]
    return [*code, _return(_FAIL | errno.EPERM)]


def _table(text: str, column: int) -> dict[str, int]:
    entries = [entry.split(":") for entry in text.split()]
    return {name: int(numbers[column]) for name, *numbers in entries if numbers[column] != "-"}


def _when(number: int, block: Instructions) -> Instructions:
    """`block`, which returns, for one system call."""
    return [_jump(_EQUAL, number, 0, len(block)), *block]


def _only(number: int, argument: int, values: tuple[int, ...]) -> Instructions:
    """Allows a system call when one of its arguments has one of these values."""
    block = [_argument(argument)]
    for value in values:
        block += [_jump(_EQUAL, value, 0, 1), _return(_ALLOW)]
    return _when(number, [*block, _return(_FAIL | errno.EPERM)])


def _argument(index: int) -> bytes:
    return _load(16 + 8 * index)  # the lower half: these arguments are 32-bit


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """One instruction; after a jump, so many are skipped."""
    return struct.pack("HBBI", code, if_true, if_false, value)


_jump = _instruction
_load, _return = partial(_instruction, _LOAD), partial(_instruction, _RETURN)
