"""Where things are kept, and how a TOML preset and the command line become one frozen dataclass.

Every script does the same: `config = parse(PretrainConfig, description=__doc__)`. A preset given by
`--config file.toml` supplies new defaults, flags override it, and tyro makes `--help` from the
field docstrings. A preset holds one table per stage ([pretrain], [tok_train], …, named after the
dataclass), or one stage's settings alone without a table. The resolved configuration is saved
beside what it made (`to_toml`), so a run can be repeated.
"""

import dataclasses
import json
import os
import re
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def base_dir() -> Path:
    """The folder everything is kept in: $NANOCHAT_BASE_DIR, or ~/.cache/nanochat_jax."""
    named = os.environ.get("NANOCHAT_BASE_DIR")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "nanochat_jax"


def parse[C](
    config_class: type[C], args: Sequence[str] | None = None, description: str | None = None
) -> C:
    """Builds `config_class` from `--config PRESET` (a path, or a name in configs/) and flags.

    A mistake on the command line or in the preset ends the program with one sentence.
    """
    args = list(sys.argv[1:] if args is None else args)
    try:
        preset, args = _take_preset(args)
        values = _settings(config_class, preset) if preset else {}
        default = config_class(**_checked(config_class, values, preset)) if preset else None
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


def from_toml[C](config_class: type[C], text: str, where: str) -> C:
    """The inverse of `to_toml`; an unknown key is a ValueError that names the known ones."""
    return config_class(**_checked(config_class, tomllib.loads(text), where))


# --- pretraining ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class PretrainConfig:
    """Pretraining: what scripts/pretrain.py trains, on what, and how it reports.

    None means: the recipe's own value, or what the depth decides (scaling.py).
    """

    run: str = ""
    """Name of the run: everything goes to runs/NAME; empty is d<depth>."""
    resume: bool = False
    """Continue the run from its last checkpoint (from the start where it has none)."""
    overwrite: bool = False
    """Delete the run of this name and start it again."""

    # what is trained
    depth: int = 20
    """Number of layers: the one dial from which everything else follows."""
    recipe: Literal["2025", "2026"] = "2026"
    """Which nanochat: of October 2025 (the $100 speedrun) or of July 2026."""
    aspect_ratio: int | None = None
    """Width per layer (64)."""
    head_dim: int | None = None
    """Width of an attention head (128)."""
    n_embd: int | None = None
    """Width, instead of aspect_ratio times depth."""
    n_head: int | None = None
    """Attention heads, instead of width / head_dim."""
    n_kv_head: int | None = None
    """Key/value heads (as many as attention heads)."""
    max_seq_len: int = 2048
    """Tokens in a row: the context of the model."""
    window_pattern: str | None = None
    """Attention windows tiled over the layers, L full and S a quarter (2026: SSSL)."""

    # for how long
    num_iterations: int | None = None
    """Steps; goes before target_flops, and that before target_param_data_ratio."""
    target_flops: float | None = None
    """Train until so many FLOPs are spent."""
    target_param_data_ratio: float | None = None
    """Tokens per counted parameter (12; 2025: 20)."""

    # how
    device_batch_size: int = 32
    """Rows that a device computes at once; the first thing to halve when memory runs out."""
    total_batch_size: int | None = None
    """Tokens of a step over all devices; the rest is accumulated."""
    embedding_lr: float | None = None
    """Learning rate of the token embedding, AdamW."""
    unembedding_lr: float | None = None
    """Learning rate of the output head, AdamW."""
    matrix_lr: float | None = None
    """Learning rate of the matrices of the blocks, Muon."""
    scalar_lr: float | None = None
    """Learning rate of the residual scalars, AdamW (2026)."""
    weight_decay: float | None = None
    """Weight decay of Muon before scaling (2025: of AdamW)."""
    warmup_steps: int | None = None
    """Steps in which the learning rates rise."""
    warmdown_ratio: float | None = None
    """Share of the steps, at the end, in which they fall."""
    final_lr_frac: float | None = None
    """Where they end, as a share of their peak."""
    grad_clip: float | None = None
    """Largest global gradient norm; 0 is off."""
    seed: int = 42
    """Seed of the initial weights and of the samples."""

    # on what
    dataset: str = "climbmix"
    """climbmix, fineweb-edu, local, or a folder of Parquet shards."""
    tokenizer: str = "default"
    """Name below tokenizer/, or a folder that tok_train.py wrote."""
    data_streams: int | None = None
    """Logical streams that the rows of a step are drawn from (8, or what divides the rows)."""

    # where
    n_devices: int | None = None
    """Devices to use (all)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type: bfloat16 on accelerators, float32 on a CPU."""
    attention: Literal["auto", "blocked", "cudnn"] = "auto"
    """Attention kernel: cudnn on an NVIDIA GPU with bfloat16, else blocked."""

    # looking at it
    eval_every: int = 250
    """Steps between measurements of validation bits per byte; 0: never."""
    eval_tokens: int = 80 * 524288
    """Tokens of validation text in each."""
    sample_every: int = 2000
    """Steps between samples of text; 0: never."""
    sample_tokens: int = 32
    """Tokens of each sample."""
    save_every: int = 1000
    """Steps between checkpoints, best a multiple of eval_every; 0: only at the end."""
    keep_last: int = 2
    """Checkpoints kept, besides the one with the lowest validation bits per byte."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Also report to Weights & Biases; offline writes into the run's folder."""


# --- mid-training and supervised fine-tuning ------------------------------------------------------


@dataclass(frozen=True)
class FinetuneConfig:
    """What mid-training and supervised fine-tuning share.

    None means: what the source run had, or what the recipe of its model says (finetuning.py).
    """

    run: str = ""
    """Name of the run: everything goes to runs/NAME; empty is that of the source and the stage."""
    resume: bool = False
    """Continue the run from its last checkpoint (from the start where it has none)."""
    overwrite: bool = False
    """Delete the run of this name and start it again."""

    # from what
    source: str = ""
    """Run, or folder of one, whose model is trained further (the newest that fits)."""
    source_step: str = "last"
    """Which of its checkpoints: a step, last or best."""
    warm_start: bool | None = None
    """Go on with the optimizer's moments of that checkpoint (2026: yes, 2025: no)."""

    # on what
    tasks: str = ""
    """Tasks with commas between; gsm8k*4 is seen four times as often, smoltalk[10000] in part."""
    val_tasks: str = ""
    """Tasks to measure on, of their test part (those that are trained on)."""
    packing: Literal["best-fit", "one-per-row", "stream"] | None = None
    """How conversations become rows (mid-training: stream; SFT: best-fit, 2025: one-per-row)."""
    data_streams: int | None = None
    """Logical streams that the rows of a step are drawn from (8, or what divides the rows)."""

    # for how long
    epochs: float = 1.0
    """Passes over the conversations."""
    num_iterations: int | None = None
    """Steps, instead."""

    # how
    device_batch_size: int | None = None
    """Rows that a device computes at once; the first thing to halve when memory runs out."""
    total_batch_size: int | None = None
    """Tokens of a step, padding included (SFT of 2025: 32 rows)."""
    lr_frac: float | None = None
    """Learning rates at their highest, as a share of the source's (1.0; SFT 0.8, 2025: 0.02)."""
    warmup_steps: int = 0
    """Steps in which the learning rates rise."""
    warmdown_ratio: float | None = None
    """Share of the steps, at the end, in which they fall (0.2; SFT 0.5, 2025: 1.0)."""
    final_lr_frac: float = 0.0
    """Where they end, as a share of their peak."""
    embedding_lr: float | None = None
    """Learning rate of the token embedding, AdamW."""
    unembedding_lr: float | None = None
    """Learning rate of the output head, AdamW."""
    matrix_lr: float | None = None
    """Learning rate of the matrices of the blocks, Muon."""
    scalar_lr: float | None = None
    """Learning rate of the residual scalars, AdamW (2026)."""
    weight_decay: float = 0.0
    """Weight decay of Muon (2025: of AdamW)."""
    grad_clip: float | None = None
    """Largest global gradient norm; 0 is off."""
    seed: int = 42
    """Seed of the samples."""

    # where
    n_devices: int | None = None
    """Devices to use (all)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type: bfloat16 on accelerators, float32 on a CPU."""
    attention: Literal["auto", "blocked", "cudnn"] = "auto"
    """Attention kernel: cudnn on an NVIDIA GPU with bfloat16, else blocked."""

    # looking at it
    eval_every: int = 200
    """Steps between measurements of bits per byte of held-out answers; 0: never."""
    eval_tokens: int = 20 * 524288
    """Tokens of rows in each, padding included."""
    sample_every: int = 400
    """Steps between answers to a few questions; 0: never."""
    sample_tokens: int = 48
    """Tokens of each answer."""
    save_every: int = 400
    """Steps between checkpoints, best a multiple of eval_every; 0: only at the end."""
    keep_last: int = 2
    """Checkpoints kept, besides the one with the lowest validation bits per byte."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Also report to Weights & Biases; offline writes into the run's folder."""


@dataclass(frozen=True)
class MidtrainConfig(FinetuneConfig):
    """Mid-training: what scripts/midtrain.py trains a base model on, and how."""


@dataclass(frozen=True)
class SftConfig(FinetuneConfig):
    """Fine-tuning: what scripts/sft.py trains a base or mid-trained model on, and how."""


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


def _settings(config_class: type, preset: str) -> dict[str, Any]:
    """The part of a preset that is meant for this stage."""
    content = _read_toml(preset)
    if not any(isinstance(value, dict) for value in content.values()):
        return content
    words = re.findall("[A-Z][a-z0-9]*", config_class.__name__.removesuffix("Config"))
    return content.get("_".join(words).lower(), {})


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


def _checked(config_class: type, values: dict[str, Any], where: str | None) -> dict[str, Any]:
    known = [field.name for field in dataclasses.fields(config_class)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(
            f"{where}: unknown setting {', '.join(unknown)}; the known ones are {', '.join(known)}"
        )
    return values


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    # A JSON string is a TOML string, but for the one control character that JSON lets through.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
