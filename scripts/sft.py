"""Supervised fine-tuning: a base or mid-trained model learns to answer.

    python scripts/sft.py                                    # the newest run that fits
    python scripts/sft.py --source d24 --tasks "smoltalk,mmlu-aux*3,gsm8k*4"
    python scripts/sft.py --source cpu --tasks arithmetic,identity-local
    python scripts/sft.py --source d24 --tasks json:my.jsonl --run mine
    python scripts/sft.py --config runs/d24-sft/config.toml --resume

json:FILE is a file of conversations, one in each line or all in one JSON array, plain, .gz or .zst:
OpenAI messages ({"messages": [{"role": "user", "content": "Hi"}, …]}; an answer of "weight": 0 is
not learned), ShareGPT ({"conversations": [{"from": "human", "value": "Hi"}, …]}), Alpaca
(instruction, input, output) or prompt and completion. What cannot be honoured, such as tool calls,
images and preferences, is refused by name; without a validation file of its own (--val-tasks) the
last twentieth is kept for validation. A name with commas, brackets or asterisks is quoted:
--tasks 'json:"one, two.jsonl"*2,gsm8k'.

Without --tasks it takes those of the recipe where their data is there (scripts/prefetch.py), and
otherwise tasks that the program makes itself. Everything goes to runs/NAME (d24 gives d24-sft).
SIGTERM and Ctrl-C save and end the run; --resume continues it, bit for bit on as many CPU cores.
"""

import sys

from nanochat_jax.cli import run_script
from nanochat_jax.config import parse
from nanochat_jax.distributed import start
from nanochat_jax.stages.finetuning import finetune
from nanochat_jax.stages.settings import FinetuneConfig


def main() -> None:
    config = parse(FinetuneConfig, "sft", description=__doc__)
    start()
    sys.exit(finetune("sft", config))


if __name__ == "__main__":
    run_script(main)
