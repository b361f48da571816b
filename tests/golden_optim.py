"""Reading the golden optimizer and training files: configurations and arrays by name."""

from dataclasses import fields

import numpy as np

from nanochat_jax.gpt import GPTConfig
from nanochat_jax.optim import OptimConfig
from nanochat_jax.scaling import RECIPES, OptimSettings


def model_config(meta: dict, recipe: str) -> GPTConfig:
    return GPTConfig(recipe=recipe, **meta["config"])


def arrays(archive: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays stored under `prefix`, which ends in a slash, by torch name."""
    return {k.removeprefix(prefix): v for k, v in archive.items() if k.startswith(prefix)}


def for_recipe(recipe: str, num_iterations: int, **overrides) -> OptimConfig:
    """A recipe's numbers, not scaled to any depth, with `overrides`."""
    values = {f.name: getattr(RECIPES[recipe], f.name) for f in fields(OptimSettings)} | overrides
    return OptimConfig(recipe=recipe, num_iterations=num_iterations, **values)


def optim_config(meta: dict, recipe: str) -> OptimConfig:
    """The configuration the reference ran with, whatever the file calls its arguments."""
    overrides = dict(meta.get("setup_optimizer_kwargs") or meta["setup_optimizers_kwargs"])
    overrides |= meta.get("base_train_args") or meta["schedule_args"]
    if "warmup_ratio" in overrides:
        overrides["warmup_steps"] = round(overrides.pop("warmup_ratio") * meta["num_iterations"])
    if recipe == "2026":
        schedule = meta.get("per_step") or meta.get("schedule")
        if schedule:
            overrides["weight_decay"] = schedule[0]["muon_weight_decay"]
    if "per_step" in meta:
        # Whether the rates above already hold the factor of the batch shows in Muon's first rate.
        rates = [g["initial_lr"] for g in meta["per_step"][0]["groups"] if "momentum" in g]
        overrides["batch_lr_scale"] = rates[0] / overrides["matrix_lr"]
    return for_recipe(recipe, meta["num_iterations"], **overrides)
