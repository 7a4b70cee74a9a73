"""Names of the headers that Envoy, the scheduler and clients agree on. ``envoy/envoy.yaml`` has them too."""

from __future__ import annotations

from typing import Final

from .gateway_names import STEERS_INSTANCES

ENVOY_CONFIG: Final = "pd-envoy-config"
"""Metadata of Envoy's ext_proc calls: the version of ``envoy/envoy.yaml`` that it runs on."""

ENVOY_CONFIG_VERSION: Final = "5"
"""The version that this scheduler needs. It changes with what the two must agree on: 2 is hand-offs as
dynamic metadata, 3 the log of results, 4 hand-offs for those D alone that can use them, and the client's
request id beside D's, 5 data-parallel ranks, and new prefills for further attempts at a D that serves
nothing alone."""

_NOT_BEFORE_5: Final = "no D may have a data_parallel_size, and requests to SGLang have no further attempts"
_NOT_BEFORE_4: Final = (
    "the health of a model is not known, a client's x-request-id can come back as another one, P and D of"
    f" several revisions must not run together, and {_NOT_BEFORE_5}"
)
ENVOY_CONFIGS_THAT_WORK: Final = {
    "2": f"how they end and when their first token comes is not known, {_NOT_BEFORE_4}",
    "3": _NOT_BEFORE_4,
    "4": _NOT_BEFORE_5,
}
"""Earlier versions, and what does not work with them."""

DESTINATION: Final = "x-gateway-destination-endpoint"
"""Where Envoy's override_host policy sends a request: ``ip:port,ip:port``, the first that works.
The name is that of the Gateway API inference extension."""

ID: Final = "x-pd-id"
"""Our own id of a request, under which Envoy tells of attempts that failed. A client cannot choose it."""

RANK: Final = "x-data-parallel-rank"
"""By which vLLM chooses among the engines of an instance: ours on both legs where there are several, never a
client's."""

RANK_SHOWN: Final = "x-pd-rank"
"""A colon and the rank that a request is sent to, for ``DECODE`` on its answer; Envoy sets it."""

REQUEST_ID: Final = "x-request-id"
"""The client's id of a request, or one that Envoy has made. Log lines and answers have it."""

CLIENT_REQUEST_ID: Final = "x-pd-request-id"
"""The client's ``REQUEST_ID`` on a request to decode that has another one, since the hand-off needs that."""

HOST: Final = "x-pd-host"
"""``ip:port`` of the D that Envoy has chosen for an attempt, known to its filter of cluster ``decode``."""

ATTEMPT: Final = "x-envoy-attempt-count"
"""Envoy's count of attempts at decode, from 1."""

FIRST_BYTE_TIMEOUT: Final = "x-envoy-upstream-rq-per-try-timeout-ms"
"""How long Envoy waits for the first byte of an attempt's answer, in ms; an answer that began may go on."""

RETRIABLE_STATUS_CODES: Final = "x-envoy-retriable-status-codes"
"""Statuses, separated by commas, after which Envoy tries another D for this request too."""

STREAM: Final = "x-pd-stream"
"""``true`` on a request whose answer is streamed: Envoy then limits the pauses of its answer."""

CONNECTION: Final = "x-pd-connection"
"""Envoy's response flags (``UF``, ``UC``, …) on the answers of its prefill listener: whether they are P's."""

PREFILL: Final = "x-pd-prefill"
"""Id of the instance that prefilled, on the request to decode and on the answer."""

LATER: Final = "(later)"
"""In its place where D asks for the prefill, and P is chosen then. No instance has such an id."""

DECODE: Final = "x-pd-decode"
"""Id of the instance that answered, on the answer. Envoy adds it, from the endpoint that it used."""

CACHED_TOKENS: Final = "x-pd-cached-tokens"
"""How many tokens of the prompt P had cached, where the answer's ``usage`` cannot say it: on the request to
decode, and on the answer."""

DECISION: Final = "x-pd-decision"
"""Why a request went where it went, in a line: on the request to decode, and on the answer, if asked for."""

REASON: Final = "x-pd-reason"
"""Why the scheduler refused a request, in one word, on its own answers."""

PRIORITY: Final = "x-pd-priority"
"""A client's: a whole number, higher is served first when requests have to wait; 0 without it."""

TENANT: Final = "x-pd-tenant"
"""A client's: whom the request counts for when those who wait are served in turn."""

TTFT_SLO: Final = "x-pd-ttft-slo-ms"
"""A client's: milliseconds to the first token that it asks for."""

TPOT_SLO: Final = "x-pd-tpot-slo-ms"
"""A client's: milliseconds for each further token that it asks for."""

OBJECTIVE: Final = ("x-llm-d-inference-objective", "x-gateway-inference-objective")
"""A client's, as llm-d names it now, and before: the objective whose priority it has, if it says none."""

FAIRNESS_ID: Final = ("x-llm-d-inference-fairness-id", "x-gateway-inference-fairness-id")
"""A client's likewise: its tenant, if none is said."""

LLMD_TTFT_SLO: Final = ("x-llm-d-slo-ttft-ms", "x-slo-ttft-ms")
"""A client's likewise: ``TTFT_SLO``, and may have a fraction."""

LLMD_TPOT_SLO: Final = ("x-llm-d-slo-tpot-ms", "x-slo-tpot-ms")
"""A client's likewise: ``TPOT_SLO``, and may have a fraction."""

DROPPED_REASON: Final = "x-llm-d-request-dropped-reason"
"""Why the scheduler refused a request that it could serve at another time, in llm-d's words."""

EXPLAIN: Final = "x-pd-explain"
"""A client's: ``1`` asks for ``DECISION`` on the answer."""

CONTINUE: Final = "x-pd-continue"
"""A client's: ``true`` asks that another D goes on with the stream if its D dies. Envoy alone reads it."""

CONTINUES: Final = "x-pd-continues"
"""On a request for the rest of an answer that has broken off: a key of the schedulers', how many tokens the
client has, and the D that has failed it. It goes no further than the scheduler."""

CONTINUED_FROM: Final = "x-pd-continued-from"
"""That D and the number of tokens, ``ID/TOKENS``, on the request to decode, for Envoy's log."""

ASKED: Final = (PRIORITY, TENANT, TTFT_SLO, TPOT_SLO, EXPLAIN, CONTINUE)
"""Headers by which a client asks for something. The instance does not get them."""

STEERING_PREFIXES: Final = ("x-pd-", DESTINATION, "x-override-", *STEERS_INSTANCES)
"""Headers that only the scheduler sets, those that only it reads, and those by which SGLang takes a room; a
client's go no further."""

TRACEPARENT: Final = "traceparent"
"""W3C Trace Context: the trace that a request belongs to, and its caller's span."""

TRACESTATE: Final = "tracestate"
"""What tracing systems add to that."""

FORWARDED_TO_PREFILL: Final = (
    REQUEST_ID,
    TRACEPARENT,
    TRACESTATE,
    "baggage",
    "authorization",
    "content-type",
    "origin",
)
"""Headers of the client's request that the prefill leg keeps."""

KEPT_FROM_PREFILL: Final = (
    "retry-after",
    "www-authenticate",
    "access-control-allow-origin",
    "access-control-allow-credentials",
    "access-control-expose-headers",
    "vary",
)
"""Headers of P's answer that the client gets with it when it is an error, beside its content type."""
