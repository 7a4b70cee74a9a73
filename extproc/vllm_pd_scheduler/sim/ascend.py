"""vllm-ascend's ``MooncakeConnectorV1`` between simulated engines: NIXL's way, with other names.

Source: ``vllm_ascend/distributed/kv_transfer/kv_p2p/mooncake_connector.py`` of August 2026.
"""

from typing import Any

from .handoff import Connector, FatalHandOff, Offer, read_offer


class AscendConnector(Connector):
    """Hands over nothing after a stop. The blocks are one flat list, and D dies of what is missing."""

    sends_stopped = False

    def answer(
        self, offer: Offer, params: dict[str, Any], num_tokens: int, cached: int
    ) -> dict[str, Any] | None:
        """Return the ``kv_transfer_params`` of a prefill's answer, with the same keys as vllm-ascend's."""
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": offer.block_ids,
            "remote_engine_id": offer.engine_id,
            "remote_request_id": offer.request_id,
            "remote_host": offer.host,
            "remote_port": offer.port,
            "remote_pcp_size": 1,
            "remote_dcp_size": 1,
            "remote_ptp_size": 1,
            "last_token_id": 1,
            "remote_multi_nodes_meta_mapping": {},
            "num_prompt_blocks": len(offer.block_ids),
            "remote_block_size": 128,
        }

    def read(self, params: dict[str, Any], blocks_needed: int) -> Offer:
        """Return the hand-off that a decode request names."""
        offer = read_offer({**params, "remote_block_ids": [params.get("remote_block_ids")]}, blocks_needed)
        if offer is None:
            raise FatalHandOff(f"KeyError: one of remote_engine_id, … in {sorted(params)}")
        return offer
