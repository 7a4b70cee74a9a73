"""vLLM's ``MoRIIOConnector`` between simulated engines: D reads blocks, or has P write them.

Source: ``vllm/distributed/kv_transfer/kv_connector/v1/moriio`` of vLLM 0.32. Both of an engine's ports are
that of its HTTP server.
"""

from typing import Any

from .handoff import Connector, FatalHandOff, Offer
from .mooncake import sent_as
from .request import HandOff

_ADDRESS = ("remote_host", "remote_handshake_port", "remote_notify_port")


class MoriioConnector(Connector):
    """``address`` is the server's own host and port; with ``writes`` a P sends only to the D it was told.

    The engine is the one with ``rank`` of ``size``.
    """

    sends_stopped = False

    def __init__(self, address: str, *, writes: bool, rank: int = 0, size: int = 1) -> None:
        super().__init__()
        self._writes = writes
        self._rank, self._size = rank, size
        self.address = f"{address}/{rank}" if writes else None

    def kind(self, params: dict[str, Any]) -> HandOff:
        """An engine that is to write or be written to, and is not told where the other is, dies."""
        kind = super().kind(params)
        if self._writes and kind is not HandOff.NONE and not all(params.get(key) for key in _ADDRESS):
            raise FatalHandOff(f"ValueError: need {', '.join(_ADDRESS)}, got {sorted(params)}")
        if kind is HandOff.RECEIVE and not (params.get("remote_block_ids") and "remote_engine_id" in params):
            return HandOff.NONE
        return kind

    def request_id(self, params: dict[str, Any]) -> str | None:
        """Return the transfer id."""
        return sent_as(params["transfer_id"]) if "transfer_id" in params else None

    def receiver(self, params: dict[str, Any]) -> str | None:
        """Return the address of the engine to which a prefill is written."""
        if not self._writes:
            return None
        rank = params.get("remote_dp_rank", 0)
        return f"{params['remote_host']}:{params['remote_notify_port']}/{rank}"

    def answer(
        self, offer: Offer, params: dict[str, Any], num_tokens: int, cached: int
    ) -> dict[str, Any] | None:
        """Return the ``kv_transfer_params`` of a prefill's answer, with the same keys as vLLM's."""
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [offer.block_ids],
            "remote_engine_id": offer.engine_id,
            "remote_host": offer.host,
            "remote_handshake_port": offer.port,
            "remote_notify_port": offer.port,
            "remote_dp_rank": self._rank,
            "remote_dp_rank_override": True,
            "remote_dp_size": self._size,
            "remote_dp_size_local": self._size,
            "tp_size": 1,
            "transfer_id": params.get("transfer_id") or offer.request_id,
            "remote_prefill_cached_tokens": cached,
        }

    def read(self, params: dict[str, Any], blocks_needed: int) -> Offer:
        """Return the hand-off that a decode request names."""
        (blocks,) = params["remote_block_ids"]
        if len(blocks) < blocks_needed:
            raise FatalHandOff(f"{len(blocks)} remote blocks for a prompt of {blocks_needed}")
        name, host, port = params.get("transfer_id", ""), params["remote_host"], params["remote_notify_port"]
        return Offer(params["remote_engine_id"], sent_as(name), host, port, blocks, self.address)
