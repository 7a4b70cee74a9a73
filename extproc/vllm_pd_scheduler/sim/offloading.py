"""vLLM's ``OffloadingConnector`` with the tier ``p2p`` between simulated engines: copies in memory.

Source: ``vllm/v1/kv_offload/tiering/p2p`` of vLLM 0.33. The tier's port is that of the instance's own HTTP
server. What is not there is computed: nothing else can go wrong, but it can take long.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
import msgspec

from .handoff import Connector, FetchReply, TransferFailed
from .request import HandOff

P2P_FETCH_PATH = "/_sim/kv/p2p/fetch"
P2P_LOOKUP_PATH = "/_sim/kv/p2p/lookup"
REMEMBERED_S = 60.0
"""For which a fetch of what was dropped is refused at once."""


class P2pFetch(msgspec.Struct):
    """Body of a fetch: which hand-off, and of which prompt."""

    kv_request_id: str
    digest: str


class P2pLookup(msgspec.Struct):
    """Body of a look-up: hashes of blocks, from the first one of a prompt on."""

    hashes: list[int]


class P2pFound(msgspec.Struct):
    """Answer to a look-up: how many of the blocks, from the first one on, can be pulled."""

    blocks: int


@dataclass(frozen=True, slots=True)
class Peer:
    """A hand-off, or blocks, as a request names them."""

    kv_request_id: str
    host: str
    port: int
    digest: str = ""

    @property
    def url(self) -> str:
        """Base URL of the peer."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


class OffloadingConnector(Connector):
    """Keeps copies of prompts for ``lease`` seconds, and waits ``patience`` seconds for those of others.

    The engine itself pins nothing: for it a prefill is a request like any other.
    """

    def __init__(self, lease: float, patience: float) -> None:
        super().__init__(patience)
        self._lease = lease
        self._patience = patience
        self._parked: dict[str, tuple[str, float]] = {}
        """Digests of prompts by the names of their hand-offs, and when they were stored."""
        self._dropped: dict[str, float] = {}
        self._awaited: dict[str, asyncio.Event] = {}
        """By the names of hand-offs that were asked for before they were stored."""

    def kind(self, params: dict[str, Any]) -> HandOff:
        """A request that names nobody to fetch from is one without a hand-off."""
        return HandOff.NONE if _peer(params.get("remote_prefiller")) is None else HandOff.RECEIVE

    def read(self, params: dict[str, Any], blocks_needed: int) -> Peer | None:
        """Return the hand-off that a decode request names."""
        return _peer(params.get("remote_prefiller"))

    def named(self, offer: Peer | None, own_id: str, digest: str) -> Peer | None:
        """Return the hand-off with the prompt of the request that asks for it: blocks have no other name."""
        return offer and replace(offer, digest=digest)

    # -- the side that has the blocks -----------------------------------------------------------------

    def store(self, params: dict[str, Any], digest: str) -> None:
        """Keep a copy of a prompt that was read, if somebody is to fetch it."""
        name = (params.get("remote_decoder") or {}).get("kv_request_id")
        self._expire()
        if name and name not in self._dropped:
            self._parked[name] = digest, time.monotonic()
            if awaited := self._awaited.pop(name, None):
                awaited.set()

    async def serve(self, call: P2pFetch, agent: str) -> FetchReply:
        """Return the prompt of a copy, once. What is not there yet is waited for, what is gone refused."""
        self._expire()
        if call.kv_request_id in self._dropped:
            return FetchReply(agent, late=True)
        if call.kv_request_id not in self._parked:
            await self._awaited.setdefault(call.kv_request_id, asyncio.Event()).wait()
        digest, _ = self._parked.pop(call.kv_request_id, ("", 0.0))
        if digest != call.digest:  # another was first, or there are other blocks under this name
            await asyncio.Event().wait()
        return FetchReply(agent, digest)

    def _expire(self) -> None:
        now = time.monotonic()
        self._dropped = {name: at for name, at in self._dropped.items() if now - at < REMEMBERED_S}
        for name in [name for name, (_, at) in self._parked.items() if now - at >= self._lease]:
            del self._parked[name]
            self._dropped[name] = now

    # -- the side that needs them ---------------------------------------------------------------------

    async def fetch(self, offer: Peer) -> FetchReply:
        """Fetch a hand-off; raise TransferFailed if it does not come, as soon as that is known."""
        reply = await self._ask(offer, P2P_FETCH_PATH, P2pFetch(offer.kv_request_id, offer.digest))
        found = msgspec.json.decode(reply, type=FetchReply)
        if found.late:
            raise TransferFailed(f"{offer.kv_request_id} was dropped")
        return found

    async def found_at_source(self, params: dict[str, Any], hashes: Sequence[int]) -> int:
        """Return how many of a prompt's blocks the source has that a request names; 0 without one."""
        source = _peer(params.get("remote_kv_source"))
        if source is None or _peer(params.get("remote_prefiller")) is not None:
            return 0
        try:
            reply = await self._ask(source, P2P_LOOKUP_PATH, P2pLookup(list(hashes)))
        except TransferFailed:
            return 0
        return msgspec.json.decode(reply, type=P2pFound).blocks

    async def release(self, offer: Any) -> None:
        """The sender hears nothing of it."""

    async def _ask(self, peer: Peer, path: str, call: msgspec.Struct) -> bytes:
        """Return a peer's answer; raise TransferFailed if there is none in time, and not before."""
        began = time.monotonic()
        try:
            async with self._session.post(peer.url + path, data=msgspec.json.encode(call)) as response:
                if response.status == 200:
                    return await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
            pass
        # ZeroMQ goes on to look for a peer that is not there.
        await asyncio.sleep(max(0.0, began + self._patience - time.monotonic()))
        raise TransferFailed(f"{peer.host}:{peer.port} has not answered")


def _peer(params: Any) -> Peer | None:
    """Return whom a part of ``kv_transfer_params`` names; ``None`` if it is not complete."""
    found = params if isinstance(params, dict) else {}
    name, host, port = (found.get(key) for key in ("kv_request_id", "remote_host", "remote_port"))
    return Peer(str(name), str(host), port) if name and host and isinstance(port, int) and port else None
