"""Runs a program to its last line and says so, inside the sandbox.

A secret proves that it got there. The program shares its process with this file, so the secret
must be out of its reach: it is in no variable, only in the arguments of a call that Python's C code
makes once the program has returned. The functions that could find it there, or make Python skip
lines, are refused.

Given to a new interpreter as text (child.py), with two descriptors as arguments: the result pipe,
and the one to signal that the isolation stands. Needs nothing but the standard library, and never
ctypes.
"""

import json
import os
import sys
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from itertools import starmap
from operator import call
from types import ModuleType
from typing import Any, NoReturn

MAX_REASON = 300  # characters


def main() -> NoReturn:
    """Runs payload["program"] as __main__ and writes to the result pipe: payload["secret"] at its
    end, or why it did not get that far. Ends the process."""
    payload = json.loads(sys.stdin.buffer.read())
    pipe, ready = map(int, sys.argv[1:])
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.write(ready, b".")
    os.close(ready)
    output = sys.stdout
    status = 1
    try:
        module = ModuleType("__main__")
        code = compile(payload.pop("program"), "<program>", "exec", dont_inherit=True)
        sys.modules["__main__"] = module
        os.environ.pop("LD_LIBRARY_PATH", None)
        sys.argv[:], sys.orig_argv[:] = [""], []
        sys.settrace = _settrace
        sys.addaudithook(_guard())
        # Calls one after the other, without a line of Python between; an exception ends them.
        deque(
            starmap(
                call,
                [
                    (exec, code, module.__dict__),
                    (os.write, pipe, payload.pop("secret").encode()),
                ],
            ),
            maxlen=0,
        )
        status = 0
    except BaseException as error:
        with suppress(BaseException):
            os.write(pipe, _reason(error).encode(errors="replace"))
            if not isinstance(error, SystemExit):
                below_us = error.__traceback__ and error.__traceback__.tb_next
                traceback.print_exception(type(error), error, below_us, file=output)
    with suppress(BaseException):
        output.flush()
    os._exit(status)


def _reason(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, SystemExit):
        text = f"it left before its last line ({type(error).__name__} {error})".replace(" )", ")")
    return text[:MAX_REASON]


def _settrace(function: object) -> None:
    """For doctest, which only ends a tracing that never began; the real one is refused."""
    if function is not None:
        raise PermissionError("not allowed in the sandbox: sys.settrace")


def _guard() -> Callable[[str, tuple[Any, ...]], None]:
    """The audit hook that keeps the program from searching the interpreter's memory, and from
    jumping over its own lines.

    Without a name outside itself: the program can change every variable that it can reach.
    """

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        refused = event.startswith(
            ("gc.get_", "ctypes.", "sys.remote", "sys.settrace", "sys.monitoring.register")
        )
        if event == "import":
            # Joined, as a subclass of str could say anything about itself.
            event = ".".join((event, arguments[0]))
            refused = "ctypes" in event or "interpreters" in event or "._test" in event
        if refused:
            raise PermissionError(f"not allowed in the sandbox: {event}")

    return hook


if __name__ == "__main__":
    main()
