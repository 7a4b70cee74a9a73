"""A prefill that has no answer: whose fault that is."""

from __future__ import annotations

import errno
import os
from typing import Any, cast
from unittest import mock

import aiohttp
import pytest
from aiohttp.client_reqrep import ConnectionKey

from vllm_pd_scheduler.fleet.registry import Registry
from vllm_pd_scheduler.handoff.interfaces import LocalShortage, PrefillFailed, PrefillNotSent
from vllm_pd_scheduler.handoff.prefill_leg import HttpPrefill
from vllm_pd_scheduler.models import InstanceRole, PDInstance

KEY = ConnectionKey("10.0.0.1", 8100, False, True, None, None, None)
LISTENER = "http://127.0.0.1:10001"
ENVOYS = "upstream connect error or disconnect/reset before headers. reset reason: "
LOCAL = ENVOYS + "local connection failure"
REMOTE = ENVOYS + "remote connection failure, transport failure reason: "


def connecting(number: int) -> aiohttp.ClientConnectorError:
    return aiohttp.ClientConnectorError(KEY, OSError(number, os.strerror(number)))


class Session:
    """Raises an error, or gives an answer, for each request."""

    def __init__(self, outcome: Exception | tuple[int, str]) -> None:
        self._outcome = outcome

    def post(self, *_: object, **__: object) -> Session:
        return self

    async def __aenter__(self) -> Any:
        if isinstance(self._outcome, Exception):
            raise self._outcome
        status, body = self._outcome
        headers = {"x-pd-connection": "UF"} if body.startswith(ENVOYS) else {}
        content = mock.Mock(readany=mock.AsyncMock(side_effect=[*filter(None, [body.encode()]), b""]))
        return mock.Mock(status=status, headers=headers, content=content)

    async def __aexit__(self, *_: object) -> None: ...


async def send(outcome: Exception | tuple[int, str], listener: str | None) -> Any:
    endpoint = Registry().add(PDInstance("p0", InstanceRole.PREFILL, "10.0.0.1", 8100))
    leg = HttpPrefill(cast(aiohttp.ClientSession, Session(outcome)), listener, 5.0)
    return await leg(endpoint, "/v1/completions", {}, b"{}")


OURS: list[tuple[Exception | tuple[int, str], str]] = [
    (connecting(errno.EMFILE), "EMFILE"),
    (connecting(errno.ENFILE), "ENFILE"),
    (aiohttp.ClientOSError(errno.ENOBUFS, "No buffer space available"), "ENOBUFS"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "ENOMEM"),
    (MemoryError(), "ENOMEM"),
]
OF_THE_WAY_TO_ENVOY: list[tuple[Exception | tuple[int, str], str]] = [
    (connecting(errno.EADDRNOTAVAIL), "EADDRNOTAVAIL"),
    ((503, LOCAL), "envoy"),
    ((503, REMOTE + "immediate connect error: Cannot assign requested address"), "envoy"),
]


@pytest.mark.parametrize(("outcome", "kind"), OURS + OF_THE_WAY_TO_ENVOY, ids=str)
async def test_our_own_shortage(outcome: Exception | tuple[int, str], kind: str) -> None:
    with pytest.raises(LocalShortage, match=f"^{kind}$"):
        await send(outcome, LISTENER)


@pytest.mark.parametrize(("outcome", "kind"), OURS, ids=str)
async def test_the_same_straight_to_the_instance(outcome: Exception, kind: str) -> None:
    with pytest.raises(LocalShortage, match=f"^{kind}$"):
        await send(outcome, None)


async def test_a_listener_that_is_not_there() -> None:
    """No instance can be blamed for that."""
    with pytest.raises(PrefillNotSent, match=r"^listener$") as caught:
        await send(connecting(errno.ECONNREFUSED), LISTENER)
    assert type(caught.value) is PrefillNotSent


@pytest.mark.parametrize(
    ("error", "listener", "reason"),
    [
        (connecting(errno.ECONNREFUSED), None, "connect"),
        (connecting(errno.EADDRNOTAVAIL), None, "connect"),  # an address that this machine has no way to
        (aiohttp.ServerDisconnectedError(), LISTENER, "reset"),
        (aiohttp.ClientOSError(errno.ECONNRESET, "Connection reset by peer"), LISTENER, "reset"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), None, "reset"),
        (aiohttp.ClientPayloadError("cut"), LISTENER, "reset"),
        (TimeoutError(), LISTENER, "timeout"),
    ],
    ids=str,
)
async def test_the_instances_own(error: Exception, listener: str | None, reason: str) -> None:
    with pytest.raises(PrefillFailed, match=f"^{reason}$") as caught:
        await send(error, listener)
    assert type(caught.value) is PrefillFailed


async def test_an_instances_own_503() -> None:
    for text in ("overloaded", "local connection failure", ""):
        assert (await send((503, text), LISTENER)).status == 503


async def test_envoys_503_for_an_instance_that_refuses() -> None:
    with pytest.raises(PrefillFailed, match=r"^connect$") as caught:
        await send((503, REMOTE + "delayed connect error: Connection refused"), LISTENER)
    assert type(caught.value) is PrefillFailed
