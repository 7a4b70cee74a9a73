"""Tells an engine that it has the other role from now on, where its protocol wants that."""

from __future__ import annotations

import msgspec

from ..connectors import ConnectorFailed, Connectors
from ..fleet.endpoint import Endpoint
from ..instance_http.errors import NotConnected, RequestFailed
from ..instance_http.pool import ConnectionPool
from ..models import InstanceRole

TIMEOUT_S = 300.0
"""An engine may take a minute or two: it captures its graphs anew."""
_MAX_ANSWER_BYTES = 1 << 16
_WORDS = 200


class NotSwitched(Exception):
    """An engine does not have the other role; the message says why. ``usable``: it serves in its old one."""

    def __init__(self, words: str, usable: bool) -> None:
        super().__init__(words)
        self.usable = usable


class _Refusal(msgspec.Struct):
    safe_to_restore: bool = False
    message: str = ""
    error: object = None


class RoleSwitch:
    """Calls what an engine's connector names."""

    def __init__(self, pool: ConnectionPool, connectors: Connectors) -> None:
        self._pool = pool
        self._connectors = connectors

    async def __call__(self, endpoint: Endpoint, role: InstanceRole) -> None:
        """Give an idle engine another role, if it has to be told; raise :exc:`NotSwitched`."""
        try:
            call = self._connectors.of(endpoint.instance).switch(role)
        except ConnectorFailed as error:
            raise NotSwitched(str(error), True) from None
        if call is None:
            return
        headers = {"content-type": "application/json", **endpoint.instance.authorization}
        limit, to = _MAX_ANSWER_BYTES, endpoint.destination
        try:
            answer = await self._pool.post(to, call.path, headers, call.body, limit=limit, timeout=TIMEOUT_S)
        except NotConnected as error:  # it may have ended: a new one has the role of its start
            raise NotSwitched(f"{call.path}: {error}; it was not told", True) from None
        except RequestFailed as error:
            raise NotSwitched(f"{call.path}: {error}; which role it has now is not known", False) from None
        if answer.status == 200:
            return
        refusal = _refusal(answer.body)
        why = refusal.message or refusal.error or ""
        usable = refusal.safe_to_restore or answer.status == 404  # it has no such call
        raise NotSwitched(f"{call.path} was answered {answer.status} {str(why)[:_WORDS]}".rstrip(), usable)


def _refusal(body: bytes) -> _Refusal:
    try:
        return msgspec.json.decode(body, type=_Refusal)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _Refusal()
