"""Names that inference gateways and the scheduler agree on, beside those of ``headers.py``.

They are those of the endpoint-picker protocol, of Envoy, and of proxies at an instance.
"""

from __future__ import annotations

from typing import Final

SERVED: Final = "x-gateway-destination-endpoint-served"
"""Metadata by which a gateway tells who has answered: ``ip:port``."""

SUBSET: Final = "x-gateway-destination-endpoint-subset"
"""Metadata by which a gateway tells to which endpoints a request may go: ``ip:port`` or ``ip``, a list or one
string with commas."""

LB_METADATA: Final = "envoy.lb"
"""Namespace of the metadata that has the destination, as the header has it, and who has answered."""

SUBSET_METADATA: Final = "envoy.lb.subset_hint"
"""Namespace of the metadata that has the subset."""

MAX_RETRIES: Final = "x-envoy-max-retries"
"""How often a gateway's Envoy may try again, if it takes that from the scheduler. No instance sees it."""

PREFILLER: Final = "x-prefiller-host-port"
"""``ip:port`` of the P that llm-d's sidecar at D asks for the prefill."""

STEERS_INSTANCES: Final = frozenset(
    {
        "x-data-parallel-rank",
        "x-data-parallel-host-port",
        PREFILLER,
        "x-encoder-hosts-ports",
        "x-kv-cache-source-host-port",
    }
)
"""Headers by which vLLM, or a proxy before it, is told where work is to be done: no client's."""
