"""An engine is told its other role: what its answer, or that there is none, says of the role that it has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_pd_scheduler.handoff.role_switch import NotSwitched, RoleSwitch
from vllm_pd_scheduler.instance_http.errors import AnswerRefused, ConnectionLost, NotConnected, TimedOut
from vllm_pd_scheduler.models import InstanceRole

CALL = SimpleNamespace(path="/pd_role_switch", body=b"{}")
ENDPOINT: Any = SimpleNamespace(instance=SimpleNamespace(authorization={}), destination=None)


def switch(found: Any) -> RoleSwitch:
    async def post(*_: Any, **__: Any) -> Any:
        if isinstance(found, Exception):
            raise found
        return SimpleNamespace(status=found[0], body=found[1])

    connectors: Any = SimpleNamespace(of=lambda _: SimpleNamespace(switch=lambda _: CALL))
    pool: Any = SimpleNamespace(post=post)
    return RoleSwitch(pool, connectors)


async def test_one_that_takes_it() -> None:
    await switch((200, b"garbage"))(ENDPOINT, InstanceRole.DECODE)


@pytest.mark.parametrize(
    ("found", "usable"),
    [
        (NotConnected("connection refused"), True),
        (ConnectionLost("it ended"), False),
        (TimedOut("no answer within 300 s"), False),
        (AnswerRefused("too long"), False),
        ((404, b"{}"), True),
        ((400, b'{"safe_to_restore":true,"message":"busy"}'), True),
        ((400, b'{"safe_to_restore":"yes"}'), False),
        ((500, b"\xff"), False),
        ((500, b"[" * 10_000), False),
        ((500, b'{"error":' + b"[" * 100_000), False),
        ((307, b""), False),
    ],
)
async def test_one_that_does_not(found: Any, usable: bool) -> None:
    with pytest.raises(NotSwitched) as raised:
        await switch(found)(ENDPOINT, InstanceRole.DECODE)
    assert raised.value.usable is usable
    assert "/pd_role_switch" in str(raised.value)
