"""SGLang between simulated engines: P and D have a request at the same time, and meet in a room.

Source: ``sglang/srt/disaggregation`` of SGLang 0.5.23. The bootstrap server is the instance's own HTTP
server. P answers when D has its blocks. Each waits for the other for ``lease`` seconds of its profile.
"""

import asyncio
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp
import msgspec

from .handoff import Connector, FetchReply, TransferFailed
from .mooncake import sent_as
from .protocol import AnyBody, ApiError
from .request import HandOff

SWITCH_PATH = "/pd_role_switch"
ROOM_PATH = "/_sim/kv/room"


class SwitchCall(msgspec.Struct):
    """What the router asks for: ``--disaggregation-mode``, from now on."""

    new_role: Literal["prefill", "decode"]


class RoomCall(msgspec.Struct):
    """What D asks of P: the blocks of a room, or (``release``) to send none."""

    room: int
    release: bool = False


@dataclass(frozen=True, slots=True)
class Room:
    """A hand-off as the decode side names it."""

    host: str
    port: int
    number: int


class SglangConnector(Connector):
    """``role`` is the engine's ``--disaggregation-mode``."""

    answers_when_fetched = True
    headers_with_first_token = True

    def __init__(self, role: str, patience: float) -> None:
        super().__init__(2 * patience)
        self._role = role
        self._patience = patience

    def switch(self, role: str) -> None:
        """Be of the other mode from now on."""
        self._role = role

    def params(self, body: AnyBody) -> dict[str, Any]:
        """Return the room; raise ApiError without one: such an engine serves nothing alone."""
        if body.bootstrap_room is None or body.bootstrap_host is None:
            message = "Invalid request: Disaggregated request received without bootstrap room id."
            raise ApiError(400, message, "BadRequest")
        return {"room": body.bootstrap_room, "host": body.bootstrap_host, "port": body.bootstrap_port or 8998}

    def nth(self, params: dict[str, Any], number: int) -> dict[str, Any]:
        """Return the room of one of a batch's prompts."""
        return {**params, "room": params["room"] + number}

    def kind(self, params: dict[str, Any]) -> HandOff:
        """Return what all requests to an engine of a mode are."""
        return HandOff.SEND if self._role == "prefill" else HandOff.RECEIVE

    def request_id(self, params: dict[str, Any]) -> str | None:
        """Return the name by which D asks."""
        return sent_as(str(params["room"]))

    def read(self, params: dict[str, Any], blocks_needed: int) -> Room:
        """Return the room."""
        return Room(params["host"], params["port"], params["room"])

    def answer(self, *_: Any) -> None:
        """Return that P's answer says nothing of its hand-off."""

    async def fetch(self, offer: Room) -> FetchReply:
        """Wait for what P sends, as long as D does; one that has died is waited for too."""
        try:
            status, body = await self._call(offer)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            await asyncio.sleep(self._patience)
            raise TransferFailed(str(error)) from error
        reply = msgspec.json.decode(body, type=FetchReply) if status == 200 else None
        if reply is None or reply.late:
            raise TransferFailed("Decode transfer failed")
        return reply

    async def release(self, offer: Room) -> None:
        """Tell P that nobody takes what it would send."""
        with suppress(aiohttp.ClientError, TimeoutError, OSError):
            await self._call(offer, release=True)

    async def _call(self, offer: Room, *, release: bool = False) -> tuple[int, bytes]:
        host = f"[{offer.host}]" if ":" in offer.host else offer.host
        data = msgspec.json.encode(RoomCall(offer.number, release))
        async with self._session.post(f"http://{host}:{offer.port}{ROOM_PATH}", data=data) as response:
            return response.status, await response.read()


_SERIES = {
    "num_requests_running": "num_running_reqs",
    "num_requests_waiting": "num_queue_reqs",
    "kv_cache_usage_perc": "token_usage",
    "generation_tokens_total": "generation_tokens_total",
    "prompt_tokens_total": "prompt_tokens_total",
    "time_to_first_token_seconds": "time_to_first_token_seconds",
    "inter_token_latency_seconds": "inter_token_latency_seconds",
    "request_time_per_output_token_seconds": "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds": "e2e_request_latency_seconds",
}
_LINE = re.compile(r"(?:# \w+ )?vllm:(\w+?)(_bucket|_sum|_count|_created)?(?=[{ ])")


def metrics_page(page: bytes, capacity: int) -> bytes:
    """Return the page that SGLang has with ``--enable-metrics``, made of vLLM's."""
    lines = []
    for line in page.decode().splitlines():
        found = _LINE.match(line)
        if found is not None and found[1] in _SERIES:
            lines.append(line.replace(f"vllm:{found[1]}", f"sglang:{_SERIES[found[1]]}", 1))
    lines.append(f'sglang:max_total_num_tokens{{engine_type="unified"}} {capacity}')
    return "\n".join(lines).encode() + b"\n"
