"""Read vLLM's or SGLang's ``/metrics``: the few series a scheduler needs, under current and older names.

Whatever an instance says is data: each value has a type and a range, and what is outside is not believed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..models import InstanceRole, MetricsSnapshot

MAX_REQUESTS = 1e6
"""Requests that run, or wait, on an instance at most: a page with more is refused."""
MAX_CAPACITY = 1e10
"""Tokens in the KV cache at most."""
MAX_COUNT = 1e15
"""What has been counted since a server's start at most."""
_MAX_SECONDS = 86_400.0
"""Of a mean time. Nothing that a scheduler waits for takes a day."""
MAX_UNIX_TIME = 1e11
"""Of a server's start."""
_MAX_LINES = 100_000
_LONG_PAGE = 1 << 19
"""Bytes up to which lines are not counted: however many they are, they are read in a few milliseconds."""
_MAX_SERIES = 4096
"""Series that matter: some 20 for each engine."""
_MAX_LINE = 16_384
LATENCY_KEPT_S = 60.0
"""How long a latency counts when no further request ends. An instance that was slow once, while it compiled
say, would otherwise get no request that could show it to be fast."""

_GAUGES = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "kv_usage",
    "vllm:gpu_cache_usage_perc": "kv_usage",  # before vLLM 0.10
}
_LATENCY = {
    InstanceRole.PREFILL: ("vllm:time_to_first_token_seconds",),
    InstanceRole.ENCODE: ("vllm:time_to_first_token_seconds",),
    InstanceRole.DECODE: (
        "vllm:request_time_per_output_token_seconds",
        "vllm:time_per_output_token_seconds",  # its name in older releases
    ),
}
_STEP = (
    "vllm:inter_token_latency_seconds",
    "vllm:time_per_output_token_seconds",  # before the two were told apart
)
_TRANSFER = ("vllm:nixl_xfer_time_seconds",)
_BYTES = ("vllm:nixl_bytes_transferred",)
HISTOGRAMS = tuple(
    sorted({name for names in (*_LATENCY.values(), _STEP, _TRANSFER, _BYTES) for name in names})
)
"""Those that matter, in an order."""
_GENERATED = "vllm:generation_tokens_total"
_FINISHED = "vllm:request_success_total"
_STEPS = "vllm:iteration_tokens_total_count"
_FAILED = "vllm:nixl_num_failed_transfers_total"
_CACHE = "vllm:cache_config_info"
_START = "process_start_time_seconds"
_KV_TOKENS = "sglang:max_total_num_tokens"
_SGLANG = {
    "sglang:num_running_reqs": "vllm:num_requests_running",
    "sglang:num_queue_reqs": "vllm:num_requests_waiting",
    "sglang:token_usage": "vllm:kv_cache_usage_perc",
    "sglang:generation_tokens_total": _GENERATED,
    "sglang:num_requests_total": _FINISHED,
    _KV_TOKENS: _KV_TOKENS,
    **{
        f"sglang:{name}_{part}": f"vllm:{name}_{part}"
        for name in (
            "time_to_first_token_seconds",
            "inter_token_latency_seconds",
            "request_time_per_output_token_seconds",
        )
        for part in ("sum", "count")
    },
}
"""SGLang's series, and the names of vLLM's that they are read as; of the last one vLLM has labels."""
_WANTED = {
    _START, _GENERATED, _FINISHED, _FAILED, _STEPS, _CACHE, *_GAUGES,
    *(f"{name}_{part}" for name in HISTOGRAMS for part in ("sum", "count")),
}  # fmt: skip
_NAMES = {name.encode(): name for name in _WANTED} | {
    name.encode(): read_as for name, read_as in _SGLANG.items()
}
_PLAIN = [name for name in _WANTED if not name.startswith("vllm:")]
_OF_SGLANG = [name.removeprefix("sglang:") for name in _SGLANG]
_VLLM = [name.removeprefix("vllm:") for name in _WANTED if name.startswith("vllm:")]
# No possessive groups: Python 3.11.4 and before go on at a wrong place when one fails. Each label and escape
# can match in one way only, so the time is in proportion to the line without them.
_LABEL = r'[ \t]*+[A-Za-z_]\w*+[ \t]*+=[ \t]*+"[^"\\\n]*+(?:\\.[^"\\\n]*+)*"[ \t]*+'
_LABELS = rf"(?:\{{((?:{_LABEL},)*(?:{_LABEL})?)[ \t]*+\}}[ \t]*+)?"
_INFINITY = "[iI][nN][fF](?:[iI][nN][iI][tT][yY])?"
_NUMBER = rf"[+-]?(?:(?:\d++\.?+\d*+|\.\d++)(?:[eE][+-]?\d++)?|[nN][aA][nN]|{_INFINITY})"
_LINE = re.compile(
    rf"\n(vllm:(?:{'|'.join(_VLLM)})|sglang:(?:{'|'.join(_OF_SGLANG)})|{'|'.join(_PLAIN)})(?![\w:])"
    rf"(?:[ \t]*+{_LABELS}({_NUMBER})(?:[ \t][^\n]*+)?\r?(?=\n|\Z)|[^\n]*+)".encode()
)
"""Name, labels and value of a line that matters; no value if it cannot be read. Its time does not matter.

A page has some 600 lines, of which we want twenty: to find and read them takes 0.1 ms.
"""
_ADAPTERS = re.compile(
    rb"^vllm:lora_requests_info\{(.*)\} (\d{1,20}(?:\.\d{0,20})?(?:e\+?\d{1,3})?)\r?$", re.MULTILINE
)
_ADAPTER_LABEL = re.compile(rb'(?:^|,)[ \t]*(\w+)="([^"\\\n]*)"')
_MAX_ADAPTERS = 4096
"""Of one label that are read."""
_ENGINE_LABEL = re.compile(rb'(?:^|,)[ \t]*engine="(\d{1,4})"')
_CACHE_LABEL = re.compile(rb'(?:^|,)[ \t]*(block_size|num_gpu_blocks|kv_cache_size_tokens)="(\d{1,15})"')


@dataclass(frozen=True, slots=True)
class Scrape:
    """What a ``/metrics`` page says of a server, or of one of its engines.

    Gauges are over all of the engines, and histograms are ``(sum, count)``.
    """

    running: float
    waiting: float
    kv_usage: float
    histograms: dict[str, tuple[float, float]]
    started_at: float | None = None
    """Start time of the server's process, Unix seconds."""
    kv_capacity: float | None = None
    """Tokens that the KV cache holds, all engines together."""
    generated: float = 0.0
    """Tokens generated since the start."""
    finished: float = 0.0
    """Requests that ended since the start."""
    steps: float = 0.0
    """Steps of the engine since the start; 0 if it does not count them."""
    failed_transfers: float | None = None
    """KV transfers that have failed since the start; ``None`` if it does not count them."""
    adapters: tuple[str, ...] = ()
    """LoRA adapters of requests that wait, then those of requests that run."""
    adapter_slots: int = 0
    """LoRA adapters that it holds at once; 0 if it does not say."""


_Sample = tuple[str, bytes, float]
"""Name, labels, value."""


class NotVllmMetrics(ValueError):
    """The page has none of the series that every vLLM server, or SGLang, exposes."""


class OtherEngines(NotVllmMetrics):
    """The page is of a server with another number of engines than is configured."""


def parse_metrics(page: bytes | str) -> Scrape:
    """Parse a Prometheus text page of a vLLM or SGLang server.

    Requests of several engines (data parallel) are summed, their KV use averaged. A number that makes no
    sense is left out. Raises :exc:`NotVllmMetrics` if the page is of something else, cannot be parsed, or
    has numbers of requests that make no sense.
    """
    data = page.encode(errors="replace") if isinstance(page, str) else page
    samples = list(_samples(data))
    return _scrape(samples, len([name for name, *_ in samples if name == _CACHE]), *_adapters(data))


def parse_ranks(page: bytes, size: int) -> list[Scrape]:
    """Parse the page of a server with ``size`` engines: what it says of each, by the label ``engine``.

    The labels of a node with hybrid load balancing begin where that node's engines do. What has no label is
    of all. Raise as :func:`parse_metrics`, also if it has more engines or fewer.
    """
    shared: list[_Sample] = []
    ranks: dict[int, list[_Sample]] = {}
    for sample in _samples(page):
        engine = _ENGINE_LABEL.search(sample[1])
        (shared if engine is None else ranks.setdefault(int(engine[1]), [])).append(sample)
    first = min(ranks, default=0)
    if sorted(ranks) != list(range(first, first + size)):
        told = f"engine {', '.join(map(str, sorted(ranks)))}" if ranks else "no engine"
        raise OtherEngines(
            f"it tells of {told}, and the data_parallel_size of the instance is {size}: give how many it has"
        )
    adapters = _adapters(page)
    return [_scrape(shared + ranks[first + rank], size, *adapters) for rank in range(size)]


def _scrape(samples: Iterable[_Sample], engines: int, adapters: tuple[str, ...], slots: int) -> Scrape:
    """Return what series say, of one of ``engines`` or of all."""
    values: dict[str, list[float]] = {}
    capacity = 0.0
    for name, labels, value in samples:
        if name == _CACHE:
            capacity += _kv_tokens(labels, engines)
        elif name == _KV_TOKENS:
            capacity += value if 0.0 <= value <= MAX_CAPACITY else 0.0
        elif _GAUGES.get(name) in ("running", "waiting") and not 0.0 <= value <= MAX_REQUESTS:
            raise NotVllmMetrics(f"{name} is {value:g}: not a number of requests")
        elif math.isfinite(value):  # a NaN would win or lose every comparison
            values.setdefault(name, []).append(value)
    gauges: dict[str, list[float]] = {}
    for name, key in _GAUGES.items():
        if key not in gauges and name in values:
            gauges[key] = values[name]
    if "running" not in gauges and "waiting" not in gauges:
        raise NotVllmMetrics(
            "it has no vllm:num_requests_running: is this a vLLM server, or SGLang with --enable-metrics?"
        )
    kv_usage = [min(max(0.0, each), 1.0) for each in gauges.get("kv_usage", [0.0])]
    counts = {name: sum(each) for name, each in values.items() if min(each) >= 0.0}
    counts = {name: count for name, count in counts.items() if count <= MAX_COUNT}
    histograms = {
        name: (counts[f"{name}_sum"], counts[f"{name}_count"])
        for name in HISTOGRAMS
        if f"{name}_sum" in counts and f"{name}_count" in counts
    }
    started = values.get(_START, [0.0])[0]
    return Scrape(
        min(sum(gauges.get("running", [])), MAX_REQUESTS),
        min(sum(gauges.get("waiting", [])), MAX_REQUESTS),
        sum(kv_usage) / len(kv_usage),
        histograms,
        started if 0.0 < started < MAX_UNIX_TIME else None,
        min(capacity, MAX_CAPACITY) or None,
        counts.get(_GENERATED, 0.0),
        counts.get(_FINISHED, 0.0),
        counts.get(_STEPS, 0.0),
        counts.get(_FAILED),
        adapters,
        slots,
    )


def _adapters(page: bytes) -> tuple[tuple[str, ...], int]:
    """Return the LoRA adapters in use, and how many the instance holds at once.

    vLLM makes a series of each set of adapters that there ever was, with the time as its value: the newest
    one tells of now.
    """
    if b"\nvllm:lora_requests_info{" not in page:
        return (), 0
    newest = max(_ADAPTERS.finditer(page), key=lambda line: float(line[2]), default=None)
    if newest is None:
        return (), 0
    labels = {key: value.decode(errors="replace") for key, value in _ADAPTER_LABEL.findall(newest[1])}
    names = [labels.get(b"waiting_lora_adapters", ""), labels.get(b"running_lora_adapters", "")]
    adapters = [name.strip() for each in names for name in each.split(",")[:_MAX_ADAPTERS]]
    slots = labels.get(b"max_lora", "")
    return tuple(filter(None, adapters)), int(slots) if slots.isdecimal() and len(slots) <= 4 else 0


def _samples(page: bytes) -> Iterator[_Sample]:
    """Yield name, labels and value of each series that matters, once however often it is there."""
    if len(page) > _LONG_PAGE and page.count(b"\n") > _MAX_LINES:
        raise NotVllmMetrics(f"it has more than {_MAX_LINES} lines")
    seen: set[tuple[bytes, bytes | None]] = set()
    for number, line in enumerate(_LINE.finditer(b"\n" + page)):
        if number == _MAX_SERIES:
            raise NotVllmMetrics(f"it has more than {_MAX_SERIES} series of engines")
        name, labels, value = line.groups()
        if value is None or line.end() - line.start() > _MAX_LINE:
            raise NotVllmMetrics(f"it cannot be parsed: {line[0][1:81].decode(errors='replace')!r}")
        if (name, labels) not in seen:
            seen.add((name, labels))
            yield _NAMES[name], labels or b"", float(value)


def _kv_tokens(labels: bytes, engines: int) -> float:
    """Return the tokens that one engine's KV cache holds; 0 if its labels do not say.

    Of several engines, each says how many blocks all of them have together. Blocks times their size is more
    than that for a model in which some layers need less than a block for as many tokens: there vLLM says how
    many tokens it is. It says "None" until it has measured its memory.
    """
    found = {key: int(value) for key, value in _CACHE_LABEL.findall(labels)}
    blocks = found.get(b"num_gpu_blocks", 0) // engines
    tokens = found.get(b"kv_cache_size_tokens") or found.get(b"block_size", 0) * blocks
    return float(tokens) if tokens <= MAX_CAPACITY else 0.0


def snapshot(
    scrape: Scrape, before: Scrape | None, last: MetricsSnapshot | None, role: InstanceRole, now: float
) -> MetricsSnapshot:
    """Return what ``scrape`` says at time ``now``, the latency being that of the requests since ``before``.

    If none ended in between, the ``last`` known latency stays for ``LATENCY_KEPT_S``; if the counters went
    back, which means a restart, there is none.
    """
    latency, latency_at = None, None
    seen = _since(scrape, before, _LATENCY[role])
    if seen is not None and seen.count != 0:
        latency = seen.mean
        latency_at = None if latency is None else now
    elif last is not None and last.latency is not None:
        since = last.taken_at if last.latency_at is None else last.latency_at
        if now - since <= LATENCY_KEPT_S:
            latency, latency_at = last.latency, since
    step, transfer = _since(scrape, before, _STEP), _since(scrape, before, _TRANSFER)
    restarted = before is None or scrape.generated < before.generated or scrape.finished < before.finished
    return MetricsSnapshot(
        now,
        scrape.running,
        scrape.waiting,
        scrape.kv_usage,
        latency,
        scrape.kv_capacity,
        step.mean if step else None,
        0.0 if restarted or before is None else scrape.generated - before.generated,
        0.0 if restarted or before is None else scrape.finished - before.finished,
        transfer.mean if transfer else None,
        _rate(_since(scrape, before, _BYTES), transfer),
        _new_failures(scrape, before),
        latency_at,
        scrape.adapters,
        scrape.adapter_slots,
    )


@dataclass(frozen=True, slots=True)
class _Since:
    """What a histogram counted between two scrapes; a negative count means that it began anew."""

    total: float
    count: float

    @property
    def mean(self) -> float | None:
        mean = max(0.0, self.total) / self.count if self.count > 0 else math.inf
        return mean if mean <= _MAX_SECONDS else None


def _new_failures(scrape: Scrape, before: Scrape | None) -> float | None:
    """Return the transfers that have failed between two scrapes; ``None`` if that is not known."""
    if scrape.failed_transfers is None or before is None or before.failed_transfers is None:
        return None
    return max(0.0, scrape.failed_transfers - before.failed_transfers)


def _rate(size: _Since | None, seconds: _Since | None) -> float | None:
    """Return the bytes a second of what was transferred between two scrapes."""
    if size is None or seconds is None or size.count <= 0 or seconds.total <= 0 or size.total < 0:
        return None
    return size.total / seconds.total


def _since(scrape: Scrape, before: Scrape | None, names: tuple[str, ...]) -> _Since | None:
    """Return the difference of the first histogram that both scrapes have."""
    for name in names:
        if before is not None and name in scrape.histograms and name in before.histograms:
            total, count = scrape.histograms[name]
            total_before, count_before = before.histograms[name]
            return _Since(total - total_before, count - count_before)
    return None
