"""A prefill that has no answer: whose fault that is."""

from __future__ import annotations

import asyncio
import errno
import os
import ssl
from typing import Any, cast

import pytest

from tests.support.connectors import attempt
from vllm_pd_scheduler.fleet.registry import Registry
from vllm_pd_scheduler.handoff.interfaces import LocalShortage, PrefillFailed, PrefillNotSent
from vllm_pd_scheduler.handoff.prefill_leg import HttpPrefill
from vllm_pd_scheduler.instance_http.errors import (
    AnswerRefused,
    ConnectionLost,
    NotConnected,
    NotHttp,
    RequestFailed,
    TimedOut,
)
from vllm_pd_scheduler.instance_http.exchange import Answer
from vllm_pd_scheduler.instance_http.pool import ConnectionPool
from vllm_pd_scheduler.models import InstanceRole, PDInstance

Outcome = RequestFailed | tuple[int, str]
LISTENER = "http://127.0.0.1:10001"
ENVOYS = "upstream connect error or disconnect/reset before headers. reset reason: "
LOCAL = ENVOYS + "local connection failure"
REMOTE = ENVOYS + "remote connection failure, transport failure reason: "


def connecting(number: int) -> NotConnected:
    return NotConnected("", OSError(number, os.strerror(number)))


def breaking(number: int) -> ConnectionLost:
    return ConnectionLost("", OSError(number, os.strerror(number)))


class Pool:
    """Has an error, or an answer, for each request."""

    def __init__(self, outcome: Outcome) -> None:
        self._outcome = outcome

    def post(self, *_: object, **__: object) -> asyncio.Future[Answer]:
        sent: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        if isinstance(self._outcome, RequestFailed):
            sent.set_exception(self._outcome)
        else:
            status, body = self._outcome
            flags = b"UF" if body.startswith(ENVOYS) else b""
            sent.set_result(Answer(status, {b"x-pd-connection": flags}, body.encode()))
        return sent


async def send(outcome: Outcome, listener: str | None) -> Any:
    endpoint = Registry().add(PDInstance("p0", InstanceRole.PREFILL, "10.0.0.1", 8100))
    leg = HttpPrefill(cast(ConnectionPool, Pool(outcome)), listener, 5.0)
    return await leg(endpoint, "/v1/completions", {}, b"{}", attempt())


OURS: list[tuple[Outcome, str]] = [
    (connecting(errno.EMFILE), "EMFILE"),
    (connecting(errno.ENFILE), "ENFILE"),
    (breaking(errno.ENOBUFS), "ENOBUFS"),
    (connecting(errno.ENOMEM), "ENOMEM"),
    (ConnectionLost("", MemoryError()), "ENOMEM"),
]
OF_THE_WAY_TO_ENVOY: list[tuple[Outcome, str]] = [
    (connecting(errno.EADDRNOTAVAIL), "EADDRNOTAVAIL"),
    ((503, LOCAL), "envoy"),
    ((503, REMOTE + "immediate connect error: Cannot assign requested address"), "envoy"),
]


@pytest.mark.parametrize(("outcome", "kind"), OURS + OF_THE_WAY_TO_ENVOY, ids=str)
async def test_our_own_shortage(outcome: Outcome, kind: str) -> None:
    with pytest.raises(LocalShortage, match=f"^{kind}$"):
        await send(outcome, LISTENER)


@pytest.mark.parametrize(("outcome", "kind"), OURS, ids=str)
async def test_the_same_straight_to_the_instance(outcome: Outcome, kind: str) -> None:
    with pytest.raises(LocalShortage, match=f"^{kind}$"):
        await send(outcome, None)


async def test_a_listener_that_is_not_there() -> None:
    """No instance can be blamed for that."""
    with pytest.raises(PrefillNotSent, match=r"^listener$") as caught:
        await send(connecting(errno.ECONNREFUSED), LISTENER)
    assert type(caught.value) is PrefillNotSent


async def test_no_port_left_for_connections_to_one_instance() -> None:
    """Another one may still be reached, so it is tried."""
    with pytest.raises(PrefillNotSent, match=r"^EADDRNOTAVAIL$") as caught:
        await send(connecting(errno.EADDRNOTAVAIL), None)
    assert type(caught.value) is PrefillNotSent


@pytest.mark.parametrize(
    ("error", "listener", "reason", "lost"),
    [
        (connecting(errno.ECONNREFUSED), None, "connect", False),
        (connecting(errno.EHOSTUNREACH), None, "connect", False),
        (NotConnected("", TimeoutError("no connection within 1 s")), None, "connect", False),
        (NotConnected("", ssl.SSLCertVerificationError()), None, "connect", False),
        (ConnectionLost("it closed the connection without an answer"), LISTENER, "reset", False),
        (ConnectionLost("it closed the connection without an answer"), None, "reset", True),
        (breaking(errno.ECONNRESET), LISTENER, "reset", False),
        (breaking(errno.ECONNRESET), None, "reset", True),
        (NotHttp(""), None, "reset", True),
        (AnswerRefused(""), LISTENER, "unreadable", False),
        (AnswerRefused(""), None, "unreadable", False),
        (TimedOut(""), LISTENER, "timeout", False),
        (TimedOut(""), None, "timeout", False),
    ],
    ids=repr,
)
async def test_the_instances_own(error: RequestFailed, listener: str | None, reason: str, lost: bool) -> None:
    with pytest.raises(PrefillFailed, match=f"^{reason}$") as caught:
        await send(error, listener)
    assert type(caught.value) is PrefillFailed
    assert caught.value.lost is lost


async def test_an_instances_own_503() -> None:
    for text in ("overloaded", "local connection failure", ""):
        assert (await send((503, text), LISTENER)).status == 503


async def test_envoys_503_for_an_instance_that_refuses() -> None:
    with pytest.raises(PrefillFailed, match=r"^connect$") as caught:
        await send((503, REMOTE + "delayed connect error: Connection refused"), LISTENER)
    assert type(caught.value) is PrefillFailed


async def test_what_an_instance_says_of_a_connection_is_not_envoys_word() -> None:
    assert (await send((503, LOCAL), None)).status == 503
