"""What Envoy tells the wrong scheduler reaches the one that has the request, and nonsense reaches nobody."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from tests.support.in_flight import InFlightCase
from tests.support.waiting import until
from vllm_pd_scheduler.fleet.breaker import BreakerState
from vllm_pd_scheduler.routing.attempts import FailedAttempt, Failure
from vllm_pd_scheduler.routing.result import Result
from vllm_pd_scheduler.routing.strays import MAX_STRAYS, Strays
from vllm_pd_scheduler.telemetry import Ending

ATTEMPT = FailedAttempt("10.0.0.1:8000", Failure.STATUS, "abc-1", status=500)
RESULT = Result("abc-1", Ending.OK, 200, 1.0, 0.5, 0.1, "10.0.0.1:8000", 100)


class Two:
    """One that is told, and one that takes what is passed on."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.attempts: list[FailedAttempt] = []
        self.results: list[Result] = []
        self.told = Strays(self.sent.append, _nothing, _nothing)
        self.takes = Strays(_nothing, self.attempts.append, self.results.append)


def _nothing(_: Any) -> None: ...


async def test_what_is_told_at_once_is_passed_on_in_one_message() -> None:
    two = Two()
    for told in (ATTEMPT, RESULT, replace(ATTEMPT, retry_after=1.5, first=False)):
        two.told.pass_on(told)
    await until(lambda: bool(two.sent))
    assert two.takes.receive(two.sent[0])
    assert two.attempts == [ATTEMPT, replace(ATTEMPT, retry_after=1.5, first=False)]
    assert two.results == [RESULT]
    two.told.pass_on(RESULT)
    await until(lambda: len(two.sent) == 2)


async def test_a_flood_is_bounded() -> None:
    two = Two()
    for _ in range(2 * MAX_STRAYS):
        two.told.pass_on(RESULT)
    await until(lambda: bool(two.sent))
    assert two.takes.receive(two.sent[0])
    assert len(two.results) == MAX_STRAYS


async def test_a_client_with_long_ids_hides_nothing() -> None:
    two = Two()
    for _ in range(100):
        two.told.pass_on(replace(ATTEMPT, request_id="x" * 50_000))
    two.told.pass_on(replace(ATTEMPT, request="x" * 50_000))
    two.told.pass_on(RESULT)
    await until(lambda: bool(two.sent))
    assert len(two.sent[0]) < 20_000
    assert two.takes.receive(two.sent[0])
    assert (two.attempts, two.results) == ([ATTEMPT] * 100, [RESULT])


def _message(attempts: Any = (), results: Any = ()) -> bytes:
    return msgspec.msgpack.encode([list(attempts), list(results)])


@pytest.mark.parametrize(
    "make",
    [
        lambda: b"",
        lambda: b"\xc1",
        lambda: b"\x91" * 100_000,
        lambda: bytes(2 << 20),
        lambda: _message(results=[RESULT._replace(duration=math.nan)]),
        lambda: _message(results=[RESULT._replace(ttft=math.inf)]),
        lambda: _message(results=[RESULT._replace(answer_bytes=-1)]),
        lambda: _message(results=[RESULT._replace(status=10**9)]),
        lambda: _message([replace(ATTEMPT, status=-1)]),
        lambda: _message([replace(ATTEMPT, retry_after=math.inf)]),
        lambda: _message(results=[RESULT] * (MAX_STRAYS + 1)),
    ],
)
def test_nonsense_is_not_taken(make: Callable[[], bytes]) -> None:
    two = Two()
    assert not two.takes.receive(make())
    assert two.attempts == []
    assert two.results == []


class OwnerTest(InFlightCase):
    async def test_a_failure_told_elsewhere_counts_for_the_request_alone(
        self,
    ) -> None:
        forward = await self.forward()
        decode, in_flight = forward.decode[0], self.router.in_flight
        attempt = FailedAttempt(str(decode.address), Failure.STATUS, forward.id, status=500)
        for _ in range(20):
            in_flight.attempt_told_of(attempt)
        self.assertEqual(forward.failed_attempts, 20)
        counted = self.router.telemetry.prometheus.get_sample_value(
            "pd_scheduler_decode_attempt_failures_total", {"decode": decode.id, "failure": "status"}
        )
        self.assertFalse(counted)
        self.assertIs(decode.breaker.state, BreakerState.CLOSED)
        in_flight.attempt_told_of(replace(attempt, request="another-1"))
        self.assertFalse(in_flight.told_of(RESULT))
        self.assertTrue(in_flight.told_of(RESULT._replace(request=forward.id)))
        self.assertIs(forward.decision.ending, Ending.OK)
