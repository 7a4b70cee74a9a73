"""Strategies that fail are found before a request depends on them."""

import sys
import threading
from typing import Any

import pytest

from vllm_pd_scheduler.config import parse_config
from vllm_pd_scheduler.scheduler import rehearsal
from vllm_pd_scheduler.scheduler.rehearsal import rehearse
from vllm_pd_scheduler.strategies import Endpoint, RequestContext, Strategy, strategy_names

FLEET = {
    "prefill_instances": [{"id": "p0", "host": "10.0.0.1", "port": 8100}],
    "decode_instances": [{"id": "d0", "host": "10.0.0.2", "port": 8200}],
}
HERE = __name__
AWAKE = threading.Event()


class InScore(Strategy):
    def score(self, endpoint: Endpoint, request: RequestContext) -> Any:
        return endpoint.no_such_thing  # type: ignore[attr-defined]


class InInit(Strategy):
    def __init__(self, config: Any) -> None:
        raise RuntimeError("odd")


class InOrder(Strategy):
    def score(self, endpoint: Endpoint, request: RequestContext) -> Any:
        return 0.0

    def order(self, request: RequestContext, cost: float) -> float:
        raise KeyError("cost")


class InHopeless(Strategy):
    def score(self, endpoint: Endpoint, request: RequestContext) -> Any:
        return 0.0

    def hopeless(self, request: RequestContext, cost: float) -> bool:
        return cost / 0 > 1


class OnceScraped(Strategy):
    def score(self, endpoint: Endpoint, request: RequestContext) -> Any:
        return 0.0 if endpoint.metrics is None else endpoint.metrics.queue  # type: ignore[attr-defined]


class WithASession(Strategy):
    def score(self, endpoint: Endpoint, request: RequestContext) -> Any:
        assert request.session is None
        return 0.0


class OfDecodeOnly(Strategy):
    def score(self, endpoint: Endpoint, request: RequestContext) -> Any:
        return {"decode": 1}[endpoint.instance.role]


class Incomparable(Strategy):
    def score(self, endpoint: Endpoint, request: RequestContext) -> Any:
        return object()


class NoMethod(Strategy):
    pass


class RanksNothing(Strategy):
    def rank(self, endpoints: Any, request: RequestContext, count: int) -> list[Endpoint]:
        return []


class RanksIds(Strategy):
    def rank(self, endpoints: Any, request: RequestContext, count: int) -> Any:
        return [endpoint.id for endpoint in endpoints][:count]


class RanksAll(Strategy):
    def rank(self, endpoints: Any, request: RequestContext, count: int) -> Any:
        return sorted(endpoints, key=lambda endpoint: endpoint.id)


class NotANumber(Strategy):
    def score(self, endpoint: Endpoint, request: RequestContext) -> Any:
        return float("nan") if endpoint.id.endswith("2") else 0.0


class ANotANumberInATuple(Strategy):
    def score(self, endpoint: Endpoint, request: RequestContext) -> Any:
        return 0, float("nan") if endpoint.id.endswith("2") else 0.0


class TooFewScores(Strategy):
    def scores(self, endpoints: Any, request: RequestContext) -> Any:
        return []


class InAcceptsSample(Strategy):
    def score(self, endpoint: Endpoint, request: RequestContext) -> Any:
        return 0.0

    def accepts_sample(self, request: RequestContext) -> bool:
        raise KeyError("sample")


class OrdersByName(Strategy):
    def score(self, endpoint: Endpoint, request: RequestContext) -> Any:
        return 0.0

    def order(self, request: RequestContext, cost: float) -> Any:
        return request.model


class Sleeps(Strategy):
    def score(self, endpoint: Endpoint, request: RequestContext) -> Any:
        AWAKE.wait(60)
        return 0.0


def problems(**settings: Any) -> list[str]:
    return rehearse(parse_config({**FLEET, **settings}))


@pytest.mark.parametrize("name", strategy_names())
def test_what_is_built_in_passes(name: str) -> None:
    assert problems(strategy=name, shadow_strategy=name) == []


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (InScore, "AttributeError: 'Endpoint' object has no attribute 'no_such_thing', at "),
        (InInit, f"strategy '{HERE}:InInit' cannot be made: RuntimeError: odd"),
        (InOrder, "KeyError: 'cost', at "),
        (InHopeless, "ZeroDivisionError: "),
        (OnceScraped, "AttributeError: "),
        (WithASession, "AssertionError"),
        (OfDecodeOnly, "KeyError: "),
        (Incomparable, "TypeError: "),
        (NoMethod, "NotImplementedError: NoMethod defines neither score() nor rank()"),
        (NotANumber, "ValueError: a score is not a number (NaN)"),
        (ANotANumberInATuple, "ValueError: a score is not a number (NaN)"),
        (TooFewScores, "ValueError: 0 scores for 3 endpoints"),
        (InAcceptsSample, "KeyError: 'sample', at "),
        (OrdersByName, "ValueError: could not convert string to float"),
        (RanksNothing, "ValueError: rank() returned nothing"),
        (RanksAll, "ValueError: rank() returned more than 1"),
        (RanksIds, "ValueError: rank() returned a str, which it was not offered"),
    ],
)
def test_one_that_fails(strategy: type[Strategy], message: str) -> None:
    name = f"{HERE}:{strategy.__name__}"
    first, *_ = problems(strategy=name)
    assert first.startswith(f"strategy: strategy '{name}' ")
    assert message in first
    assert problems(shadow_strategy=name)[0].startswith("shadow_strategy: ")
    only_decode = problems(decode_strategy=name)
    if strategy is OfDecodeOnly:
        assert only_decode == []
    else:
        assert [line.split(":")[0] for line in only_decode] == ["decode_strategy"]


def test_the_place_is_told() -> None:
    (first, _) = problems(strategy=f"{HERE}:InScore")
    assert f", at {sys.modules[HERE].__file__}:" in first
    assert first.endswith(" in score")


def test_one_that_does_not_return(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "LIMIT_S", 0.05)
    try:
        (problem,) = problems(decode_strategy=f"{HERE}:Sleeps")
    finally:
        AWAKE.set()
    assert problem == (
        f"decode_strategy: strategy '{HERE}:Sleeps' does not return: all requests would wait for it"
    )
