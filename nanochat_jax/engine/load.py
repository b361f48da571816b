"""From a checkpoint to a scheduler that generates."""

from jax.sharding import Mesh

from nanochat_jax.checkpoint import LoadedModel
from nanochat_jax.engine.engine import make_engine
from nanochat_jax.engine.scheduler import Scheduler
from nanochat_jax.engine.tools import Tools


def make_scheduler(
    loaded: LoadedModel,
    *,
    slots: int = 8,
    chunk: int = 16,
    max_queue: int = 64,
    mesh: Mesh | None = None,
) -> Scheduler:
    """A scheduler with the calculator, for what `load_model` (without a mesh) has read."""
    engine = make_engine(loaded.model, loaded.params, slots=slots, chunk=chunk, mesh=mesh)
    return Scheduler(engine, tools=Tools(loaded.tokenizer), max_queue=max_queue)
