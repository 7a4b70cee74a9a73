"""vllm-ascend's ``MooncakeConnectorV1`` and ``MooncakeHybridConnector``: the flow of NIXL, with more in it.

P answers where the blocks are and how it is divided, and D pulls them. Source:
``vllm_ascend/distributed/kv_transfer/kv_p2p`` of August 2026.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec.structs import replace

from .base import Handoff, Legs, Settings
from .nixl import NixlConnector
from .one_token import UNREADABLE

_Size = Annotated[int, msgspec.Meta(ge=1, lt=1 << 16)]
_Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
_Text = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
_Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]


class AscendMooncakeSettings(Settings, frozen=True):
    """For how long P keeps the blocks."""

    lease: _Seconds = 480.0
    """``VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT``, seconds."""


class _TransferParams(msgspec.Struct):
    """The part of P's ``kv_transfer_params`` beyond NIXL's that D's engine uses without a check."""

    remote_request_id: _Text
    remote_pcp_size: _Size = 1
    remote_dcp_size: _Size = 1
    remote_ptp_size: _Size | None = None
    last_token_id: _Count | None = None
    remote_multi_nodes_meta_mapping: dict[str, Any] = {}
    num_prompt_blocks: _Count = 0
    remote_block_size: _Count = 0


_decode_params = msgspec.json.Decoder(_TransferParams).decode


class AscendMooncakeConnector(NixlConnector):
    """P answers with ``kv_transfer_params``, D gets them unchanged. After a stop P hands nothing over."""

    settings_type = AscendMooncakeSettings
    past_stop = True

    def handoff(self, answer: bytes, legs: Legs) -> Handoff | None:
        """Return P's ``kv_transfer_params`` if they have all that D needs, else ``None``."""
        found = super().handoff(answer, legs)
        if found is None:
            return None
        try:
            _decode_params(found.params)
        except UNREADABLE:
            return None
        return replace(found, lease=legs.prefill.settings.lease)
