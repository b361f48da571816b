"""The settings of reinforcement learning."""

from dataclasses import dataclass
from typing import Literal

from nanochat_jax.rl import Advantage, Normalisation, Objective


@dataclass(frozen=True)
class RlConfig:
    """Reinforcement learning: what scripts/rl.py trains, for what reward, and how it reports.

    The defaults are the original's; rl.py has a table of other methods' settings.
    """

    run: str = ""
    """Name of the run: everything goes to runs/NAME; empty is the source's with -rl."""
    resume: bool = False
    """Continue the run from its last checkpoint (from the start where it has none)."""
    overwrite: bool = False
    """Delete the run of this name and start it again."""

    # from what, on what
    source: str = ""
    """Run to start from, or its folder; empty is the fine-tuned run (sft) written to last."""
    source_step: str = "last"
    """Which of its checkpoints: a step, last or best."""
    task: str = "gsm8k"
    """Where the questions come from, and what judges the answers."""
    eval_task: str = ""
    """Where the held-out questions come from; empty is the test split of the same task."""

    # what a step is
    questions_per_step: int = 16
    """Different questions of a step."""
    samples: int = 16
    """Answers drawn to each; they are compared with one another."""
    max_new_tokens: int = 256
    """Longest answer, the calculator's part included."""
    temperature: float = 1.0
    """Of the answers drawn."""
    top_k: int = 50
    """Tokens to choose among; 0: all."""
    num_iterations: int | None = None
    """Steps; else as many as make `epochs` passes over the questions."""
    epochs: int = 1
    """Passes over the questions."""

    # what is learned from it
    lr_frac: float = 0.05
    """First learning rates, as a share of the base model's; they fall to 0 in a line."""
    grad_clip: float = 0.0
    """Largest global gradient norm; 0 is off."""
    updates: int = 1
    """Updates made with the answers of one step; more than one wants clip."""
    advantage: Advantage = "mean"
    """Reward less the mean of its question; std: also divided by the standard deviation."""
    normalisation: Normalisation = "pass"
    """What a token counts: 1 / tokens of its pass, its sequence, the step, or a constant."""
    samples_per_pass: int = 8
    """Answers to a question that make a pass (only the mathematics: memory is no concern of it)."""
    clip: float = 0.0
    """PPO: how far the probability ratio may move; 0 is plain policy gradient."""
    clip_high: float | None = None
    """How far upwards, where that differs."""
    kl: float = 0.0
    """Weight of the divergence from the source model."""
    seed: int = 42
    """Seed of the answers."""

    # where
    device_batch_size: int = 8
    """Rows that a device trains on at once; the first thing to halve when memory runs out."""
    slots: int = 128
    """Answers that all devices together write at once; the second."""
    n_devices: int | None = None
    """Devices to use (all)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type: bfloat16 on accelerators, float32 on a CPU."""
    attention: Literal["auto", "blocked", "cudnn"] = "auto"
    """Attention kernel: cudnn on an NVIDIA GPU with bfloat16, else blocked."""

    # looking at it
    eval_every: int = 60
    """Steps between measurements of pass@k on held-out questions; 0: never."""
    eval_questions: int = 400
    """Questions of each."""
    eval_samples: int = 8
    """Answers to each, and the largest k."""
    sample_every: int = 0
    """Steps between showing the likeliest answers to two held-out questions; 0: never."""
    transcripts: int = 2
    """Questions of each step whose best and worst answer go to transcripts.jsonl."""
    save_every: int = 60
    """Steps between checkpoints; 0: only at the end."""
    keep_last: int = 2
    """Checkpoints kept."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Also report to Weights & Biases; offline writes into the run's folder."""

    def __post_init__(self):
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
        self.objective()

    def objective(self) -> Objective:
        return Objective(
            advantage=self.advantage,
            normalisation=self.normalisation,
            samples_per_pass=self.samples_per_pass,
            max_new_tokens=self.max_new_tokens,
            clip=self.clip,
            clip_high=self.clip_high,
            kl=self.kl,
        )
