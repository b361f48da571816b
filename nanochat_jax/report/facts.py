"""What a report says besides measurements: the size of the code, its dependencies, the machine."""

import os
import platform
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CODE = {".py", ".rs", ".sh", ".toml", ".js", ".css", ".html", ".md"}
NOT_CODE = {".venv", "target", "node_modules", "__pycache__", "build", "dist"}
CHARACTERS_PER_TOKEN = 4  # of code, roughly


def code_size(root: Path = ROOT) -> dict[str, int]:
    """Files, lines and characters of the source tree without its tests, and tokens, roughly."""
    source = [path for path in _files(root) if path.relative_to(root).parts[0] != "tests"]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in source]
    characters = sum(map(len, texts))
    return {
        "files": len(texts),
        "lines": sum(text.count("\n") for text in texts),
        "characters": characters,
        "tokens": characters // CHARACTERS_PER_TOKEN,
    }


def _files(root: Path) -> Iterator[Path]:
    """The files that git knows, or, without git, those that look like source."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(
            command, cwd=root, capture_output=True, text=True, timeout=20, check=True
        )
        paths = [root / name for name in listed.stdout.split("\0") if name]
    except (OSError, subprocess.SubprocessError):
        paths = []
        for folder, below, names in os.walk(root):
            below[:] = [n for n in below if n not in NOT_CODE and not n.startswith(".")]
            paths += [Path(folder, name) for name in names]
    return (path for path in sorted(paths) if path.suffix in CODE and path.is_file())


def dependencies(root: Path = ROOT) -> dict[str, int]:
    """Numbers of direct dependencies and of all locked packages; empty outside a source tree."""
    found = {}
    project, lock = root / "pyproject.toml", root / "requirements" / "cpu.lock"
    if project.is_file():
        declared = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        found["direct"] = len(declared.get("dependencies", []))
    if lock.is_file():
        pinned = re.findall(r"^[A-Za-z0-9._-]+==", lock.read_text(encoding="utf-8"), re.MULTILINE)
        found["locked"] = len(pinned)
    return found


def machine() -> dict[str, Any]:
    """The machine that writes the report."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        cpuinfo = ""
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": model[1].strip() if model else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory": f"{memory:.0f} GiB",
        "python": platform.python_version(),
    }
