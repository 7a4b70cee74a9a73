"""The hand-off between two simulated engines: ``kv_transfer_params``, and an HTTP call for the transfer.

Real engines read each other's blocks by NIXL. Here the decode side posts the ids of the blocks that it would
read to ``/_sim/kv/fetch`` of the prefill side, whose answer says of which prompt they are.
"""

import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp
import msgspec

_RANDOM_SUFFIX = re.compile(r"-[0-9a-f]{8}$", re.IGNORECASE)
FETCH_PATH = "/_sim/kv/fetch"
RELEASE_PATH = "/_sim/kv/release"


class FatalHandOff(Exception):
    """Parameters at which a real engine dies."""


class TransferFailed(Exception):
    """The sending engine cannot be reached, or is another one than the hand-off names."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A hand-off as the decode side names it. ``block_ids`` are ids of the sending engine."""

    engine_id: str
    request_id: str
    host: str
    port: int
    block_ids: list[int]

    def answer(self, num_tokens: int, cached: int, *, push: bool = False) -> dict[str, Any]:
        """Return the ``kv_transfer_params`` of the prefill's answer, with the same keys as vLLM 0.33's.

        They are for ``num_tokens`` tokens of KV, of which ``cached`` were in the sender's prefix cache.
        """
        pull_alone = {"remote_blocks_expiry_time": None, "remote_registration_generation": 1}
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
            **({} if push else pull_alone),
            "transfer_mode": "push" if push else "pull",
            "remote_prefill_cached_tokens": cached,
        }


def read_offer(params: dict[str, Any], blocks_needed: int) -> Offer | None:
    """Return the hand-off in a decode request's ``kv_transfer_params``.

    Return None if the sender's address is incomplete. Raise FatalHandOff unless ``remote_block_ids`` has one
    group of at least ``blocks_needed`` block ids.
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


def read_registration(params: dict[str, Any], own_id: str) -> Offer:
    """Return what a decode engine to which is pushed needs of ``kv_transfer_params``, under its request's id.

    Raise FatalHandOff for keys that vLLM reads without a check.
    """
    try:
        engine_id, host, port = (params[f"remote_{key}"] for key in ("engine_id", "host", "port"))
        params["tp_size"]
    except KeyError as error:
        raise FatalHandOff(f"KeyError: {error}") from None
    return Offer(engine_id, own_id, host, port, [])


def base_id(request_id: str) -> str:
    """Return an engine's request id without the random digits at its end, as an engine that pushes does."""
    return _RANDOM_SUFFIX.sub("", request_id)


class FetchCall(msgspec.Struct):
    """Body of a fetch or a release. ``agent``: the sender's process, as known from the handshake."""

    engine_id: str
    request_id: str
    block_ids: list[int] = []
    agent: str | None = None


class FetchReply(msgspec.Struct):
    """Answer to a fetch.

    ``digest`` identifies the prompt of the blocks; None if they are not the hand-off's any more. ``invalid``:
    the sender has no such blocks.
    """

    agent: str
    digest: str | None = None
    invalid: bool = False
    unmatched: bool = False
    """The sender, which pushes, has no finished request of this id yet, and may never have."""
    tokens: int = 0
    """Of the prompt whose blocks were sent."""


class Connector:
    """Fetches and releases hand-offs of other engines. ``timeout`` in seconds, for each call."""

    def __init__(self, timeout: float = 10.0) -> None:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout))
        self._agents: dict[str, str] = {}

    async def close(self) -> None:
        """Close the connections to other engines."""
        await self._session.close()

    async def fetch(self, offer: Offer) -> FetchReply:
        """Fetch the blocks of a hand-off, or ask to be pushed them, and return what the sender says of them.

        Raise TransferFailed if the sender cannot be reached, FatalHandOff if it has no such blocks.
        """
        call = {**asdict(offer), "agent": self._agents.get(offer.engine_id)}
        status, body = await self._post(offer, FETCH_PATH, call)
        if status != 200:
            raise TransferFailed(f"{offer.host}:{offer.port} answered {status}")
        reply = msgspec.json.decode(body, type=FetchReply)
        # As with NIXL, there is one handshake for each engine id: an engine that was restarted with the same
        # id refuses all later calls.
        self._agents[offer.engine_id] = reply.agent
        if reply.invalid:
            raise FatalHandOff(f"block ids that {offer.engine_id} does not have")
        return reply

    async def release(self, offer: Offer) -> None:
        """Tell the sender that nobody will fetch a hand-off; it does not matter if that fails."""
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
