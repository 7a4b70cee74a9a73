"""The metrics of simulated engines, with the names, labels and buckets of vLLM's.

Source: ``vllm/v1/metrics/loggers.py`` of vLLM 0.32.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.metrics import MetricWrapperBase

from .adapters import Adapters
from .engine import Engine, EngineRequest

M = TypeVar("M", bound=MetricWrapperBase)


def _buckets(line: str) -> tuple[float, ...]:
    return tuple(map(float, line.split()))


_TTFT = _buckets(
    "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10 20 40 80 160 640 2560"
)
_TOKEN = _buckets("0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1 2.5 5 7.5 10 20 40 80")
_REQUEST = _buckets("0.3 0.5 0.8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680")
_TRANSFER = _buckets("0.005 0.01 0.025 0.05 0.075 0.1 0.2 0.3 0.5 0.75 1 5")
_BYTES = tuple(float(2048 * 4**power) for power in range(12))


class Metrics:
    """Counts what happens to an engine's requests. Gauges are read from the engine at each scrape.

    Those of the engine with another ``rank`` stand on the page of those ``beside`` it.
    """

    def __init__(self, engine: Engine, model: str, rank: int = 0, beside: "Metrics | None" = None) -> None:
        self._engine = engine
        self._registry: CollectorRegistry = CollectorRegistry() if beside is None else beside._registry
        self._metrics: dict[str, MetricWrapperBase] = {} if beside is None else beside._metrics
        self._labels = {"engine": str(rank), "model_name": model}
        if beside is None:
            ProcessCollector(registry=self._registry)
        self._adapters: Gauge | None = None
        self._gauges()
        self._counters()
        self._histograms()

    def _make(self, kind: Callable[..., M], name: str, help: str, **options: Any) -> M:
        """Return a metric of one series."""
        metric: M = self._metric(kind, name, help, self._labels, **options)
        return metric.labels(**self._labels)

    def _metric(
        self, kind: Callable[..., M], name: str, help: str, labels: Iterable[str], **options: Any
    ) -> Any:
        """Return a metric, which another engine may have made."""
        if name not in self._metrics:
            made = kind(f"vllm:{name}", help, list(labels), registry=self._registry, **options)
            self._metrics[name] = made
        return self._metrics[name]

    def _family(
        self, kind: Callable[..., M], name: str, help: str, label: str, values: Iterable[str]
    ) -> dict[str, M]:
        """Return the series of a metric by the value of its label ``label``."""
        metric = self._metric(kind, name, help, [*self._labels, label])
        return {value: metric.labels(**self._labels, **{label: value}) for value in values}

    def _gauges(self) -> None:
        engine = self._engine
        self._make(Gauge, "num_requests_running", "Requests in the batch").set_function(
            lambda: engine.running
        )
        self._make(Gauge, "num_requests_waiting", "Requests waiting to be processed").set_function(
            lambda: engine.queued + engine.deferred
        )
        reasons = ("capacity", "deferred")
        waiting = self._family(
            Gauge, "num_requests_waiting_by_reason", "Requests waiting, why", "reason", reasons
        )
        waiting["capacity"].set_function(lambda: engine.queued)
        waiting["deferred"].set_function(lambda: engine.deferred)
        states = ("awake", "weights_offloaded", "discard_all")
        self._family(Gauge, "engine_sleep_state", "Engine sleep state", "sleep_state", states)["awake"].set(1)
        usage = self._make(Gauge, "kv_cache_usage_perc", "KV-cache usage; 1 is full")
        usage.set_function(lambda: engine.kv_usage)
        config = {
            "block_size": str(engine.profile.block_size),
            "enable_prefix_caching": str(engine.profile.prefix_caching),
            "engine": self._labels["engine"],
            "kv_cache_size_tokens": str(engine.profile.capacity),
            "num_gpu_blocks": str(engine.profile.num_blocks),
        }
        help = "Information of the LLMEngine CacheConfig"
        self._metric(Gauge, "cache_config_info", help, config).labels(**config).set(1)

    def _counters(self) -> None:
        make = self._make
        self._cache_queries = make(Counter, "prefix_cache_queries", "Prefix cache queries, in tokens")
        self._cache_hits = make(Counter, "prefix_cache_hits", "Prefix cache hits, in tokens")
        self._external_queries = make(
            Counter, "external_prefix_cache_queries", "Tokens asked of other instances"
        )
        self._external_hits = make(
            Counter, "external_prefix_cache_hits", "Tokens that came from other instances"
        )
        self._preemptions = make(Counter, "num_preemptions", "Preemptions")
        self._prompt_tokens = make(Counter, "prompt_tokens", "Prompt tokens processed")
        sources = ("local_compute", "local_cache_hit", "external_kv_transfer")
        self._by_source = self._family(
            Counter, "prompt_tokens_by_source", "Prompt tokens by source", "source", sources
        )
        self._generation_tokens = make(Counter, "generation_tokens", "Tokens generated")
        reasons = ("stop", "length", "abort", "error", "repetition")
        help = "Requests finished, by reason"
        self._success = self._family(Counter, "request_success", help, "finished_reason", reasons)
        self._failed_transfers = make(Counter, "nixl_num_failed_transfers", "NIXL transfers that failed")
        self._expired = make(Counter, "nixl_num_kv_expired_reqs", "Requests whose pinned KV expired")

    def _histograms(self) -> None:
        def make(name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
            return self._make(Histogram, name, help, buckets=buckets)

        self._ttft = make("time_to_first_token_seconds", "Time to first token", _TTFT)
        self._itl = make("inter_token_latency_seconds", "Time between tokens", _TOKEN)
        self._tpot = make(
            "request_time_per_output_token_seconds", "Time per output token of a request", _TOKEN
        )
        self._queue = make("request_queue_time_seconds", "Time in the WAITING phase", _REQUEST)
        self._prefill = make("request_prefill_time_seconds", "Time in the PREFILL phase", _REQUEST)
        self._decode = make("request_decode_time_seconds", "Time in the DECODE phase", _REQUEST)
        self._inference = make("request_inference_time_seconds", "Time in the RUNNING phase", _REQUEST)
        self._e2e = make("e2e_request_latency_seconds", "End to end request latency", _REQUEST)
        self._transfer_time = make("nixl_xfer_time_seconds", "Duration of NIXL KV transfers", _TRANSFER)
        self._transfer_bytes = make("nixl_bytes_transferred", "Bytes of a NIXL KV transfer", _BYTES)

    def adapters(self, adapters: Adapters) -> None:
        """Tell which LoRA adapters have requests now. A set that there was stays, with an older time."""
        names = ("max_lora", "waiting_lora_adapters", "running_lora_adapters")
        if self._adapters is None:
            help = "Running stats on lora requests."
            self._adapters = Gauge("vllm:lora_requests_info", help, names, registry=self._registry)
        values = (str(adapters.slots), ",".join(adapters.waiting()), ",".join(adapters.running()))
        self._adapters.labels(*values).set_to_current_time()

    def expose(self) -> bytes:
        """Return the metrics in Prometheus's text format."""
        return generate_latest(self._registry)

    def preempted(self, count: int) -> None:
        """Count preempted requests."""
        self._preemptions.inc(count)

    def expired(self, count: int) -> None:
        """Count hand-offs whose lease ended before they were fetched."""
        self._expired.inc(count)

    def token(self, request: EngineRequest, gap: float | None) -> None:
        """Count a token that came ``gap`` seconds after the one before it; None for the first."""
        self._generation_tokens.inc()
        if gap is not None:
            self._itl.observe(gap)
            return
        self._ttft.observe(request.last_token - request.arrived)
        self._prompt_tokens.inc(request.prompt_tokens)
        if self._engine.profile.prefix_caching:
            self._cache_queries.inc(request.prompt_tokens)
            self._cache_hits.inc(request.cached)
            self._by_source["local_cache_hit"].inc(request.cached)

    def prefilled(self, tokens: int, *, remote: bool) -> None:
        """Count prompt tokens whose KV was computed here or, with ``remote``, fetched."""
        self._by_source["external_kv_transfer" if remote else "local_compute"].inc(tokens)
        if remote:
            self._external_hits.inc(tokens)

    def finished(self, request: EngineRequest, reason: str) -> None:
        """Count a request by its finish reason and, if it succeeded, record its times."""
        self._success[reason].inc()
        if reason not in ("stop", "length") or request.started is None or request.first_token is None:
            return
        decode = request.last_token - request.first_token
        self._queue.observe(request.started - request.arrived)
        self._prefill.observe(request.first_token - request.started)
        self._decode.observe(decode)
        self._inference.observe(request.last_token - request.started)
        self._e2e.observe(request.last_token - request.arrived)
        self._tpot.observe(decode / max(1, request.generated - 1))

    def transferred(self, tokens: int, seconds: float) -> None:
        """Count a KV transfer that succeeded."""
        self._transfer_time.observe(seconds)
        self._transfer_bytes.observe(tokens * self._engine.profile.kv_bytes_per_token)

    def transfer_started(self, tokens: int) -> None:
        """Count prompt tokens whose KV is requested from another instance."""
        self._external_queries.inc(tokens)

    def transfer_failed(self) -> None:
        """Count a KV transfer that failed."""
        self._failed_transfers.inc()
