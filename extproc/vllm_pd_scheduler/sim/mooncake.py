"""vLLM's ``MooncakeConnector`` between simulated engines: hand-offs have names that the router has chosen.

Source: ``vllm/distributed/kv_transfer/kv_connector/v1/mooncake`` of vLLM 0.32. The bootstrap server is the
instance's own HTTP server, and its workers are asked by HTTP.
"""

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec

from .handoff import Connector, FatalHandOff, FetchReply, TransferFailed
from .request import HandOff

QUERY_PATH = "/query"
PULL_PATH = "/_sim/kv/pull"
ATTEMPTS = 3
"""To ask a bootstrap server that cannot be reached."""
PATIENCE_S = 60.0
"""For which a receiver waits longer than the sender, which is to give up first."""


class PullCall(msgspec.Struct):
    """Body of a pull; with ``release`` nothing is read."""

    engine_id: str
    transfer_id: str
    release: bool = False


@dataclass(frozen=True, slots=True)
class Pull:
    """A hand-off as the decode side names it."""

    transfer_id: str
    engine_id: str
    bootstrap: str
    """Base URL of the sender's bootstrap server."""


def query_answer(engine_ids: Iterable[str], host: str, port: int) -> dict[str, Any]:
    """Return what a bootstrap server says of engines, by rank, whose models are not parallel."""
    address = {"0": {"0": f"tcp://{host}:{port}"}}
    return {str(rank): {"engine_id": id, "worker_addr": address} for rank, id in enumerate(engine_ids)}


class MooncakeConnector(Connector):
    """Pulls hand-offs. ``role`` is that of the engine: ``prefill`` is a ``kv_producer``.

    A sender that does not know a transfer id waits for it, ``lease`` seconds. One that has died is waited
    for as well, if it was known.
    """

    sends_stopped = False

    def __init__(self, role: str, lease: float) -> None:
        super().__init__(lease + PATIENCE_S)
        self._role = role
        self._patience = lease + PATIENCE_S
        self._workers: dict[str, str] = {}
        """Base URLs by engine id."""

    def kind(self, params: dict[str, Any]) -> HandOff:
        """Without its name there is no hand-off. An engine of the other role dies, by an assertion."""
        kind = super().kind(params)
        if (kind, self._role) in ((HandOff.RECEIVE, "prefill"), (HandOff.SEND, "decode")):
            raise FatalHandOff(f"AssertionError: {kind.value} at a {self._role} engine")
        needed = ["transfer_id"]
        if kind is HandOff.RECEIVE:
            needed += ["remote_bootstrap_addr", "remote_engine_id"]
        return kind if all(params.get(key) for key in needed) else HandOff.NONE

    def request_id(self, params: dict[str, Any]) -> str | None:
        """Return the transfer id."""
        return sent_as(params["transfer_id"])

    def read(self, params: dict[str, Any], blocks_needed: int) -> Pull:
        """Return the hand-off that a decode request names."""
        return Pull(params["transfer_id"], params["remote_engine_id"], params["remote_bootstrap_addr"])

    def answer(self, *_: Any) -> None:
        """Return that a prefill's answer says nothing of its hand-off."""

    async def fetch(self, offer: Pull) -> FetchReply:
        """Pull a hand-off; see :meth:`.handoff.Connector.fetch`."""
        reply = await self._pull(offer)
        if reply.late:
            raise TransferFailed("Timeout waiting for P side ready.")
        return reply

    async def release(self, offer: Pull) -> None:
        """Pull nothing of a hand-off, so that its sender frees it."""
        with suppress(TransferFailed):
            await self._pull(offer, release=True)

    async def _pull(self, offer: Pull, *, release: bool = False) -> FetchReply:
        if offer.engine_id not in self._workers:
            await self._ask(offer.bootstrap)
        worker = self._workers.get(offer.engine_id)
        if worker is None:
            raise TransferFailed(f"remote engine_id {offer.engine_id} not found")
        data = msgspec.json.encode(PullCall(offer.engine_id, offer.transfer_id, release))
        try:
            async with self._session.post(worker + PULL_PATH, data=data) as response:
                if response.status == 200:
                    return msgspec.json.decode(await response.read(), type=FetchReply)
        except (aiohttp.ClientError, OSError):
            pass
        await asyncio.sleep(self._patience)  # ZeroMQ goes on to look for it
        raise TransferFailed(f"{worker} has not answered")

    async def _ask(self, bootstrap: str) -> None:
        for attempt in range(ATTEMPTS):
            try:
                async with self._session.get(bootstrap + QUERY_PATH) as response:
                    engines = await response.json()
                for engine in engines.values():
                    address = engine["worker_addr"]["0"]["0"]
                    self._workers[engine["engine_id"]] = "http" + address.removeprefix("tcp")
                return
            except (aiohttp.ClientError, OSError) as error:
                if attempt == ATTEMPTS - 1:
                    raise TransferFailed(str(error)) from error
                await asyncio.sleep(0.1)
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise TransferFailed(f"bootstrap server {bootstrap}: {error}") from error


def sent_as(transfer_id: str) -> str:
    """Return the name of the prefill that is handed over under a transfer id."""
    return f"xfer:{transfer_id}"
