"""What the routes work with: the model, the scheduler and the thread that it runs in."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nanochat_jax.engine.scheduler import Scheduler
from nanochat_jax.serve.metrics import Metrics
from nanochat_jax.serve.settings import ServeConfig
from nanochat_jax.serve.text import PromptFormat, prompt_format
from nanochat_jax.tokenizer import Tokenizer

type Phase = Literal["warming up", "ready", "stopped", "failed"]

log = logging.getLogger(__name__)


class Worker:
    """The thread in which the scheduler compiles its programs and then runs."""

    def __init__(self, scheduler: Scheduler, progress: Callable[[str], object]) -> None:
        self.phase: Phase = "warming up"
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
            self._scheduler.engine.warm_up(self._tell)
            self.phase = "ready"
            self._progress("ready")
            self._scheduler.run(self._stop)
            self.phase = "stopped"
        except _WarmUpCancelled:
            self.phase = "stopped"
        except Exception:
            self.phase = "failed"
            log.exception("the engine has failed; nothing can be generated until a restart")

    def _tell(self, text: str) -> None:
        if self._stop.is_set():
            raise _WarmUpCancelled
        self._progress(text)


class _WarmUpCancelled(Exception):
    """Ends the warm-up early."""


@dataclass
class Service:
    """One server: a model with a name, its scheduler, what runs now, and whether it is ending."""

    scheduler: Scheduler
    tokenizer: Tokenizer
    meta: Mapping[str, Any]
    config: ServeConfig
    worker: Worker
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))
    running: set[Callable[[], None]] = field(default_factory=set)  # what cancels each answer
    draining: bool = False

    @property
    def model_id(self) -> str:
        return Path(self.config.run).resolve().name

    @property
    def prompt_format(self) -> PromptFormat:
        return prompt_format(self.meta)

    @property
    def context(self) -> int:
        """Tokens of a prompt and its answer together."""
        return self.scheduler.engine.capacity

    def model(self) -> dict[str, Any]:
        """The model object of /v1/models."""
        return {
            "id": self.model_id,
            "object": "model",
            "created": self.created,
            "owned_by": "nanochat_jax",
            "stage": self.prompt_format,
            "step": self.meta.get("step"),
            "context": self.context,
            "val_bpb": self.meta.get("val_bpb"),
        }

    def cancel_all(self) -> None:
        for cancel in list(self.running):
            cancel()
