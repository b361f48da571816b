"""Pretrains a base model: text in, checkpoints out. One dial, --depth, decides the rest.

    python scripts/pretrain.py --config cpu                    # a small one, on any machine
    python scripts/pretrain.py --depth=12 --dataset=fineweb-edu
    python scripts/pretrain.py --config=runs/d12/config.toml --resume
    srun --gpus-per-task=1 python scripts/pretrain.py --depth=24 --target-param-data-ratio=8

Needs a tokenizer (scripts/tok_train.py) and a data set (scripts/download.py). Everything goes to
runs/NAME: checkpoints, metrics.jsonl, the configuration, the tokenizer. SIGTERM and Ctrl-C save and
end the run; --resume continues it, bit for bit on as many CPU cores.
"""

import sys

from nanochat_jax.cli import run_script
from nanochat_jax.config import parse
from nanochat_jax.distributed import start
from nanochat_jax.stages.pretraining import pretrain
from nanochat_jax.stages.settings import PretrainConfig


def main() -> None:
    config = parse(PretrainConfig, "pretrain", description=__doc__)
    start()
    sys.exit(pretrain(config))


if __name__ == "__main__":
    run_script(main)
