"""Parameters of a model in which nothing is zero, so that every path carries signal."""

import numpy as np

from nanochat_jax.gpt import GPTConfig, param_shapes


def random_params(config: GPTConfig, scale: float = 0.3) -> dict[str, np.ndarray]:
    """Normal float32 parameters: without JAX, so nothing is compiled for them."""
    rng = np.random.default_rng(0)
    shapes = param_shapes(config).items()
    return {name: rng.normal(0, scale, s.shape).astype(np.float32) for name, s in shapes}
