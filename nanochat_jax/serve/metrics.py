"""What /metrics tells Prometheus: queue, slots, tokens, latencies, requests by route and status."""

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


class Metrics:
    """The numbers of one server, in a registry of its own. Only its event loop writes them."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._mean_seconds = 1.0  # of the last requests
        self.registry = CollectorRegistry()
        self.speed = Speed()
        self.registry.register(SchedulerNumbers(scheduler, self.speed))
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


class Speed:
    """Tokens per second over the last ten seconds."""

    def __init__(self) -> None:
        self._counts: deque[tuple[float, int]] = deque()

    def add(self, tokens: int) -> None:
        self._counts.append((time.monotonic(), tokens))
        self._forget()

    def tokens_per_second(self) -> float:
        self._forget()
        return sum(tokens for _, tokens in self._counts) / SPEED_WINDOW

    def _forget(self) -> None:
        oldest = time.monotonic() - SPEED_WINDOW
        while self._counts and self._counts[0][0] < oldest:
            self._counts.popleft()


class SchedulerNumbers(Collector):
    """Reads the scheduler whenever somebody asks."""

    def __init__(self, scheduler: Scheduler, speed: Speed) -> None:
        self._scheduler, self._speed = scheduler, speed

    def collect(self) -> Iterator[Metric]:
        now = self._scheduler.stats()
        gauges = {
            "queued_requests": ("Requests that wait for a slot", now.queued),
            "slots": ("Samples that can be generated at a time", now.slots),
            "busy_slots": ("Samples that are being generated", now.busy_slots),
            "tokens_per_second": (
                "Tokens generated per second, over the last ten seconds",
                self._speed.tokens_per_second(),
            ),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"nanochat_{name}", text, value)
        counters = {
            "generated_tokens": ("Tokens generated", now.tokens_generated),
            "prompt_tokens": ("Tokens of prompts", now.prompt_tokens),
            "cached_prompt_tokens": ("Those taken from a kept cache", now.cached_prompt_tokens),
        }
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"nanochat_{name}", text, value)
