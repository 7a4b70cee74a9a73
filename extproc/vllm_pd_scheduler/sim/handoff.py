"""The hand-off between two simulated engines: ``kv_transfer_params``, and an HTTP call for the transfer.

Real engines read each other's blocks by NIXL. Here the decode side posts the ids of the blocks that it would
read to ``/_sim/kv/fetch`` of the prefill side, whose answer says of which prompt they are.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp
import msgspec

from .protocol import AnyBody
from .request import HandOff

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
    receiver: str | None = None
    """Address of the receiving engine, if the sender is to write to it."""

    def answer(self, num_tokens: int, cached: int) -> dict[str, Any]:
        """Return the ``kv_transfer_params`` of the prefill's answer, with the same keys as vLLM 0.33's.

        They are for ``num_tokens`` tokens of KV, of which ``cached`` were in the sender's prefix cache.
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
            "remote_registration_generation": 1,
            "transfer_mode": "pull",
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


class FetchCall(msgspec.Struct):
    """Body of a fetch or a release. ``agent``: the sender's process, as known from the handshake."""

    engine_id: str
    request_id: str
    block_ids: list[int] = []
    receiver: str | None = None
    agent: str | None = None


class FetchReply(msgspec.Struct):
    """Answer to a fetch.

    ``digest`` identifies the prompt of the blocks; None if they are not the hand-off's any more. ``invalid``:
    the sender has no such blocks.
    """

    agent: str
    digest: str | None = None
    invalid: bool = False
    late: bool = False
    """Whether the sender has waited for the hand-off in vain."""
    unmatched: bool = False
    """The sender, which pushes, has no finished request of this id yet, and may never have."""
    tokens: int = 0
    """Of the prompt whose blocks were pushed."""


class Connector:
    """What an engine says and reads of hand-offs, and how it fetches them: here as NIXL does.

    ``timeout`` in seconds, for each call to another engine.
    """

    sends_stopped = True
    """Whether a prefill that has ended by a stop is handed over too."""
    answers_when_fetched = False
    """Whether a prefill is of one token, whatever is asked for, and answered when its blocks were fetched."""
    headers_with_first_token = False
    """Whether the headers of a stream come with its first token, or error."""
    pushes = False
    """Whether the sender writes, and finds what it is asked for by the receiver's request id."""

    def __init__(self, timeout: float = 10.0) -> None:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout))
        self._agents: dict[str, str] = {}

    def kind(self, params: dict[str, Any]) -> HandOff:
        """Return what a request's ``kv_transfer_params`` ask for; raise FatalHandOff if the engine dies."""
        if params.get("do_remote_prefill"):
            return HandOff.RECEIVE
        return HandOff.SEND if params.get("do_remote_decode") else HandOff.NONE

    def params(self, body: AnyBody) -> dict[str, Any]:
        """Return what a request says of hand-offs; raise ApiError if the engine does not serve that."""
        return body.kv_transfer_params or {}

    def nth(self, params: dict[str, Any], number: int) -> dict[str, Any]:
        """Return the same of one of a request's prompts."""
        return params

    def request_id(self, params: dict[str, Any]) -> str | None:
        """Return the name under which a prefill is kept, if the request gives one."""
        return None

    def receiver(self, params: dict[str, Any]) -> str | None:
        """Return the address of the only engine that may have a prefill."""
        return None

    def read(self, params: dict[str, Any], blocks_needed: int) -> Any:
        """Return the hand-off that a decode request names; see :func:`read_offer`."""
        return read_offer(params, blocks_needed)

    lends = True
    """Whether blocks of a prefill that was done are kept until another engine has fetched them."""
    awaits_push = False
    """Whether blocks that wait to be written are kept until they are, also when the client has left."""

    def allocated(self, offer: Any, request_id: str, blocks: list[int], cached: int) -> Any:
        """Return the hand-off as it is fetched into these blocks, the first ``cached`` tokens excepted."""
        return offer

    async def push(self, params: dict[str, Any], request_id: str, digest: str) -> None:
        """Write a prefill to the engine that waits for it, if the protocol has that."""

    def named(self, offer: Any, own_id: str, digest: str) -> Any:
        """Return the hand-off as the decode request with this id asks for it; ``digest`` is of its prompt."""
        return offer

    def answer(
        self, offer: Offer, params: dict[str, Any], num_tokens: int, cached: int
    ) -> dict[str, Any] | None:
        """Return the ``kv_transfer_params`` of a prefill's answer."""
        return offer.answer(num_tokens, cached)

    def store(self, params: dict[str, Any], digest: str) -> None:
        """Keep a copy of a prompt that was read outside of the engine."""

    async def found_at_source(self, params: dict[str, Any], hashes: Sequence[int]) -> int:
        """Return how many of a prompt's blocks are to be had from an instance that a request names."""
        return 0

    async def close(self) -> None:
        """Close the connections to other engines."""
        await self._session.close()

    async def fetch(self, offer: Any) -> FetchReply:
        """Fetch the blocks of a hand-off and return what the sender says of them.

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

    async def release(self, offer: Any) -> None:
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
