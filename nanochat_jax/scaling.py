"""The single dial: from a depth, everything else.

`plan(depth)` turns the number of layers into width, parameters, FLOPs, batch, learning rates,
weight decay and steps, and `explain(plan)` says how, line by line. Plain Python: a plan costs
nothing.

The 2026 rules: tokens in proportion to the parameters (Chinchilla, arXiv 2203.15556), batch ∝
tokens^0.383 (Power Lines, arXiv 2505.13738), learning rates ∝ sqrt(batch), weight decay so that
batch / (lr · decay · tokens) stays constant (arXiv 2405.13698). All are anchored at depth 12, where
the numbers were tuned. The rates of batches below 32,768 tokens, as a CPU takes, are our own rule.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from nanochat_jax.gpt import SMEAR_CHANNELS, GPTConfig, parameter_table

REFERENCE_DEPTH = 12
REFERENCE_BATCH = 2**19  # tokens; the best batch found at REFERENCE_DEPTH
# Below so many tokens a step the square root makes rates several times too small; the best scale
# no longer depends on the batch there (measured at 1,024 to 16,384 tokens a step: LOG.md).
SMALL_BATCH = 2**15
SMALL_BATCH_LR_SCALE = 0.5
BATCH_EXPONENT = 0.383


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """The numbers of the optimizer that a recipe sets, and flags of the same names override."""

    unembedding_lr: float
    embedding_lr: float
    matrix_lr: float
    scalar_lr: float
    weight_decay: float  # of Muon in 2026, of AdamW in 2025
    warmup_steps: int
    warmdown_ratio: float
    final_lr_frac: float
    grad_clip: float  # global norm; 0: off
    momentum_start: float
    momentum_peak: float
    momentum_final: float
    momentum_warmup_steps: int


@dataclass(frozen=True, kw_only=True)
class Recipe(OptimSettings):
    """Everything tuned by hand, before it is scaled to a depth."""

    vocab_size: int
    window_pattern: str
    target_param_data_ratio: float  # tokens per counted parameter
    total_batch_size: int | None  # tokens a step; None: from the rule
    sequence_len: int = 2048
    aspect_ratio: float = 64  # width per layer
    head_dim: int = 128


RECIPES: dict[str, Recipe] = {
    "2025": Recipe(
        vocab_size=2**16,
        window_pattern="L",
        target_param_data_ratio=20,
        total_batch_size=2**19,
        unembedding_lr=0.004,
        embedding_lr=0.2,
        matrix_lr=0.02,
        scalar_lr=0.0,
        weight_decay=0.0,
        warmup_steps=0,
        warmdown_ratio=0.2,
        final_lr_frac=0.0,
        grad_clip=1.0,
        momentum_start=0.85,
        momentum_peak=0.95,
        momentum_final=0.95,
        momentum_warmup_steps=300,
    ),
    "2026": Recipe(
        vocab_size=2**15,
        window_pattern="SSSL",
        target_param_data_ratio=12,
        total_batch_size=None,
        unembedding_lr=0.008,
        embedding_lr=0.3,
        matrix_lr=0.02,
        scalar_lr=0.5,
        weight_decay=0.28,
        warmup_steps=40,
        warmdown_ratio=0.65,
        final_lr_frac=0.05,
        grad_clip=0.0,
        momentum_start=0.85,
        momentum_peak=0.97,
        momentum_final=0.90,
        momentum_warmup_steps=400,
    ),
}


@dataclass(frozen=True)
class ParamCounts:
    wte: int
    value_embeds: int
    lm_head: int
    transformer_matrices: int
    scalars: int  # the block scalars and the smear gate

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Plan:
    """A training run, decided. Tokens and batches are counted over all devices."""

    depth: int
    recipe: str
    settings: Recipe  # the recipe with the caller's overrides
    config: GPTConfig
    params: ParamCounts
    scaling_params: int
    flops_per_token: int
    target_tokens: int
    reference_tokens: float | None  # the same at REFERENCE_DEPTH (2026)
    total_batch_size: int
    batch_lr_scale: float
    weight_decay_scaled: float
    num_iterations: int
    length_rule: str  # what decided num_iterations
    device_batch_size: int
    n_devices: int
    grad_accum_steps: int

    @property
    def total_tokens(self) -> int:
        return self.total_batch_size * self.num_iterations

    @property
    def total_flops(self) -> int:
        return self.flops_per_token * self.total_tokens


def plan(
    depth: int,
    recipe: str = "2026",
    *,
    n_embd: int | None = None,
    n_head: int | None = None,
    n_kv_head: int | None = None,
    num_iterations: int | None = None,
    target_flops: float | None = None,
    device_batch_size: int = 32,
    n_devices: int = 1,
    **overrides: Any,
) -> Plan:
    """Derives a whole run from `depth`.

    `overrides` are fields of Recipe (vocab_size, sequence_len, aspect_ratio, head_dim, learning
    rates, window_pattern, target_param_data_ratio, total_batch_size …); None means the recipe's own
    value. `n_embd` is the width instead of aspect_ratio · depth, `n_head` goes before head_dim. The
    number of steps comes from num_iterations, else target_flops, else
    target_param_data_ratio. ValueError, with what to do, for anything that cannot be trained.
    """
    settings = _settings(recipe, overrides)
    width = n_embd or round(settings.aspect_ratio * depth)
    if n_embd or n_head:
        settings = replace(settings, head_dim=_head_dim(width, n_head, settings, overrides))
    config = model_config(depth, width, recipe, settings, n_kv_head)
    scaling_params = count_scaling_params(config)
    target_tokens = int(settings.target_param_data_ratio * scaling_params)
    reference = _reference_tokens(recipe, settings, depth, width)
    batch = settings.total_batch_size or optimal_batch_size(target_tokens, reference)
    steps, length_rule = _num_iterations(
        num_iterations, target_flops, count_flops_per_token(config) * batch, target_tokens, batch
    )
    return Plan(
        depth=depth,
        recipe=recipe,
        settings=settings,
        config=config,
        params=count_params(config),
        scaling_params=scaling_params,
        flops_per_token=count_flops_per_token(config),
        target_tokens=target_tokens,
        reference_tokens=reference,
        total_batch_size=batch,
        batch_lr_scale=_batch_lr_scale(batch) if reference else 1.0,
        weight_decay_scaled=_scaled_weight_decay(settings, batch, target_tokens, reference),
        num_iterations=steps,
        length_rule=length_rule,
        device_batch_size=device_batch_size,
        n_devices=n_devices,
        grad_accum_steps=grad_accumulation(
            batch, device_batch_size, settings.sequence_len, n_devices
        ),
    )


def _settings(recipe: str, overrides: dict[str, Any]) -> Recipe:
    if recipe not in RECIPES:
        raise ValueError(f"recipe is one of {', '.join(RECIPES)}, not {recipe!r}")
    known = [field.name for field in fields(Recipe)]
    if unknown := sorted(set(overrides) - set(known)):
        raise ValueError(f"unknown setting {', '.join(unknown)}; known are {', '.join(known)}")
    settings = replace(RECIPES[recipe], **{k: v for k, v in overrides.items() if v is not None})
    for name in ("vocab_size", "sequence_len", "aspect_ratio", "head_dim", "total_batch_size"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if settings.target_param_data_ratio <= 0:
        raise ValueError(
            f"target_param_data_ratio must be positive, not {settings.target_param_data_ratio}: "
            "it also sets batch and weight decay; give num_iterations to fix the number of steps"
        )
    return settings


# --- the model and what it costs -----------------------------------------------------------------


def model_config(
    depth: int, width: int, recipe: str, settings: Recipe, n_kv_head: int | None = None
) -> GPTConfig:
    """The model of a depth and width; 2026 rounds the width up to whole heads."""
    if depth < 1:
        raise ValueError(f"depth must be at least 1, not {depth}")
    n_head = -(-width // settings.head_dim)
    if recipe == "2026":
        width = n_head * settings.head_dim
    elif width % n_head or width // n_head % 2:
        raise ValueError(
            f"depth {depth} makes a width of {width}, which {n_head} heads do not divide evenly in "
            f"the 2025 recipe; take an even depth or another aspect_ratio or head_dim"
        )
    return GPTConfig(
        recipe=recipe,
        sequence_len=settings.sequence_len,
        vocab_size=settings.vocab_size,
        n_layer=depth,
        n_head=n_head,
        n_kv_head=n_kv_head or n_head,
        n_embd=width,
        window_pattern=settings.window_pattern,
    )


def _head_dim(width: int, n_head: int | None, settings: Recipe, overrides: dict[str, Any]) -> int:
    """Of a width or a number of heads that was given; ValueError unless the heads are whole."""
    if overrides.get("aspect_ratio") is not None:
        raise ValueError("give either aspect_ratio, or n_embd and n_head")
    head_dim = width // n_head if n_head else settings.head_dim
    if head_dim < 1 or width % head_dim or (n_head or width // head_dim) * head_dim != width:
        raise ValueError(
            f"a width of {width} cannot be cut into whole heads of {head_dim}; give n_embd and "
            "n_head, the first a multiple of the second"
        )
    return head_dim


def count_params(config: GPTConfig) -> ParamCounts:
    """Numbers of parameters by the groups that the optimizer and the scaling laws tell apart."""
    size = {name: math.prod(shape) for name, (shape, _) in parameter_table(config).items()}
    wte, lm_head, tables = size.pop("wte"), size.pop("lm_head"), size.pop("value_embeds", 0)
    matrices = sum(size.pop(name, 0) for name in ("qo", "kv", "fc", "proj", "ve_gate"))
    return ParamCounts(wte, tables, lm_head, matrices, scalars=sum(size.values()))


def count_scaling_params(config: GPTConfig) -> int:
    """The parameters that tokens are counted against: all (2025), or matrices and head (2026)."""
    params = count_params(config)
    matrices = params.transformer_matrices + params.lm_head
    return params.total if config.recipe == "2025" else matrices


def count_matmul_params(config: GPTConfig) -> int:
    """Weights that every token is multiplied with (tables are looked up, scalars are free)."""
    params = count_params(config)
    smear = SMEAR_CHANNELS if config.recipe == "2026" else 0
    return params.transformer_matrices + params.lm_head + smear


def count_flops_per_token(config: GPTConfig) -> int:
    """Training FLOPs of one token: 6 a weight, 12 a channel and visible key (arXiv 2204.02311)."""
    keys = sum(min(window, config.sequence_len) for window in config.window_sizes)
    return 6 * count_matmul_params(config) + 12 * config.n_embd * keys


# --- batch, rates and length ---------------------------------------------------------------------


def optimal_batch_size(target_tokens: float, reference_tokens: float | None) -> int:
    """Tokens a step: the power of two nearest to REFERENCE_BATCH · (D / D_ref)^0.383."""
    ratio = target_tokens / reference_tokens if reference_tokens else 1.0
    return 2 ** round(math.log2(REFERENCE_BATCH * ratio**BATCH_EXPONENT))


def grad_accumulation(batch: int, device_batch_size: int, sequence_len: int, n_devices: int) -> int:
    """Micro-batches a step; ValueError, naming what would do, where the batch does not divide."""
    micro = device_batch_size * sequence_len * n_devices
    if micro < 1:
        raise ValueError(
            f"device_batch_size={device_batch_size}, sequence_len={sequence_len} and "
            f"n_devices={n_devices} must all be at least 1"
        )
    if batch % micro == 0:
        return batch // micro
    rows, rest = divmod(batch, sequence_len * n_devices)
    fitting = [] if rest else [b for b in range(1, device_batch_size + 1) if rows % b == 0]
    hints = [f"device_batch_size={fitting[-1]}"] if fitting else []
    hints.append(f"total_batch_size={max(1, round(batch / micro)) * micro}")
    raise ValueError(
        f"a step of {batch:,} tokens is not a whole number of micro-batches of {micro:,} "
        f"({device_batch_size} rows × {sequence_len} tokens × {n_devices} devices); "
        f"take {' or '.join(hints)}"
    )


def _reference_tokens(recipe: str, settings: Recipe, depth: int, width: int) -> float | None:
    """Tokens of the run of REFERENCE_DEPTH with the same width per layer."""
    if recipe == "2025":
        return None
    reference_width = round(width * REFERENCE_DEPTH / depth)
    reference = model_config(REFERENCE_DEPTH, reference_width, recipe, settings)
    return settings.target_param_data_ratio * count_scaling_params(reference)


def _batch_lr_scale(batch: int) -> float:
    """What the 2026 recipe multiplies every learning rate by, for a step of so many tokens."""
    return SMALL_BATCH_LR_SCALE if batch < SMALL_BATCH else (batch / REFERENCE_BATCH) ** 0.5


def _scaled_weight_decay(
    settings: Recipe, batch: int, target_tokens: int, reference_tokens: float | None
) -> float:
    if reference_tokens is None:
        return settings.weight_decay
    shorter = reference_tokens / target_tokens
    return settings.weight_decay * math.sqrt(batch / REFERENCE_BATCH) * shorter


def _num_iterations(
    explicit: int | None,
    target_flops: float | None,
    flops_per_step: int,
    target_tokens: int,
    batch: int,
) -> tuple[int, str]:
    if explicit is not None and explicit > 0:
        return explicit, "as given"
    if target_flops is not None and target_flops > 0:
        steps, source = round(target_flops / flops_per_step), f"{target_flops:g} target FLOPs"
    else:
        steps, source = target_tokens // batch, "target tokens // batch"
    if steps < 1:
        raise ValueError(
            f"{source} is less than one step of {batch:,} tokens; give a smaller total_batch_size, "
            "more tokens or num_iterations"
        )
    return steps, source


# --- saying it -----------------------------------------------------------------------------------


def explain(plan: Plan) -> list[tuple[str, str, str]]:
    """(name, value, formula) of every derived number, in the order they follow from each other."""
    return [*_explain_model(plan), *_explain_length(plan), *_explain_rates(plan)]


def _explain_model(plan: Plan) -> list[tuple[str, str, str]]:
    config, settings, params = plan.config, plan.settings, plan.params
    windows = sorted({min(w, config.sequence_len) for w in config.window_sizes})
    width_rule = f"{settings.aspect_ratio:g} × depth, in whole heads"
    if not 0 <= config.n_embd - round(settings.aspect_ratio * plan.depth) < config.head_dim:
        width_rule = "as given"
    counted = "all" if plan.recipe == "2025" else "transformer matrices + lm_head"
    lines = [
        ("depth", str(plan.depth), f"the dial, {plan.recipe} recipe"),
        ("width", str(config.n_embd), width_rule),
        ("heads", str(config.n_head), f"width / {config.head_dim}"),
        ("key/value heads", str(config.n_kv_head), f"of {config.head_dim} channels"),
        ("context", f"{config.sequence_len:,}", "tokens a row"),
        ("windows", ", ".join(map(str, windows)), f"pattern {config.window_pattern}, last layer L"),
        ("vocabulary", f"{config.vocab_size:,}", f"{config.padded_vocab_size:,} rows"),
    ]
    if plan.recipe == "2025":
        lines[5] = ("windows", "full", "every layer sees the whole context")
    lines += [
        (f"  {field.name}", f"{getattr(params, field.name):,}", "parameters")
        for field in fields(ParamCounts)
        if getattr(params, field.name)
    ]
    return [
        *lines,
        ("parameters", f"{params.total:,}", "the sum"),
        ("scaling parameters", f"{plan.scaling_params:,}", counted),
        (
            "FLOPs per token",
            f"{plan.flops_per_token:e}",
            f"6 × {count_matmul_params(config):,} weights + 12 × width × Σ windows",
        ),
    ]


def _explain_length(plan: Plan) -> list[tuple[str, str, str]]:
    settings = plan.settings
    ratio = settings.target_param_data_ratio
    rule = "as given"
    if settings.total_batch_size is None:
        rule = f"2^round(log2({REFERENCE_BATCH:,} × (tokens / tokens of d12)^{BATCH_EXPONENT}))"
    micro = f"{plan.device_batch_size} rows × {settings.sequence_len} tokens"
    return [
        ("target tokens", f"{plan.target_tokens:,}", f"{ratio:g} × scaling parameters"),
        ("batch", f"{plan.total_batch_size:,}", f"tokens a step: {rule}"),
        (
            "accumulation",
            str(plan.grad_accum_steps),
            f"batch / ({micro} × {plan.n_devices} devices)",
        ),
        ("steps", f"{plan.num_iterations:,}", plan.length_rule),
        ("tokens", f"{plan.total_tokens:,}", "steps × batch"),
        (
            "tokens per parameter",
            f"{plan.total_tokens / plan.scaling_params:.2f}",
            "tokens / scaling parameters",
        ),
        ("FLOPs", f"{plan.total_flops:e}", "tokens × FLOPs per token"),
    ]


def _explain_rates(plan: Plan) -> list[tuple[str, str, str]]:
    settings, scale = plan.settings, plan.batch_lr_scale
    width = (plan.config.n_embd / 768) ** -0.5
    rule = f"sqrt(batch / {REFERENCE_BATCH:,})" if plan.recipe == "2026" else "not scaled"
    if plan.recipe == "2026" and plan.total_batch_size < SMALL_BATCH:
        rule = f"for a batch below {SMALL_BATCH:,} tokens"
    decay = (
        f"{settings.weight_decay:g} × sqrt(batch / {REFERENCE_BATCH:,}) × tokens of d12 / tokens"
    )
    by_width = f"× {scale:.4f} × {width:.4f} (= sqrt(768 / width))"
    rates = [
        ("lm_head lr", settings.unembedding_lr * scale * width, settings.unembedding_lr, by_width),
        ("embedding lr", settings.embedding_lr * scale * width, settings.embedding_lr, by_width),
        ("matrix lr", settings.matrix_lr * scale, settings.matrix_lr, f"× {scale:.4f}"),
    ]
    if plan.recipe == "2026":
        rates.append(
            ("scalar lr", settings.scalar_lr * scale, settings.scalar_lr, f"× {scale:.4f}")
        )
    return [
        ("lr scale", f"{scale:.4f}", rule),
        *((name, f"{value:.6g}", f"{base:g} {how}") for name, value, base, how in rates),
        (
            "weight decay",
            f"{plan.weight_decay_scaled:.6g}",
            decay if plan.recipe == "2026" else "not scaled",
        ),
    ]
