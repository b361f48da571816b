"""Continues a text with a base model.

    python scripts/generate.py --run d12 --prompt "The history of bread"
    python scripts/generate.py --run d12 --prompt FILE:start.txt --num-samples 4 --temperature 0.7
    python scripts/generate.py --run d12 --temperature 0 --max-tokens 200

A sample ends where the model begins another document, or after --max-tokens.
"""

from dataclasses import dataclass
from pathlib import Path

from nanochat_jax.checkpoint import load_model
from nanochat_jax.cli import run_script
from nanochat_jax.config import parse
from nanochat_jax.distributed import say, start
from nanochat_jax.engine.sampling import SamplingParams
from nanochat_jax.evals.generation import complete, completion_engine
from nanochat_jax.runs import run_folder


@dataclass(frozen=True)
class GenerateConfig:
    """What to generate, and how."""

    run: str = "d20"
    """Name of the run, or its folder."""
    step: str = "last"
    """Which checkpoint: a step, last or best."""
    prompt: str = ""
    """Text to continue, or FILE:path; empty begins a document."""
    num_samples: int = 1
    """Samples to write, each with its own random numbers."""
    max_tokens: int = 128
    """Largest number of new tokens per sample."""
    temperature: float = 0.8
    """0 takes the most likely token; higher is more varied."""
    top_k: int = 50
    """Sample among the k most likely tokens; 0: all."""
    seed: int = 42
    """Seed of the samples."""


def main() -> None:
    config = parse(GenerateConfig, "generate", description=__doc__)
    if config.num_samples < 1:
        raise ValueError(f"--num-samples must be at least 1, not {config.num_samples}")
    sampling = SamplingParams(config.temperature, config.top_k, seed=config.seed)
    prompt = config.prompt
    if prompt.startswith("FILE:"):
        path = Path(prompt.removeprefix("FILE:"))
        try:
            prompt = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not UTF-8 text") from None
    start()
    loaded = load_model(run_folder(config.run), config.step)
    prompts, tokenizer, new = [prompt] * config.num_samples, loaded.tokenizer, config.max_tokens
    engine = completion_engine(loaded.model, loaded.params, tokenizer, prompts, new)
    texts = complete(engine, tokenizer, prompts, max_new_tokens=new, sampling=sampling)
    for number, text in enumerate(texts):
        if config.num_samples > 1:
            say(f"--- sample {number + 1}")
        say(prompt + text)


if __name__ == "__main__":
    run_script(main)
