"""Prometheus metrics: what requests did, and what engine and store say of themselves at scrape time.

Invariant: labels come from fixed sets (tiers, outcomes, statuses, the store's own counter names); nothing of a tenant or
a request ever becomes one. Event loop only.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from appliance.errors import EngineError, Overloaded, RequestError
from appliance.runtime import Finished
from appliance.types import TierUsage

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TPOT_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2)

_COUNTER = re.compile(
    r'^(?P<name>[a-z][a-z0-9_]*?)(?:_total)?(?:\{(?P<labels>[a-z_]+="[^"]*"(?:,[a-z_]+="[^"]*")*)\})?$'
)
_LABEL = re.compile(r'([a-z_]+)="([^"]*)"')


@dataclass(frozen=True)
class Snapshot:
    """The appliance at one scrape."""

    tiers: Sequence[TierUsage]
    """hbm first."""
    counters: Mapping[str, float]
    """Monotonic, without the kvctl_ prefix; labels as `name{tier="nvme"}` (KVStore.counters)."""
    gauges: Mapping[str, float]
    """Without the kvctl_ prefix: running_requests, waiting_requests, resident_sequences, ..."""


class Metrics:
    """Counts requests as they end; `scrape` adds a fresh snapshot."""

    def __init__(self, snapshot: Callable[[], Awaitable[Snapshot]]) -> None:
        self._snapshot = snapshot
        self._state = _StateCollector()
        self._registry = CollectorRegistry()
        self._registry.register(self._state)
        registry = self._registry
        self._requests = Counter("kvctl_requests", "Generations by how they ended", ["outcome"], registry=registry)
        self._responses = Counter("kvctl_http_responses", "HTTP responses by status", ["status"], registry=registry)
        self._ttft = Histogram(
            "kvctl_ttft_seconds", "Time to first token, queueing included", buckets=TTFT_BUCKETS_S, registry=registry
        )
        self._tpot = Histogram(
            "kvctl_tpot_seconds", "Time per output token after the first", buckets=TPOT_BUCKETS_S, registry=registry
        )

    def finished(self, finished: Finished) -> None:
        self._requests.labels(finished.reason.value).inc()
        self._ttft.observe(finished.timings.ttft_ms / 1000)
        if finished.completion_tokens > 1:
            self._tpot.observe(finished.timings.predicted_ms / 1000 / (finished.completion_tokens - 1))

    def failed(self, error: Exception) -> None:
        outcomes = {RequestError: "refused", Overloaded: "overloaded", EngineError: "engine_error"}
        outcome = next((name for kind, name in outcomes.items() if isinstance(error, kind)), "error")
        self._requests.labels(outcome).inc()

    def cancelled(self) -> None:
        """By its client."""
        self._requests.labels("cancelled").inc()

    def responded(self, status: int) -> None:
        self._responses.labels(str(status)).inc()

    async def scrape(self) -> bytes:
        """Text exposition format."""
        self._state.snapshot = await self._snapshot()
        return generate_latest(self._registry)


class _StateCollector(Collector):
    """Renders the snapshot of the current scrape."""

    def __init__(self) -> None:
        self.snapshot = Snapshot((), {}, {})

    def collect(self) -> Iterable[Metric]:
        yield from self._tiers()
        yield from self._counters()
        for name, value in self.snapshot.gauges.items():
            yield GaugeMetricFamily(f"kvctl_{name}", _words(name), value=value)

    def _tiers(self) -> Iterable[Metric]:
        fields = {
            "tier_bytes": ("used_bytes", "Bytes held"),
            "tier_capacity_bytes": ("capacity_bytes", "Most bytes this tier may hold"),
            "tier_blocks": ("blocks", "Blocks held"),
            "tier_tokens": ("tokens", "Tokens held"),
            "tier_pending_blocks": ("pending_blocks", "Blocks on their way to this tier"),
            "tier_pending_bytes": ("pending_bytes", "KV bytes on their way to this tier"),
        }
        for name, (attribute, words) in fields.items():
            family = GaugeMetricFamily(f"kvctl_{name}", words, labels=["tier"])
            for tier in self.snapshot.tiers:
                family.add_metric([tier.tier.value], getattr(tier, attribute))
            yield family
        healthy = GaugeMetricFamily("kvctl_tier_healthy", "1 unless the tier is degraded or off", labels=["tier"])
        for tier in self.snapshot.tiers:
            healthy.add_metric([tier.tier.value], float(tier.state == "ok"))
        yield healthy

    def _counters(self) -> Iterable[Metric]:
        families: dict[str, CounterMetricFamily] = {}
        for key, value in self.snapshot.counters.items():
            match = _COUNTER.match(key)
            assert match, f"not a counter name: {key}"
            labels = dict(_LABEL.findall(match["labels"] or ""))
            name = match["name"]
            if name not in families:
                families[name] = CounterMetricFamily(f"kvctl_{name}", _words(name), labels=list(labels))
            families[name].add_metric(list(labels.values()), value)
        return families.values()


def _words(name: str) -> str:
    return name.replace("_", " ").capitalize()
