"""Reinforcement learning: the model answers questions, and right answers become more likely.

    python scripts/rl.py --source d20-sft                       # GSM8K, as the original did
    python scripts/rl.py --source cpu-sft --task spelling-local --num-iterations 50
    python scripts/rl.py --config=runs/d20-rl/config.toml --resume
    python scripts/rl.py --advantage std --normalisation sequence --clip 0.2 --kl 0.04   # GRPO

Needs a fine-tuned run (scripts/sft.py) and the task's data (scripts/prefetch.py). Everything goes
to runs/NAME: checkpoints, metrics.jsonl, transcripts.jsonl. SIGTERM and Ctrl-C save and end the
run; --resume continues it, bit for bit on as many CPU cores.
"""

import sys

from nanochat_jax.cli import run_script
from nanochat_jax.config import parse
from nanochat_jax.distributed import start
from nanochat_jax.stages.rl import reinforce
from nanochat_jax.stages.settings import RlConfig


def main() -> None:
    config = parse(RlConfig, "rl", description=__doc__)
    start()
    sys.exit(reinforce(config))


if __name__ == "__main__":
    run_script(main)
