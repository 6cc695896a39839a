"""Every metric of the service, in base units (seconds, tokens, bytes)."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
KIB = 1024
COUNTS = (0, 1, 2, 4, 8, 12, 16, 24, 32, 64, 128)


class Metrics:
    """The metrics of one server, in a registry of its own.

    Labels are bounded: a route is a path template (or `unmatched`), a base is a configured name,
    depths and layers are those of the bases. Adapter names are tenants' and never a label, but in the one
    series that is vLLM's.
    """

    def __init__(self) -> None:
        # Creation times double the number of series, and nothing here reads them.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._requests = self._counter("molex_requests", "Requests answered.", "route", "status")
        self._request_seconds = self._histogram(
            "molex_request_seconds", "Time of a request by stage.", SECONDS, "route", "stage"
        )
        self._first_token = self._histogram(
            "molex_time_to_first_token_seconds", "From request to first token.", SECONDS, "base"
        )
        self._inter_token = self._histogram(
            "molex_inter_token_seconds", "Between two tokens of a sequence.", SECONDS, "base"
        )
        self._queue_depth = self._gauge("molex_queue_depth", "Sequences that wait.", "base")
        self._running = self._gauge(
            "molex_running_sequences", "Generations between first and last token.", "base"
        )
        self._reused_tokens = self._counter(
            "molex_reused_tokens", "Prompt tokens whose keys and values were there already.", "base"
        )
        self._pages = self._gauge(
            "molex_kv_cache_pages", "Pages for keys and values, of 16 tokens each, by state.", "base", "state"
        )
        self._batch_tokens = self._histogram(
            "molex_batch_tokens", "Tokens in a forward pass.", TOKENS, "base"
        )
        self._batch_adapters = self._histogram(
            "molex_batch_distinct_adapters", "Adapters in a forward pass.", COUNTS, "base"
        )
        self._batch_layers = self._histogram(
            "molex_batch_distinct_layers", "Routed layers in a forward pass.", COUNTS, "base"
        )
        self._adapter_loads = self._counter(
            "molex_adapter_loads", "Adapter loads by result.", "base", "result"
        )
        self._cold_load_seconds = self._histogram(
            "molex_cold_load_seconds",
            "From the first mention of an evicted adapter until it is in memory.",
            SECONDS,
            "base",
            "result",
        )
        self._evictions = self._counter(
            "molex_adapter_evictions", "Adapters that left memory for others.", "base"
        )
        self._registered = self._gauge(
            "molex_registered_adapters", "Adapters that requests may name.", "base"
        )
        self._adapters = self._gauge("molex_resident_adapters", "Adapters in memory.", "base")
        self._bytes = self._gauge(
            "molex_memory_bytes", "Memory of weights, adapters, and keys and values.", "base", "kind"
        )
        peak = self._gauge("molex_peak_resident_memory_bytes", "Most memory that the process ever had.")
        peak.set_function(lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB)
        self._routes = self._counter("molex_route", "Layers chosen, by depth.", "base", "depth", "layer")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self._registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, text, labels, registry=self._registry, buckets=buckets)

    def render(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self._registry)

    def watch_base(
        self,
        base: str,
        *,
        waiting: Callable[[], int],
        running: Callable[[], int],
        registered: Callable[[], int],
        resident: Callable[[], int],
        pages: Mapping[str, Callable[[], int]],
        memory: Mapping[str, Callable[[], int]],
    ) -> None:
        """Read the gauges of a base from these functions whenever they are asked for.

        `pages`: of the key-value cache by state; `memory`: bytes by kind.
        """
        self._queue_depth.labels(base).set_function(waiting)
        self._running.labels(base).set_function(running)
        self._registered.labels(base).set_function(registered)
        self._adapters.labels(base).set_function(resident)
        self._reused_tokens.labels(base)
        for state, count in pages.items():
            self._pages.labels(base, state).set_function(count)
        for kind, count in memory.items():
            self._bytes.labels(base, kind).set_function(count)
        for result in ("loaded", "refused"):
            self._adapter_loads.labels(base, result)
        for result in ("loaded", "failed"):
            self._cold_load_seconds.labels(base, result)
        self._evictions.labels(base)

    def watch_gpu(self, *, allocated: Callable[[], int], peak: Callable[[], int]) -> None:
        """Read what tensors take of the GPU's memory, and the most they ever took, from these functions."""
        memory = self._gauge("molex_gpu_memory_bytes", "Memory of tensors on the GPU.", "kind")
        memory.labels("allocated").set_function(allocated)
        memory.labels("peak").set_function(peak)

    def watch_adapters(self, limit: int, in_use: Callable[[], tuple[list[str], list[str]]]) -> None:
        """Report vLLM's `vllm:lora_requests_info`, from the names of running and of waiting adapters."""
        self._registry.register(_LoraRequests(limit, in_use))

    def request(self, route: str, status: int, seconds: float) -> None:
        self._requests.labels(route, str(status)).inc()
        self.stage(route, "total", seconds)

    def stage(self, route: str, stage: str, seconds: float) -> None:
        self._request_seconds.labels(route, stage).observe(seconds)

    def first_token(self, base: str, seconds: float) -> None:
        self._first_token.labels(base).observe(seconds)

    def reused(self, base: str, tokens: int) -> None:
        self._reused_tokens.labels(base).inc(tokens)

    def next_token(self, base: str, seconds: float) -> None:
        self._inter_token.labels(base).observe(seconds)

    def batch(self, base: str, tokens: int, adapters: int, layers: int) -> None:
        self._batch_tokens.labels(base).observe(tokens)
        self._batch_adapters.labels(base).observe(adapters)
        self._batch_layers.labels(base).observe(layers)

    def adapter_load(self, base: str, result: str) -> None:
        self._adapter_loads.labels(base, result).inc()

    def cold_load(self, base: str, result: str, seconds: float) -> None:
        self._cold_load_seconds.labels(base, result).observe(seconds)

    def adapter_eviction(self, base: str) -> None:
        self._evictions.labels(base).inc()

    def routed(self, base: str, depth: int, layer: int) -> None:
        self._routes.labels(base, str(depth), str(layer)).inc()


class _LoraRequests(Collector):
    """vLLM's gauge, by which load balancers choose a replica: one series that says what is in use."""

    def __init__(self, limit: int, in_use: Callable[[], tuple[list[str], list[str]]]) -> None:
        self._limit = limit
        self._in_use = in_use

    def collect(self) -> Iterable[Metric]:
        running, waiting = self._in_use()
        family = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters in use, as vLLM reports them; the value is the time.",
            labels=("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        family.add_metric((str(self._limit), ",".join(running), ",".join(waiting)), time.time())
        return [family]
