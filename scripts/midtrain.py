"""Mid-training: a base model reads conversations and tasks as it read text before.

    python scripts/midtrain.py                               # the newest base model
    python scripts/midtrain.py --source d20 --tasks smoltalk,mmlu-aux,gsm8k
    python scripts/midtrain.py --config runs/d20-mid/config.toml --resume

The second stage of 2025's recipe; scripts/sft.py is the third. Without --tasks it takes those of
the recipe where their data is there (scripts/prefetch.py), and otherwise tasks that the program
makes itself. Everything goes to runs/NAME (d20 gives d20-mid). SIGTERM and Ctrl-C save and end the
run; --resume continues it, bit for bit on as many CPU cores.
"""

import sys

from nanochat_jax.cli import run_script
from nanochat_jax.config import parse
from nanochat_jax.distributed import start
from nanochat_jax.stages.finetuning import finetune
from nanochat_jax.stages.settings import FinetuneConfig


def main() -> None:
    config = parse(FinetuneConfig, "midtrain", description=__doc__)
    start()
    sys.exit(finetune("midtrain", config))


if __name__ == "__main__":
    run_script(main)
