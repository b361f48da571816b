"""nanochat_jax: the whole life of a ChatGPT-like model in one small JAX/Flax code base."""
