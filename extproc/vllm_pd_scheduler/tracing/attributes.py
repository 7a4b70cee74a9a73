"""Names of the spans' attributes, and what may stand in them."""

from __future__ import annotations

from typing import Final

from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from opentelemetry.semconv.attributes.http_attributes import (
    HTTP_REQUEST_METHOD,
    HTTP_REQUEST_RESEND_COUNT,
    HTTP_RESPONSE_STATUS_CODE,
    HTTP_ROUTE,
)
from opentelemetry.semconv.attributes.server_attributes import SERVER_ADDRESS, SERVER_PORT
from opentelemetry.semconv.attributes.url_attributes import URL_FULL, URL_PATH

__all__ = [
    "ERROR_TYPE",
    "HTTP_REQUEST_METHOD",
    "HTTP_REQUEST_RESEND_COUNT",
    "HTTP_RESPONSE_STATUS_CODE",
    "HTTP_ROUTE",
    "SERVER_ADDRESS",
    "SERVER_PORT",
    "URL_FULL",
    "URL_PATH",
]

# The conventions for GenAI are not stable, so these names are not imported.
OPERATION: Final = "gen_ai.operation.name"
MODEL: Final = "gen_ai.request.model"
INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
TTFT: Final = "gen_ai.latency.time_to_first_token"
"""Seconds; vLLM's own spans have it by this name."""

REQUEST_ID: Final = "pd_scheduler.request_id"
"""The request's ``X-Request-Id``."""
ID: Final = "pd_scheduler.id"
"""Our id of it: ``x-pd-id``."""
SERVED: Final = "pd_scheduler.served"
"""How it was served: as in ``pd_scheduler_requests_total``."""
CONTINUES_FROM: Final = "pd_scheduler.continues_from"
"""The D that has failed the answer of which this request is the rest."""
CONTINUES_AFTER: Final = "pd_scheduler.continues_after_tokens"
OUTCOME: Final = "pd_scheduler.outcome"
ROLE: Final = "pd_scheduler.role"
STRATEGY: Final = "pd_scheduler.strategy"
INSTANCE: Final = "pd_scheduler.instance"
PREDICTED: Final = "pd_scheduler.predicted_s"

MAX_TEXT: Final = 256
"""Characters of what a client has chosen that are kept."""


def text(value: str) -> str:
    """Return what a client has chosen, so short that it does no harm, and such that it can be encoded.

    JSON may have lone surrogates, for which an exporter drops the whole batch.
    """
    return value[:MAX_TEXT].encode("utf-8", "replace").decode()
