"""vllm-ascend's ``MooncakeLayerwiseConnector`` between simulated engines: D asks, P writes.

Source: ``vllm_ascend/distributed/kv_transfer/kv_p2p/mooncake_layerwise_connector.py`` of August 2026. The
layers are one here, and its end is told on D's HTTP port.
"""

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec

from .handoff import Connector, FatalHandOff, FetchReply
from .request import HandOff

PUSH_PATH = "/_sim/kv/push"
ATTEMPTS = 3
"""To call the metaserver; whatever it answers is an answer."""
_SUFFIX = 9
"""Characters that vLLM adds to the id of a request."""


class PushCall(msgspec.Struct):
    """Body of a push: blocks of D that P has written, and the request for which that was."""

    request_id: str
    digest: str
    block_ids: list[int]


@dataclass(frozen=True, slots=True)
class Invitation:
    """A hand-off as a decode request names it, and where D wants it."""

    metaserver: str | None
    request_id: str = ""
    blocks: tuple[int, ...] = ()
    cached: int = 0


def external_id(request_id: str) -> str:
    """Return the id by which P and D know a request alike."""
    found = request_id[:-_SUFFIX]
    return found.removesuffix("-0") if found.startswith("chatcmpl-") else found


class LayerwiseConnector(Connector):
    """``address`` is the engine's own host and port."""

    lends = False
    awaits_push = True

    def __init__(self, address: str) -> None:
        super().__init__()
        self._address = address
        self._metaserver = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None))
        self._calls: set[asyncio.Task[None]] = set()
        self._pushed: dict[str, asyncio.Future[PushCall]] = {}

    def kind(self, params: dict[str, Any]) -> HandOff:
        """P's engine dies of a request that does not say what D has."""
        kind = super().kind(params)
        if kind is HandOff.SEND and "remote_cached_tokens" not in params:
            raise FatalHandOff(f"KeyError: 'remote_cached_tokens' in {sorted(params)}")
        return kind

    def read(self, params: dict[str, Any], blocks_needed: int) -> Invitation:
        """Return where D is to ask."""
        return Invitation(params.get("metaserver"))

    def allocated(self, offer: Invitation, request_id: str, blocks: list[int], cached: int) -> Invitation:
        """Return what D will tell the metaserver."""
        return Invitation(offer.metaserver, external_id(request_id), tuple(blocks), cached)

    def answer(self, *_: Any) -> None:
        """Return that a prefill's answer says nothing of its hand-off."""

    async def release(self, offer: Invitation) -> None:
        """There is nothing to release: nobody was asked yet."""

    async def fetch(self, offer: Invitation) -> FetchReply:
        """Ask for the blocks, and wait for them, for ever if need be."""
        pushed = asyncio.get_running_loop().create_future()
        self._pushed[offer.request_id] = pushed
        task = asyncio.ensure_future(self._call(offer))  # another thread's, which goes on in any case
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        call = await asyncio.shield(pushed)
        return FetchReply("", call.digest)

    def take(self, call: PushCall) -> bool:
        """Give blocks that were written to the request that waits for them, if there is one."""
        pushed = self._pushed.pop(call.request_id, None)
        if pushed is None:
            return False
        pushed.set_result(call)
        return True

    async def push(self, params: dict[str, Any], request_id: str, digest: str) -> None:
        """Write the blocks, and tell D by P's own id of the request."""
        call = PushCall(external_id(request_id), digest, params["remote_block_ids"][0])
        url = f"http://{params['remote_host']}:{params['remote_port']}{PUSH_PATH}"
        with suppress(aiohttp.ClientError, TimeoutError, OSError):
            async with self._session.post(url, data=msgspec.json.encode(call)) as response:
                await response.read()

    async def close(self) -> None:
        """Close the connections to other engines."""
        for task in self._calls:
            task.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)
        await self._metaserver.close()
        await super().close()

    async def _call(self, offer: Invitation) -> None:
        host, _, port = self._address.rpartition(":")
        call = {
            "token_ids": [],
            "request_id": offer.request_id,
            "do_remote_prefill": False,
            "do_remote_decode": True,
            "remote_block_ids": [offer.blocks],
            "remote_block_size": [128],
            "remote_engine_id": self._address,
            "remote_host": host,
            "remote_port": int(port),
            "remote_tp_size": 1,
            "remote_pcp_size": 1,
            "remote_dcp_size": 1,
            "remote_cached_tokens": offer.cached,
        }
        for _ in range(ATTEMPTS):
            with suppress(aiohttp.ClientError, OSError, ValueError, TypeError):
                async with self._metaserver.post(offer.metaserver or "", json=call) as response:
                    await response.read()
                return
