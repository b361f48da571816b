"""Where things are kept, and how a TOML preset and the command line become one frozen dataclass.

Every script does the same: `config = parse(PretrainConfig, "pretrain", description=__doc__)`. A
preset given by `--config file.toml` supplies new defaults, flags override it, and tyro makes
`--help` from the field docstrings. A preset holds one table per script ([pretrain], [sft], …),
or one script's settings alone without a table. The resolved configuration is saved beside what it
made (`to_toml`), so a run can be repeated.
"""

import dataclasses
import json
import os
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def base_dir() -> Path:
    """The folder everything is kept in: $NANOCHAT_BASE_DIR, or ~/.cache/nanochat_jax."""
    named = os.environ.get("NANOCHAT_BASE_DIR")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "nanochat_jax"


def named_folder(kind: str, name: str | Path) -> Path:
    """A name stands for <kind>/<name> below the base directory, a path for itself."""
    if isinstance(name, str) and "/" not in name and name not in ("", ".", ".."):
        return base_dir() / kind / name
    return Path(name).expanduser()


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file as a whole: a reader, or a crash, never finds half of it.

    It is on the disk when this returns.
    """
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Brings the names in a folder, not the content of its files, to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def parse[C](
    config_class: type[C],
    table: str,
    args: Sequence[str] | None = None,
    description: str | None = None,
) -> C:
    """Builds `config_class` from `--config PRESET` (a path, or a name in configs/) and flags.

    Of a preset with tables, the one named `table` is read.

    A mistake on the command line or in the preset ends the program with one sentence.
    """
    args = list(sys.argv[1:] if args is None else args)
    try:
        preset, args = _take_preset(args)
        default = config_class(**_preset(config_class, table, preset)) if preset else None
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    epilogue = "--config PRESET: a TOML file, or a name in configs/, that supplies the defaults"
    parsed = tyro.cli(
        config_class,
        args=args,
        default=default,
        description=f"{description or config_class.__doc__}\n\n{epilogue}",
        config=(tyro.conf.OmitArgPrefixes,),
    )
    assert parsed is not None  # for the type checker: only a default could be
    return parsed


def to_toml(config: Any) -> str:
    """A dataclass as TOML, in the order of its fields; None is left out (TOML has no null)."""
    lines = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is not None:
            lines.append(f"{field.name} = {_toml_value(value)}")
    return "\n".join(lines) + "\n"


def _take_preset(args: list[str]) -> tuple[str | None, list[str]]:
    rest, preset = [], None
    position = 0
    while position < len(args):
        arg = args[position]
        if arg == "--config" and position + 1 == len(args):
            raise ValueError("--config needs the name of a TOML file")
        if arg == "--config":
            preset, position = args[position + 1], position + 1
        elif arg.startswith("--config="):
            preset = arg.removeprefix("--config=")
        else:
            rest.append(arg)
        position += 1
    return preset, rest


def _preset(config_class: type, table: str, preset: str) -> dict[str, Any]:
    """The settings of a preset for this class; ValueError for one that the class does not have."""
    content = _read_toml(preset)
    if any(isinstance(value, dict) for value in content.values()):
        content = content.get(table, {})
    known = [field.name for field in dataclasses.fields(config_class)]
    if unknown := sorted(set(content) - set(known)):
        raise ValueError(
            f"{preset}: unknown setting {', '.join(unknown)}; the known ones are {', '.join(known)}"
        )
    return content


def _read_toml(preset: str) -> dict[str, Any]:
    candidates = (Path(preset), CONFIGS / preset, CONFIGS / f"{preset}.toml")
    for path in candidates:
        if path.is_file():
            try:
                return tomllib.loads(path.read_text(encoding="utf-8"))
            except tomllib.TOMLDecodeError as error:
                raise ValueError(f"{path} is not valid TOML: {error}") from None
    known = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.toml")))
    raise ValueError(f"no preset {preset!r}: give the path of a TOML file or one of: {known}")


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    # A JSON string is a TOML string, but for the one control character that JSON lets through.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
