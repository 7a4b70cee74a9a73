"""The hand-off between two simulated engines: `kv_transfer_params`, and the transfer as an HTTP call.

Real engines move blocks by NIXL. Here the decode side posts what it would have read to
`/_sim/kv/fetch` of the prefill side and learns which prompt the blocks were of.
"""

from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp
import msgspec

FETCH_PATH = "/_sim/kv/fetch"
RELEASE_PATH = "/_sim/kv/release"


class FatalHandOff(Exception):
    """Parameters that kill a real engine as soon as it sees them."""


class TransferFailed(Exception):
    """The other side is dead, unknown, or not the engine that was named."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A hand-off as the decode side must name it. `block_ids` are of the sending engine."""

    engine_id: str
    request_id: str
    host: str
    port: int
    block_ids: list[int]

    def answer(self, num_tokens: int, cached: int) -> dict[str, Any]:
        """The `kv_transfer_params` of a prefill answer, key for key as vLLM 0.32 gives them.

        `cached` of the `num_tokens` tokens of KV were in the sender's prefix cache.
        """
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [self.block_ids],
            "remote_engine_id": self.engine_id,
            "remote_request_id": self.request_id,
            "remote_host": self.host,
            "remote_port": self.port,
            "tp_size": 1,
            "dcp_size": 1,
            "pp_size": 1,
            "remote_num_tokens": num_tokens,
            "remote_blocks_expiry_time": None,
            "transfer_mode": "pull",
            "remote_prefill_cached_tokens": cached,
        }


def read_offer(params: dict[str, Any], blocks_needed: int) -> Offer | None:
    """Read a decode request's `kv_transfer_params`; None when the sender's address is incomplete.

    Raise FatalHandOff unless the block ids are one list of `blocks_needed` or more integers in a list.
    """
    groups = params.get("remote_block_ids")
    if not isinstance(groups, list) or len(groups) != 1 or not isinstance(groups[0], list):
        raise FatalHandOff(f"remote_block_ids must be a list of one list, got {groups!r:.80}")
    blocks = groups[0]
    if not all(type(block) is int and 0 <= block < 2**31 for block in blocks):
        raise FatalHandOff(f"block ids must be non-negative integers, got {blocks!r:.80}")
    if len(blocks) < blocks_needed:
        raise FatalHandOff(f"{len(blocks)} remote blocks for a prompt of {blocks_needed}")
    engine_id, request_id, host = (params.get(f"remote_{key}") for key in ("engine_id", "request_id", "host"))
    port = params.get("remote_port")
    if not (isinstance(engine_id, str) and isinstance(request_id, str) and isinstance(host, str)):
        return None
    return Offer(engine_id, request_id, host, port, blocks) if type(port) is int else None


class FetchCall(msgspec.Struct):
    """The body of a fetch or a release. `agent` is who the engine was when it was last spoken to."""

    engine_id: str
    request_id: str
    block_ids: list[int] = []
    agent: str | None = None


class FetchReply(msgspec.Struct):
    """Which prompt the blocks held; None for a prompt that is none of this hand-off's."""

    agent: str
    digest: str | None = None
    invalid: bool = False


class Connector:
    """The receiving side of transfers."""

    def __init__(self, timeout: float = 10.0) -> None:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout))
        self._agents: dict[str, str] = {}

    async def close(self) -> None:
        """Close the connections to other engines."""
        await self._session.close()

    async def fetch(self, offer: Offer) -> str | None:
        """Read the offered blocks and return the digest of what they held.

        Raise TransferFailed when the sender cannot be reached, FatalHandOff when it has no such blocks.
        """
        call = {**asdict(offer), "agent": self._agents.get(offer.engine_id)}
        status, body = await self._post(offer, FETCH_PATH, call)
        if status != 200:
            raise TransferFailed(f"{offer.host}:{offer.port} answered {status}")
        reply = msgspec.json.decode(body, type=FetchReply)
        # Like NIXL, shake hands once per engine id: an engine that comes back under its old id is never
        # recognised again.
        self._agents[offer.engine_id] = reply.agent
        if reply.invalid:
            raise FatalHandOff(f"block ids that {offer.engine_id} does not have")
        return reply.digest

    async def release(self, offer: Offer) -> None:
        """Tell the sender that nobody will fetch; its death is of no interest."""
        with suppress(TransferFailed):
            await self._post(offer, RELEASE_PATH, asdict(offer))

    async def _post(self, offer: Offer, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        host = f"[{offer.host}]" if ":" in offer.host else offer.host
        try:
            data = msgspec.json.encode(body)
            async with self._session.post(f"http://{host}:{offer.port}{path}", data=data) as response:
                return response.status, await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise TransferFailed(str(error) or type(error).__name__) from error
