"""What a scheduler has seen of its fleet and its traffic, as far as an advice is made of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..fleet.endpoint import Endpoint
from ..fleet.registry import Registry
from ..models import PD_ROLES, InstanceRole
from ..records.traffic import Recorded
from ..replay.result import percentile
from ..router import PDRouter
from .question import Learned, Question, Size
from .seen import Seen, seen_by

LEAST_REQUESTS = 100
"""Requests of which an advice can be made, at least: a choice. Ten of them are above the 90th percentile."""
LEAST_SECONDS = 60.0
"""Seconds from the first of them to the last, at least: a choice. The load of less is an accident."""
LEAST_PREFILLS = 20
"""Samples that the load model must have of prefills,"""
LEAST_STEPS = 10
"""and of decode steps."""
MOST_ENGINES = 256
"""Of a larger fleet the replay would take too long."""
MOST_MOVES = 4
"""Instances whose move is tried, in each direction."""
_LEAD_ANSWERS = 2.0
"""An answer's time that the requests begin earlier than those that count: a choice. Most are shorter."""
_NEARLY_ALL = 1.2
"""Up to so many times as many requests as this scheduler has seen end, it takes it that it has seen all.

The instances tell at another time than Envoy, and count requests of ours that it counts as failed.
"""
_MOST_RATE = 100.0
_MOST_KV_TOKENS = 1e7
"""Tokens of a KV cache at most, and of one whose size is not known. More would only take memory."""

_SETTINGS = (
    "disaggregation", "late_binding", "max_waiting", "max_kv_usage", "max_in_flight_tokens", "queue_size",
    "queue_timeout", "health_check_interval", "ttft_slo", "tpot_slo", "load_weight", "kv_cache_weight",
    "latency_weight",
)  # fmt: skip
"""Keys of the configuration that the replay follows."""


class Unknown(Exception):
    """No advice can be given; the message says why, and what to do."""


@dataclass(frozen=True, slots=True)
class Observation:
    """The question, the requests, and what people are told of them. Times are in seconds."""

    question: Question
    asked: Size | None
    """Another fleet of which somebody wants to know."""
    replayed: Sequence[Recorded]
    """The requests, with those that came before them."""
    requests: Sequence[Recorded]
    """Those that count."""
    seconds: float
    """From the first request to the last."""
    prompt_tokens: float
    """Mean."""
    output_tokens: float
    """Mean."""
    cached_share: float | None
    """Of the prompts' tokens, as P have said since the start; ``None``: they do not say."""
    ttft: float | None
    """That nine of ten requests did not exceed, as clients saw it; ``None``: not known."""

    @property
    def size(self) -> Size:
        """The present one."""
        return self.question.sizes[0]


def observe(
    router: PDRouter, since: float, asked: Size | None, seconds: float, others: Sequence[Seen] = ()
) -> Observation:
    """Return what was seen since a time; raise :exc:`Unknown` if that is too little, or fits no replay.

    ``asked`` is another fleet of which somebody wants to know. ``seconds`` of CPU may be taken. ``others`` is
    what the other workers have seen.
    """
    roles = {role: router.registry.routable(role) for role in PD_ROLES}
    _check_fleet(router, roles)
    every = [seen_by(router, since), *others]
    known = sorted((each for seen in every for each in seen.requests), key=_arrival)
    requests = [each for each in known if each.arrived >= since]
    length = requests[-1].arrived - requests[0].arrived if requests else 0.0
    _check_traffic(requests, length)
    answered = [each.output_tokens for each in requests if each.output_tokens]
    lead = lead_seconds(router.registry, _mean(answered))
    read = sum(seen.prompt_tokens for seen in every)
    cached = sum(seen.cached_tokens for seen in every) / read if read else None
    ended = sum(seen.ended_since(since) for seen in every)
    hashed = any(each.blocks for each in requests)
    ttft = sorted(each.ttft for each in requests if each.ttft is not None)
    question = Question(
        sizes(router.registry, asked),
        learned(router.registry),
        _rate(ended, router.registry.learning.finished - requests[0].finished),
        0.0 if hashed or cached is None else cached,
        _settings(router),
        seconds,
        requests[0].arrived,
    )
    return Observation(
        question,
        asked,
        [each for each in known if each.arrived >= requests[0].arrived - lead],
        requests,
        length,
        _mean(each.prompt_tokens for each in requests),
        _mean(answered),
        cached,
        percentile(ttft, 0.9) if len(ttft) >= LEAST_REQUESTS / 2 else None,
    )


def lead_seconds(registry: Registry, output_tokens: float) -> float:
    """Return for how long requests must have come before the load of D is what it is: some answers' time."""
    steps = (each.decode_step for each in registry.routable(InstanceRole.DECODE))
    return _LEAD_ANSWERS * output_tokens * _mean(steps)


def _check_fleet(router: PDRouter, roles: dict[InstanceRole, tuple[Endpoint, ...]]) -> None:
    for role, endpoints in roles.items():
        if not endpoints:
            raise Unknown(f"no {role} instance can serve")
    every = [each for endpoints in roles.values() for each in endpoints]
    if len(every) > MOST_ENGINES:
        raise Unknown(f"the fleet has {len(every)} engines, more than the {MOST_ENGINES} that are replayed")
    if len({each.models.names for each in every if each.models.names is not None}) > 1:
        raise Unknown("the instances do not all serve the same models; their traffic cannot be told apart")
    for role, fit, least in (
        (InstanceRole.PREFILL, router.registry.load.prefill, LEAST_PREFILLS),
        (InstanceRole.DECODE, router.registry.load.decode, LEAST_STEPS),
    ):
        if fit.samples < least:
            seen = f"{fit.samples} of {least} measurements"
            raise Unknown(f"what a {role} instance takes is not learned yet ({seen}): ask again later")


def _check_traffic(requests: Sequence[Recorded], seconds: float) -> None:
    if len(requests) < LEAST_REQUESTS or seconds < LEAST_SECONDS:
        raise Unknown(
            f"not enough traffic seen: {len(requests)} requests in {seconds:.0f} s; "
            f"it takes {LEAST_REQUESTS} in {LEAST_SECONDS:.0f} s"
        )


def sizes(registry: Registry, asked: Size | None = None) -> list[Size]:
    """Return the fleets to compare: the present one, that which is asked for, and one move more each time."""
    roles = {role: registry.routable(role) for role in PD_ROLES}
    prefill, decode = (len(roles[role]) for role in PD_ROLES)
    found = [Size(prefill, decode), *([asked] if asked else [])]
    units = [max(each.instance.data_parallel_size for each in roles[role]) for role in PD_ROLES]
    for moves in range(1, MOST_MOVES + 1):
        to_decode, to_prefill = moves * units[0], moves * units[1]
        if prefill > to_decode:
            found.append(Size(prefill - to_decode, decode + to_decode))
        if decode > to_prefill:
            found.append(Size(prefill + to_prefill, decode - to_prefill))
    return list(dict.fromkeys(found))


def learned(registry: Registry) -> Learned:
    """Return what the load model has learned: means over the instances that can serve."""
    prefill, decode = (registry.routable(role) for role in PD_ROLES)
    load = registry.load
    latency, per_token = load.transfer, 0.0
    if load.transfers.samples:
        latency = load.transfers.predict("", "", 0.0)
        per_token = (load.transfers.predict("", "", 1e4) - latency) / 1e4
    return Learned(
        _mean(each.prefill.overhead for each in prefill),
        _mean(each.prefill.per_token for each in prefill),
        _mean(each.prefill.per_pair for each in prefill),
        _mean(each.decode.base for each in decode),
        _mean(each.decode.per_seq for each in decode),
        _mean(each.decode.per_kv_token for each in decode),
        latency,
        per_token,
        _capacity(prefill),
        _capacity(decode),
    )


def _capacity(endpoints: Iterable[Endpoint]) -> float:
    known = _mean(each.kv_capacity for each in endpoints if each.kv_capacity)
    return min(known or _MOST_KV_TOKENS, _MOST_KV_TOKENS)


def _rate(ended: int, finished: float) -> float:
    """Return how many times as many requests the instances have ended as have ``ended`` here.

    With one scheduler that is 1. Of several on other machines, each sees its own requests alone.
    """
    rate = finished / ended if ended > 0 else 1.0
    return min(rate, _MOST_RATE) if rate > _NEARLY_ALL else 1.0


def _settings(router: PDRouter) -> dict[str, object]:
    names = router.scheduler.strategies.names
    settings = router.config.model_dump(mode="json", include=set(_SETTINGS))
    for role in PD_ROLES:
        settings[f"{role}_strategy"] = names[role]
    return settings


def _arrival(request: Recorded) -> float:
    return request.arrived


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return math.fsum(known) / len(known) if known else 0.0
