"""The metrics for Prometheus: queue, slots, tokens, latencies, requests by route and status."""

import math
import time
from collections import deque
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from nanochat_jax.engine.scheduler import Scheduler

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SPEED_WINDOW = 10.0  # seconds

TTFT_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TPOT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28)


class Metrics(Collector):
    """The numbers of one server, in its own registry. Only its event loop writes them; those of the
    scheduler are read whenever somebody asks."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._mean_seconds = 1.0  # of the last requests
        self._recent: deque[tuple[float, int]] = deque()  # when, how many tokens
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self.requests = Counter(
            "nanochat_requests", "Requests answered", ("route", "status"), registry=self.registry
        )
        self.time_to_first_token = Histogram(
            "nanochat_time_to_first_token_seconds",
            "From the arrival of a request to its first token",
            buckets=TTFT_SECONDS,
            registry=self.registry,
        )
        self.time_per_token = Histogram(
            "nanochat_time_per_output_token_seconds",
            "Mean time between the tokens of an answer after the first",
            buckets=TPOT_SECONDS,
            registry=self.registry,
        )

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def request_took(self, seconds: float) -> None:
        self._mean_seconds += 0.1 * (seconds - self._mean_seconds)

    def retry_after(self) -> int:
        """Seconds in which about half of the queue will have been served; 1 to 60."""
        now = self._scheduler.stats()
        wait = now.queued / 2 * self._mean_seconds / now.slots
        return min(max(math.ceil(wait), 1), 60)

    def count_tokens(self, tokens: int) -> None:
        """Tokens that were generated just now, for the speed over the last ten seconds."""
        self._recent.append((time.monotonic(), tokens))
        self._forget_old()

    def _forget_old(self) -> None:
        oldest = time.monotonic() - SPEED_WINDOW
        while self._recent and self._recent[0][0] < oldest:
            self._recent.popleft()

    def collect(self) -> Iterator[Metric]:
        """The numbers that are read from the scheduler, and the speed."""
        now = self._scheduler.stats()
        self._forget_old()
        speed = sum(tokens for _, tokens in self._recent) / SPEED_WINDOW
        for kind, name, text, value in (
            (GaugeMetricFamily, "queued_requests", "Requests that wait for a slot", now.queued),
            (GaugeMetricFamily, "slots", "Samples that can be generated at a time", now.slots),
            (GaugeMetricFamily, "busy_slots", "Samples being generated", now.busy_slots),
            (GaugeMetricFamily, "tokens_per_second", "Speed over the last ten seconds", speed),
            (CounterMetricFamily, "generated_tokens", "Tokens generated", now.tokens_generated),
            (CounterMetricFamily, "prompt_tokens", "Tokens of prompts", now.prompt_tokens),
            (
                CounterMetricFamily,
                "cached_prompt_tokens",
                "Prompt tokens taken from a kept cache",
                now.cached_prompt_tokens,
            ),
        ):
            yield kind(f"nanochat_{name}", text, value)
