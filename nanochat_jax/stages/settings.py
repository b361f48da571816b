"""The settings of every stage: what the scripts' --help shows and a preset's tables may hold.

`RunSettings` is what every stage has, `TrainSettings` what pretraining and fine-tuning share. A
field's docstring is its line of --help.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RunSettings:
    """What every stage has: the run's name, its devices, its intervals."""

    run: str = ""
    """Name of the run: everything goes to runs/NAME; by default named after depth or source."""
    resume: bool = False
    """Continue the run from its last checkpoint (from the start where it has none)."""
    overwrite: bool = False
    """Delete the run of this name and start it again."""
    seed: int = 42
    """Seed of everything random."""

    # where
    device_batch_size: int | None = None
    """Rows that a device computes at a time; the first thing to halve when memory runs out."""
    n_devices: int | None = None
    """Devices to use (all)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type: bfloat16 on accelerators, float32 on a CPU."""
    attention: Literal["auto", "blocked", "cudnn"] = "auto"
    """Attention kernel: cudnn on an NVIDIA GPU with bfloat16, else blocked."""

    # for how long, and how often to look at it
    num_iterations: int | None = None
    """Steps, instead of what the stage would derive."""
    eval_every: int = 250
    """Steps between measurements on held-out data; 0: never."""
    sample_every: int = 2000
    """Steps between samples; 0: never."""
    save_every: int = 1000
    """Steps between checkpoints, best a multiple of eval_every; 0: only at the end."""
    keep_last: int = 2
    """Checkpoints kept, besides the one with the lowest validation bits per byte."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Also report to Weights & Biases; offline writes into the run's folder."""


@dataclass(frozen=True)
class TrainSettings(RunSettings):
    """What pretraining and fine-tuning share. A rate of None is the recipe's, or the source's."""

    total_batch_size: int | None = None
    """Tokens of a step over all devices, padding included; the rest is accumulated."""
    data_streams: int | None = None
    """Logical streams that the rows of a step come from (8, or what divides the rows)."""
    embedding_lr: float | None = None
    """Learning rate of the token embedding, AdamW."""
    unembedding_lr: float | None = None
    """Learning rate of the output head, AdamW."""
    matrix_lr: float | None = None
    """Learning rate of the matrices of the blocks, Muon."""
    scalar_lr: float | None = None
    """Learning rate of the residual scalars, AdamW (2026)."""
    weight_decay: float | None = None
    """Weight decay of Muon before scaling (2025: of AdamW); fine-tuning: 0."""
    warmup_steps: int | None = None
    """Steps over which the learning rates rise (fine-tuning: 0)."""
    warmdown_ratio: float | None = None
    """Share of the steps, at the end, over which they fall (mid-training 0.2; SFT 0.5 or 1.0)."""
    final_lr_frac: float | None = None
    """Where they end, as a share of their peak (fine-tuning: 0)."""
    grad_clip: float | None = None
    """Largest global gradient norm; 0 is off."""
    eval_tokens: int = 80 * 524288
    """Validation tokens in each measurement, padding included."""
    sample_tokens: int = 32
    """Tokens of each sample."""


@dataclass(frozen=True)
class PretrainConfig(TrainSettings):
    """Pretraining: what scripts/pretrain.py trains, on what, and how it reports.

    None means: the recipe's own value, or what the depth decides (scaling.py).
    """

    device_batch_size: int = 32
    """Rows that a device computes at a time; the first thing to halve when memory runs out."""

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

    # for how long: num_iterations, else target_flops, else target_param_data_ratio
    target_flops: float | None = None
    """Train until so many FLOPs are spent."""
    target_param_data_ratio: float | None = None
    """Tokens per counted parameter (12; 2025: 20)."""

    # on what
    dataset: str = "climbmix"
    """climbmix, fineweb-edu, local, or a folder of Parquet shards."""
    long_documents: Literal["crop", "continue"] | None = None
    """Documents longer than a row: crop, as published, or continue in more rows (but for climbmix
    and fineweb-edu)."""
    tokenizer: str = "default"
    """Name below tokenizer/, or a folder that tok_train.py wrote."""


@dataclass(frozen=True)
class FinetuneConfig(TrainSettings):
    """Mid-training and fine-tuning: what a run is trained on further, and how.

    None means: what the source run had, or what the recipe of its model says (finetuning.py).
    """

    eval_every: int = 200
    """Steps between measurements of bits per byte of held-out answers; 0: never."""
    eval_tokens: int = 20 * 524288
    """Tokens of validation rows in each measurement, padding included."""
    sample_every: int = 400
    """Steps between answers to a few questions; 0: never."""
    sample_tokens: int = 48
    """Tokens of each answer."""
    save_every: int = 400
    """Steps between checkpoints, best a multiple of eval_every; 0: only at the end."""
    weight_decay: float = 0.0
    """Weight decay of Muon (2025: of AdamW)."""
    warmup_steps: int = 0
    """Steps over which the learning rates rise."""
    final_lr_frac: float = 0.0
    """Where they end, as a share of their peak."""
    lr_frac: float | None = None
    """Learning rates at their peak, as a share of the source's (1.0; SFT 0.8, 2025: 0.02)."""

    # from what
    source: str = ""
    """Run, or folder of one, whose model is trained further (the newest that fits)."""
    source_step: str = "last"
    """Which of its checkpoints: a step, last or best."""
    warm_start: bool | None = None
    """Keep the optimizer's moments of that checkpoint (2026: yes, 2025: no)."""

    # on what
    tasks: str = ""
    """Tasks with commas between; gsm8k*4 is seen four times as often, smoltalk[10000] in part."""
    val_tasks: str = ""
    """Tasks to measure on, of their test part (those that are trained on)."""
    packing: Literal["best-fit", "one-per-row", "stream"] | None = None
    """How conversations become rows (mid-training: stream; SFT: best-fit, 2025: one-per-row)."""
    epochs: float = 1.0
    """Passes over the conversations, where num_iterations is not given."""


# --- reinforcement learning -----------------------------------------------------------------------

Advantage = Literal["mean", "std"]
Normalisation = Literal["pass", "sequence", "token", "constant"]


@dataclass(frozen=True)
class Objective:
    """What is maximised; the defaults are the recipe's."""

    advantage: Advantage = "mean"
    """Reward less the mean of its question; std: also divided by the standard deviation."""
    normalisation: Normalisation = "pass"
    """What a token counts: 1 / tokens of its pass, its sequence, the step, or a constant."""
    samples_per_pass: int = 8
    """Answers to a question that make a pass (only the mathematics: it does not affect memory)."""
    max_new_tokens: int = 256
    """Longest answer, the calculator's part included."""
    clip: float = 0.0
    """PPO: how far the probability ratio may move; 0 is plain policy gradient."""
    clip_high: float | None = None
    """How far upwards, where that differs."""
    kl: float = 0.0
    """Weight of the divergence from the source model."""

    def __post_init__(self):
        if self.samples_per_pass < 1:
            raise ValueError(f"samples_per_pass must be at least 1, not {self.samples_per_pass}")
        for name in ("clip", "clip_high", "kl"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name} must not be negative, not {value}")
        if self.clip_high and not self.clip:
            raise ValueError("clip_high is the upper end of clip: give clip, too")


@dataclass(frozen=True)
class RlConfig(Objective, RunSettings):
    """Reinforcement learning: what scripts/rl.py trains, for what reward, and how it reports.

    The defaults are the original's; stages/policy.py has a table of other methods' settings.
    """

    device_batch_size: int = 8
    """Rows that a device trains on at a time; the first thing to halve when memory runs out."""
    slots: int = 128
    """Answers that all devices together generate at the same time; the second."""
    eval_every: int = 60
    """Steps between measurements of pass@k on held-out questions; 0: never."""
    eval_questions: int = 400
    """Questions of each measurement."""
    eval_samples: int = 8
    """Answers to each, and the largest k."""
    sample_every: int = 0
    """Steps between showing the most likely answers to two held-out questions; 0: never."""
    save_every: int = 60
    """Steps between checkpoints; 0: only at the end."""
    transcripts: int = 2
    """Questions of each step whose best and worst answer go to transcripts.jsonl."""

    # from what, on what
    source: str = ""
    """Run to start from, or its folder; empty is the fine-tuned run (sft) written to last."""
    source_step: str = "last"
    """Which of its checkpoints: a step, last or best."""
    task: str = "gsm8k"
    """Where the questions come from, and what judges the answers."""
    eval_task: str = ""
    """Where the held-out questions come from; empty is the test split of the same task."""
    epochs: int = 1
    """Passes over the questions, where num_iterations is not given."""

    # what a step is
    questions_per_step: int = 16
    """Different questions of a step."""
    samples: int = 16
    """Answers sampled for each; they are compared with one another."""
    temperature: float = 1.0
    """Sampling temperature of the answers."""
    top_k: int = 50
    """Tokens to choose among; 0: all."""
    updates: int = 1
    """Updates made with the answers of one step; more than one wants clip."""
    lr_frac: float = 0.05
    """First learning rates, as a share of the base model's; they fall linearly to 0."""
    grad_clip: float = 0.0
    """Largest global gradient norm; 0 is off."""

    def __post_init__(self):
        super().__post_init__()
        for name in (
            "questions_per_step", "samples", "max_new_tokens", "epochs", "updates",
            "device_batch_size", "slots", "eval_questions", "eval_samples",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.num_iterations is not None and self.num_iterations < 1:
            raise ValueError(f"num_iterations must be at least 1, not {self.num_iterations}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, not {self.seed}")
