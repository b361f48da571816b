"""Finds English prose on any machine that runs this program: Python's own documentation.

Sources are the docstrings of the standard library and of the installed packages, their .rst, .md
and .txt files, and the texts of Python's `help()`. Nothing is imported or run: the texts are
extracted from the files, without code, tables, duplicates and what does not read like English.
"""

import ast
import inspect
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

MIN_CHARS = 200
MIN_LETTERS = 0.7  # share of letters among the characters that are not spaces
MIN_COMMON = 0.15  # share of COMMON_WORDS among the words; ordinary English has about 0.3
COMMON_WORDS = frozenset(
    re.findall(
        r"\w+",
        """a an and are as at be but by can for from has have if in is it its not of on or return
        returns that the this to used was when which will with you""",
    )
)
SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "node_modules"}
# Licences repeat one text many times; the others are lists of names, versions and packages.
SKIPPED_FILES = re.compile(
    r"licen[cs]e|copying|notice|author|contributors|require|news|history|change", re.IGNORECASE
)

# A string where a docstring can be: at the top of a file, or below a line that ends in ':'. Finding
# these takes a tenth of the time of parsing whole files.
_REST_OF_LINE = r"[ \t]*(?:\#[^\n]*)?\n"
_LITERAL = r"""(?P<literal>[rRuU]?(?P<quote>\"{3}|'{3})(?:[^\\]|\\.)*?(?P=quote))"""
DOCSTRING = re.compile(rf"(?:\A|:{_REST_OF_LINE})(?:{_REST_OF_LINE})*[ \t]*{_LITERAL}", re.DOTALL)


def find_prose(roots: Sequence[Path] | None = None) -> Iterator[str]:
    """Documents of at least 200 characters, in no particular order, no two with the same words."""
    seen: set[str] = set()
    for path in _files(python_folders() if roots is None else roots):
        for raw in texts_of(path):
            text = clean(raw)
            words = re.sub(r"[^a-z]+", " ", text.lower())
            if reads_like_english(text) and words not in seen:
                seen.add(words)
                yield text


def python_folders() -> list[Path]:
    """The standard library and the folders with the installed packages."""
    paths = sysconfig.get_paths()
    return [Path(paths[key]) for key in ("stdlib", "purelib", "platlib")]


def _files(roots: Sequence[Path]) -> Iterator[Path]:
    """Every file once, in an order that does not depend on the file system."""
    for root in dict.fromkeys(roots):
        for folder, below, names in os.walk(root):
            below[:] = sorted(set(below) - SKIPPED_FOLDERS)
            yield from (Path(folder, name) for name in sorted(names))


def texts_of(path: Path) -> list[str]:
    """The texts in one file that may be prose; none from a file that is not readable as UTF-8."""
    is_document = path.suffix in {".rst", ".md", ".txt"} and not SKIPPED_FILES.search(path.name)
    if path.suffix != ".py" and not is_document:
        return []
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    if is_document:
        return [content]
    if path.parent.name == "pydoc_data":
        return _help_texts(content)
    return docstrings(content)


def docstrings(source: str) -> list[str]:
    """The docstrings of at least 200 characters in Python source, without their indentation."""
    literals = [match["literal"] for match in DOCSTRING.finditer(source)]
    values = [_value(literal) for literal in literals if len(literal) >= MIN_CHARS]
    return [inspect.cleandoc(value) for value in values if value]


def _value(literal: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escape sequences in packages
        try:
            return ast.literal_eval(literal)
        except (SyntaxError, ValueError):
            return ""


def _help_texts(source: str) -> list[str]:
    """The values of the dictionary `topics` in the standard library's pydoc_data/topics.py."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return []
    dicts = [node.value for node in tree.body if isinstance(node, ast.Assign)]
    values = [value for found in dicts if isinstance(found, ast.Dict) for value in found.values]
    return [ast.literal_eval(value) for value in values if isinstance(value, ast.Constant)]


def clean(text: str) -> str:
    """The text without code blocks, interactive examples, directives and lines without a letter."""
    kept: list[str] = []
    fenced = example = False
    block_indent = -1  # of the line whose indented block is being skipped
    for line in text.expandtabs().splitlines():
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        if stripped.startswith(("```", "~~~")):
            fenced = not fenced
            continue
        if fenced or (block_indent >= 0 and stripped and indent > block_indent):
            continue
        block_indent = block_indent if not stripped else -1
        example = bool(stripped) and (example or stripped.startswith(">>>"))
        is_directive = bool(re.match(r"\.\. [\w-]+::", stripped))
        if stripped.endswith("::") or is_directive:
            block_indent = indent
        if example or is_directive or (stripped and not re.search("[A-Za-z]", stripped)):
            continue
        kept.append(line.rstrip().removesuffix(":") if stripped.endswith("::") else line.rstrip())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


def reads_like_english(text: str) -> bool:
    """Whether a text is long enough, mostly letters, and has enough common English words."""
    words = re.findall(r"[a-z]+", text.lower())
    solid = "".join(text.split())
    if len(text) < MIN_CHARS or not words:
        return False
    letters = sum(map(len, words)) / len(solid)
    common = sum(word in COMMON_WORDS for word in words) / len(words)
    return letters >= MIN_LETTERS and common >= MIN_COMMON
