"""Programs end as they should; hostile ones do not count, and leave nothing behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from isolations import ROOT, any_isolation, check, leftovers, within

import nanochat_jax.sandbox.run as sandbox
from nanochat_jax.sandbox.run import Isolation, ProgramResult, isolation, run

# --- programs as they should be -------------------------------------------------------------------


def test_a_good_program_finishes(how):
    result = within(how, "print('hello')\nassert sum([1, 2]) == 3\n")
    assert result == ProgramResult(True, "finished", "hello\n")


def test_a_wrong_program_says_why(how):
    result = within(how, "print('before')\nassert 1 == 2, 'not equal'")
    assert not result.finished
    assert result.reason == "AssertionError: not equal"
    assert result.output.startswith("before\n")
    assert "line 2" in result.output
    assert "SyntaxError" in within(how, "def f(:").reason


def test_the_standard_library_works(how):
    check(
        how,
        """
import asyncio, collections, dataclasses, decimal, enum, hashlib, heapq, itertools, json, math
import pickle, random, re, sqlite3, ssl, statistics, string, sys, threading, time, typing, zoneinfo

@dataclasses.dataclass
class Point:
    x: int

assert pickle.loads(pickle.dumps(Point(3))) == Point(3)
async def add(a, b):
    await asyncio.sleep(0)
    return a + b
assert asyncio.run(add(1, 2)) == 3
found = []
thread = threading.Thread(target=lambda: found.append(1))
thread.start(); thread.join()
assert found == [1] and __name__ == "__main__" and len(sys.argv) == 1
assert not sys.stdin.read()
random.seed(1); time.sleep(0); print("ümlaut")
""",
    )


def test_what_models_like_to_write_works(how):
    check(
        how,
        """
import contextlib, doctest, os, threading, unittest
from concurrent.futures import ThreadPoolExecutor

def double(x):
    '''
    >>> double(2)
    4
    '''
    return 2 * x

class Test(unittest.TestCase):
    def test_double(self): self.assertEqual(double(1), 2)

together = threading.Barrier(12)
with ThreadPoolExecutor(12) as pool: assert len({*pool.map(together.wait, [9] * 12)}) == 12
assert doctest.testmod() == (0, 1)
assert unittest.main(exit=False).result.wasSuccessful()
with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing): print("x")
""",
    )


def test_what_is_written_lands_in_an_empty_folder_of_its_own(how):
    if how.backend == "landlock":
        pytest.skip("nothing can be written there")
    program = """
import os, tempfile
assert os.listdir() == [] and os.getcwd() == "/tmp"
open("file", "w").write("x")
with tempfile.NamedTemporaryFile() as file:
    file.write(b"y")
"""
    check(how, program)
    check(how, program)  # nothing is left of the first


def test_humaneval_is_solved_by_its_own_solutions(real_data):
    any_isolation()
    path = real_data / "task_data/openai--openai_humaneval/openai_humaneval/test/00000.parquet"
    for row in pq.read_table(path).to_pylist()[::20]:
        checks = f"{row['test']}\ncheck({row['entry_point']})"
        assert run(f"{row['prompt']}{row['canonical_solution']}\n{checks}").finished, row["task_id"]
        assert not run(f"{row['prompt']}    return object()\n{checks}").finished, row["task_id"]


# --- leaving early, and faking the end ------------------------------------------------------------

EARLY = {
    "SystemExit": "raise SystemExit(0)",
    "sys.exit": "import sys\nsys.exit()",
    "exit code 0": "import os\nos._exit(0)",
    "supervisor's code": "import os\nos._exit(125)",
    "in a function": "def f():\n    import sys; sys.exit(0)\nf()\nassert False",
    "in a thread": "import os, threading, time\n"
    "threading.Thread(target=lambda: os._exit(0)).start()\ntime.sleep(5)",
    "at exit": "import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit(0)",
    "signal": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\nassert False",
    "bare base exception": "raise BaseException()",
    "keyboard": "raise KeyboardInterrupt",
    "generator": "raise GeneratorExit",
    "bad str": "class E(Exception):\n    def __str__(self): raise SystemExit(0)\nraise E()",
    "hostile str": "import os\nclass E(Exception):\n    def __str__(self): os._exit(0)\nraise E()",
    "syntax": "if",
    "null": "x = 1\0",
    "crash": "import sys\nsys.setrecursionlimit(10**9)\ndef f(*a): return f(*a)\n"
    "class A:\n    def __repr__(self): return repr(self)\nrepr(A())",
}
FAKES = {
    "prints": "print('finished'); print('secret'); raise SystemExit(0)",
    "writes everywhere": """
import os
for fd in range(64):
    try: os.write(fd, b"finished")
    except OSError: pass
os._exit(0)
""",
    "frames": """
import sys, os
def walk(value, depth):
    if isinstance(value, (str, bytes)) and len(value) == 64:
        for fd in range(64):
            try: os.write(fd, value if isinstance(value, bytes) else value.encode())
            except OSError: pass
        os._exit(0)
    if depth:
        if isinstance(value, dict): value = list(value.values())
        if isinstance(value, (list, tuple, set)):
            for item in value: walk(item, depth - 1)
frame = sys._getframe()
while frame:
    for mapping in (frame.f_locals, frame.f_globals):
        walk(dict(mapping), 5)
    walk(frame.f_code.co_consts, 5)
    frame = frame.f_back
raise SystemExit(0)
""",
    "garbage collector": """
import gc, os
for item in gc.get_objects():
    if isinstance(item, (tuple, list)):
        for part in item:
            if isinstance(part, bytes) and len(part) == 64:
                for fd in range(3, 64):
                    try: os.write(fd, part)
                    except OSError: pass
                os._exit(0)
raise SystemExit(0)
""",
    "referents": """
import gc, sys
for item in gc.get_referents(sys._getframe().f_back):
    print(item)
raise SystemExit(0)
""",
    "without the guard": """
import sys, gc
frame = sys._getframe(1)
for name, value in list(frame.f_globals.items()):
    if callable(value): frame.f_globals[name] = lambda *a, **k: None
import builtins
builtins.PermissionError = lambda *a: None
gc.get_objects()
raise SystemExit(0)
""",
    "ctypes": "import ctypes\nraise SystemExit(0)",
    "test module": "import _testcapi",
    "ctypes by its file": """
import _imp, math, types
class Name(str):
    def __contains__(self, part): return False
    def __str__(self): return "math"
    def __radd__(self, other): return "math"
path = math.__file__.replace("math.", "_ctypes.")
_imp.create_dynamic(types.SimpleNamespace(name=Name("a._ctypes"), origin=path))
""",
    "ctypes left behind": """
import sys
def below(kind):
    yield kind
    for child in type.__subclasses__(kind): yield from below(child)
assert any("ctypes" in kind.__module__ for kind in below(object)) or "ctypes" in sys.modules
""",
    "kernel module left behind": """
import sys
frame, found = sys._getframe(), []
while frame:
    found += [value for value in frame.f_globals.values() if hasattr(value, "_libc")]
    frame = frame.f_back
assert found
""",
    "jump": """
import sys
def jump(frame, event, argument):
    if frame.f_code.co_filename == "<program>" and frame.f_lineno == 8: frame.f_lineno = 9
    return jump
sys._getframe().f_trace = jump
sys.settrace(jump)
assert len("a") == 2
last = 1
""",
    "jump in all threads": """
import sys, threading
def jump(frame, event, argument):
    if frame.f_code.co_filename == "<program>" and frame.f_lineno == 8: frame.f_lineno = 9
    return jump
sys._getframe().f_trace = jump
threading.settrace_all_threads(jump)
assert len("a") == 2
last = 1
""",
    "jump by monitoring": """
import sys
def jump(code, line):
    if code.co_filename == "<program>" and line == 8: sys._getframe(1).f_lineno = 9
sys.monitoring.use_tool_id(3, "jump")
sys.monitoring.register_callback(3, sys.monitoring.events.LINE, jump)
sys.monitoring.set_events(3, sys.monitoring.events.LINE)
assert len("a") == 2
last = 1
""",
    "trace": """
import sys
def jump(frame, event, argument):
    try: frame.f_lineno += 3
    except ValueError: pass
    return jump
frame = sys._getframe(1)
while frame:
    frame.f_trace = jump
    frame = frame.f_back
sys.settrace(jump)
raise SystemExit(0)
""",
    "patched": """
import os, sys
os._exit = sys.exit = lambda *a: None
os.write = lambda fd, data: len(data)
sys.stdout = sys.stderr = None
raise SystemExit(0)
""",
    "main": "import __main__, sys\nprint(vars(__main__).keys(), sys.argv)\nraise SystemExit(0)",
}


OPENS_THE_INTERPRETER = {
    *("garbage collector", "referents", "ctypes", "ctypes by its file", "test module"),
    *("jump", "jump by monitoring"),
}


@pytest.mark.parametrize("name", [*EARLY, *FAKES])
def test_only_the_last_line_counts(name):
    result = within(any_isolation(), (EARLY | FAKES)[name] + "\n")
    assert not result.finished, result
    assert result.reason != "finished"
    if name in OPENS_THE_INTERPRETER:
        assert result.reason.startswith("PermissionError: not allowed")


def test_another_interpreter_is_refused():
    program = """
try: import _interpreters as interpreters
except ImportError: import _xxsubinterpreters as interpreters
interpreters.create()
"""
    assert not within(any_isolation(), program).finished


FLOOD = """
import os
while True:
    for number in range(3, 64):
        try: os.write(number, b"x" * 999)
        except OSError: pass
"""


def test_the_report_cannot_be_spoilt(how):
    assert not within(how, FLOOD, seconds=5).finished
    assert not within(how, FLOOD.replace("while True", "if True")).finished
    assert not within(how, "import os\nos.closerange(0, 64)").finished
    check(how, "import sys\nsys.stdout.close()")


# --- afterwards -----------------------------------------------------------------------------------


def test_nothing_is_left_behind(how, recorded):
    open_before = len(os.listdir("/proc/self/fd"))
    for program in ("", "raise SystemExit", "while True: pass", "print('x' * 9**9)"):
        within(how, program, seconds=0.3)
    assert leftovers(recorded) == []
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_a_killed_parent_takes_everything_with_it():
    any_isolation()
    program = "from nanochat_jax.sandbox.run import run; run('while True: pass', timeout_s=60)"
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    wait_until(lambda: len(leftovers(list(map(int, children.read_text().split())))) >= 2)
    supervisors = [int(child) for child in children.read_text().split()]
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until(lambda: alive(leftovers(supervisors)) == [])


def wait_until(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pids: list[int]) -> list[int]:
    """Without zombies, which whoever adopted them has yet to reap."""
    states = {}
    for pid in pids:
        try:
            states[pid] = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
    return [pid for pid, state in states.items() if state != "Z"]


def test_a_parent_that_ignores_its_children_gets_results():
    any_isolation()
    program = """
import signal
from nanochat_jax.sandbox.run import ProgramResult, run
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
assert run("") == ProgramResult(True, "finished", "")
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60)


# --- without isolation --------------------------------------------------------------------------


@pytest.fixture
def bare(monkeypatch):
    """A machine whose kernel offers nothing."""
    monkeypatch.setattr(sandbox, "BACKENDS", ())
    sandbox._available.cache_clear()
    yield
    sandbox._available.cache_clear()


def test_without_isolation_it_refuses(bare):
    for attempt in (isolation, lambda: run("print(1)")):
        with pytest.raises(ValueError, match="--allow-unsandboxed"):
            attempt()


def test_without_isolation_it_runs_when_allowed(bare, recorded, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_TOKEN", "hunter2")
    program = "import os\nopen('file', 'w').write('x')\nprint(os.listdir(), os.environ)"
    result = run(program, allow_unsandboxed=True)
    assert result.finished
    assert result.output.startswith("['file']")
    assert "hunter2" not in result.output
    assert not run("raise SystemExit(0)", allow_unsandboxed=True).finished
    assert not run("while True: pass", timeout_s=0.3, allow_unsandboxed=True).finished
    assert list(tmp_path.iterdir()) == []
    assert leftovers(recorded) == []


def test_a_stopped_parent_leaves_no_folder(tmp_path):
    program = f"""
import tempfile
from nanochat_jax.sandbox.run import Isolation, _run
tempfile.tempdir = {str(tmp_path)!r}
_run(Isolation("none", seccomp=False), "open('file', 'w').close()\\nwhile True: pass", 60, 256)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    wait_until(lambda: [*tmp_path.glob("*/file")])
    parent.terminate()
    parent.wait()
    wait_until(lambda: not [*tmp_path.iterdir()])


def test_children_that_hide_are_available(recorded):
    """Without isolation and without seccomp, a daemon of the program ends with it."""
    program = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.setsid()
        time.sleep(100)
    os._exit(0)
time.sleep(0.2)
print(open("/proc/self/stat").read().split()[5])
"""
    result = within(Isolation("none", seccomp=False), program)
    assert result.finished, result
    assert [path for path in Path("/proc").glob("[0-9]*/stat") if is_sleeper(path)] == []


def is_sleeper(stat: Path) -> bool:
    try:
        return b"sandbox/child.py" in (stat.parent / "cmdline").read_bytes() and (
            int(stat.read_text().rpartition(")")[2].split()[1]) == 1  # orphaned
        )
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_senseless_limits_are_refused():
    with pytest.raises(ValueError, match="at least 64 MiB"):
        run("", memory_mib=1)
    with pytest.raises(ValueError, match="time"):
        run("", timeout_s=0)
