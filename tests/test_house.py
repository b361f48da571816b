"""How the package is built: who may import whom, and how large things may be."""

import ast
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nanochat_jax"
PARSED = {
    path: ast.parse(path.read_text(encoding="utf-8"))
    for folder in (PACKAGE, ROOT / "scripts")
    for path in folder.rglob("*.py")
}
# A room is a file of the root or a folder. It imports only rooms of earlier rows of this table,
# so this is also an order in which one can read the package.
FLOORS = [
    {"config", "sharding", "attention", "muon", "devices", "sandbox"},
    {"distributed", "gpt", "tokenizer"},
    {"cli", "runs", "scaling", "data", "engine", "interop", "train"},
    {"checkpoint", "optim", "report", "tasks"},
    {"evals", "serve"},
    {"stages"},
    {"planner", "sweep"},
]


def module_of(path: Path) -> str:
    """nanochat_jax/evals/core.py -> "evals.core"; a folder's __init__ is the folder's name."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imported(tree: ast.AST, modules: set[str]) -> set[str]:
    """The modules of the package that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name.removeprefix("nanochat_jax.") for name in names} & modules


FILES = {module_of(path): tree for path, tree in PARSED.items() if PACKAGE in path.parents}
MODULES = set(FILES) - {"__init__"}
IMPORTS = {name: imported(FILES[name], MODULES) - {name} for name in sorted(MODULES)}


def test_the_package_root_is_small():
    assert len(list(PACKAGE.glob("*.py"))) <= 14 + 1  # and __init__


def test_no_imports_go_in_a_circle():
    list(TopologicalSorter(IMPORTS).static_order())  # a CycleError names the modules


def test_no_room_imports_its_own_floor_or_a_higher_one():
    assert len(FLOORS) <= 9
    floor_of = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    for name, others in IMPORTS.items():
        room = name.split(".")[0]
        for other in {other.split(".")[0] for other in others} - {room}:
            assert floor_of[other] < floor_of[room], f"{name} imports {other}"
    assert {name.split(".")[0] for name in MODULES} == set(floor_of)


def test_files_and_functions_are_short():
    for path, tree in PARSED.items():
        text = path.read_text(encoding="utf-8")
        assert "TYPE_CHECKING" not in text, path
        assert len(text.splitlines()) <= 500, path
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 60, (path, node.name)


def test_no_class_name_comes_twice():
    classes = [n.name for t in PARSED.values() for n in ast.walk(t) if isinstance(n, ast.ClassDef)]
    assert [name for name, count in Counter(classes).items() if count > 1] == []
