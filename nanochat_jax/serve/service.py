"""What the routes work with: the model, the scheduler and the thread that it runs in."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from nanochat_jax.engine.scheduler import Scheduler
from nanochat_jax.serve.metrics import Metrics
from nanochat_jax.serve.settings import ServeConfig
from nanochat_jax.serve.text import prompt_format
from nanochat_jax.tokenizer import Tokenizer

# The settings that /v1/models lists as the limits of a request.
LIMITS = (
    *("max_messages", "max_message_chars", "max_chars", "max_prompts", "max_n"),
    *("max_new_tokens", "max_temperature", "max_top_k"),
)

log = logging.getLogger(__name__)


class Worker:
    """The thread in which the scheduler compiles its programs and then runs."""

    def __init__(self, scheduler: Scheduler, progress: Callable[[str], object]) -> None:
        self.phase: Literal["warming up", "ready", "stopped", "failed"] = "warming up"
        self._scheduler, self._progress = scheduler, progress
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, seconds: float = 30.0) -> None:
        """Waits for the round, or the compilation, that is under way; not for ever."""
        self._stop.set()
        self._thread.join(seconds)

    def _run(self) -> None:
        try:
            self._scheduler.engine.warm_up(self._report)
            self.phase = "ready"
            self._progress("ready")
            self._scheduler.run(self._stop)
            self.phase = "stopped"
        except _WarmUpCancelled:
            self.phase = "stopped"
        except Exception:
            self.phase = "failed"
            log.exception("the engine has failed; nothing can be generated until a restart")

    def _report(self, text: str) -> None:
        if self._stop.is_set():
            raise _WarmUpCancelled
        self._progress(text)


class _WarmUpCancelled(Exception):
    """Ends the warm-up early."""


class Service:
    """One server: a model with a name, its scheduler, what runs now, and whether it is ending."""

    def __init__(
        self,
        scheduler: Scheduler,
        tokenizer: Tokenizer,
        meta: Mapping[str, Any],
        config: ServeConfig,
        progress: Callable[[str], object],
    ) -> None:
        self.scheduler, self.tokenizer, self.config = scheduler, tokenizer, config
        self.worker = Worker(scheduler, progress)
        self.metrics = Metrics(scheduler)
        self.running: set[Callable[[], None]] = set()  # what cancels each answer
        self.draining = False
        self.model_id = Path(config.run).resolve().name
        self.prompt_format = prompt_format(meta)
        self.context = scheduler.engine.capacity  # tokens of a prompt and its answer together
        self.model = {  # as /v1/models shows it
            "id": self.model_id,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "nanochat_jax",
            "stage": self.prompt_format,
            "step": meta.get("step"),
            "context": self.context,
            "val_bpb": meta.get("val_bpb"),
            "limits": {name: getattr(config, name) for name in LIMITS},
        }

    def cancel_all(self) -> None:
        for cancel in list(self.running):
            cancel()
