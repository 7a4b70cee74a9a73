"""Responses that a D keeps: their ids tell which, so that whoever names one gets there.

vLLM takes the id of a response from the request (``request_id``), keeps the response in its own memory if it
is told to, and finds it again for ``previous_response_id`` and ``GET /v1/responses/{id}``. So an id that we
choose says where that is, to any scheduler, also after a restart.
"""

from __future__ import annotations

import re
import secrets
from hashlib import blake2s

from ..connectors import Splice
from ..fleet.endpoint import Endpoint
from ..fleet.registry import Registry
from ..models import InstanceRole, PDInstance, join_address
from ..request.api import RESPONSES
from ..request.body import JsonBody
from .forward import Forward

_ID = re.compile(r"resp_pd([0-9a-f]{8})[0-9a-f]{24}")


class ResponseIds:
    """Makes ids of responses, and reads them."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._keepers: dict[str, Endpoint] | None = None
        registry.changes.subscribe(self._forget)

    def _forget(self) -> None:
        self._keepers = None

    def name(self, forward: Forward, body: JsonBody, largest: int) -> None:
        """Have D keep the response to a request under an id of ours, if it keeps it under one of its own.

        A body that would have more than ``largest`` bytes by that is left as it is.
        """
        if body.api is not RESPONSES or body.get("store") is False or body.has("request_id"):
            return
        keeper = forward.decode[0]
        text = f'"resp_pd{_key(keeper.instance)}{secrets.token_hex(12)}"'.encode()
        splice = forward.splice
        if splice is None:
            named = Splice(*body.one_more("request_id", text))
        else:
            end = splice.text.rindex(b"}")
            named = Splice(splice.at, splice.text[:end] + b',"request_id":' + text + splice.text[end:])
        if named.at + len(named.text) <= largest:
            forward.splice, forward.only = named, [keeper]

    def keeper(self, response: object) -> Endpoint | None:
        """Return who keeps a response; ``None`` if its id does not tell, or that D is not there."""
        found = _ID.fullmatch(response) if isinstance(response, str) else None
        if found is None:
            return None
        if self._keepers is None:
            endpoints = self._registry.endpoints(InstanceRole.DECODE)
            self._keepers = {_key(endpoint.instance): endpoint for endpoint in endpoints}
        keeper = self._keepers.get(found[1])
        if keeper is None or not keeper.probes.healthy or keeper.address is None:
            return None
        # vLLM keeps it beside its engines, and has the one that it likes go on with it.
        return min(self._registry.ranks_of(keeper), key=lambda each: each.requests)

    def keeper_of_path(self, path: str) -> Endpoint | None:
        """Return the same for a path with the id of a response."""
        below = path.removeprefix(f"{RESPONSES.path}/")
        return None if below == path else self.keeper(below.partition("/")[0])


def _key(instance: PDInstance) -> str:
    """Return what stands for an instance in ids: 32 bits of its address."""
    return blake2s(join_address(instance.host, instance.port).encode(), digest_size=4).hexdigest()
