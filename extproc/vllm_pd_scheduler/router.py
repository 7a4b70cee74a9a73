"""The core that everything calls: parse, pick P, prefill, pick D, and give back what was reserved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from . import headers as names
from .body import BodyError, JsonBody, strip_handoff
from .config import SchedulerConfig
from .connectors import Connector, Handoff, NixlConnector
from .errors import Reject, reject
from .models import InstanceRole, PDInstance, RequestContext
from .registry import Endpoint, HealthPolicy, Registry, Reservation
from .scheduler import Scheduler
from .telemetry import Served, Telemetry

SPLIT_PATHS = frozenset({"/v1/completions", "/v1/chat/completions"})
"""Paths whose POST requests are split in prefill and decode. All others go to decode as they are."""


@dataclass(frozen=True, slots=True)
class PrefillAnswer:
    """What a prefill instance answered, its body whole."""

    status: int
    content_type: str
    body: bytes


class PrefillFailed(Exception):
    """No answer came: ``args[0]`` is a short reason, for metrics and logs."""


class PrefillLeg(Protocol):
    """Sends the prefill request; the only I/O between a request's arrival and its forwarding."""

    async def __call__(
        self, endpoint: Endpoint, path: str, headers: Mapping[str, str], body: bytes
    ) -> PrefillAnswer:
        """Return the answer, whatever its status; raises :exc:`PrefillFailed` if there is none."""
        ...


@dataclass(slots=True, eq=False)
class Forward:
    """Where a request goes: to the first of ``decode`` that accepts a connection.

    ``body`` is ``None`` when the client's passes unchanged; ``handoff_at`` is the offset in it at which the
    hand-off starts, if there is one. ``release`` must be called when the answer has ended, however it ended.
    """

    decode: list[Endpoint]
    prefill: Endpoint | None
    body: bytes | None
    handoff_at: int | None
    remove_headers: list[str]
    reservation: Reservation

    def headers(self) -> dict[str, str]:
        """Headers to set on the request to decode."""
        found = {names.DESTINATION: ",".join(str(endpoint.address) for endpoint in self.decode)}
        if self.prefill is not None:
            found[names.PREFILL] = self.prefill.id
        if self.body is not None:
            found["content-length"] = str(len(self.body))
        if self.handoff_at is not None:
            found[names.HANDOFF_AT] = str(self.handoff_at)
        if (key := self.decode[0].instance.api_key) is not None:
            found["authorization"] = f"Bearer {key}"
        return found

    def release(self) -> None:
        """Give back the reservation. Doing it twice is the same as once."""
        self.reservation.release()


class PDRouter:
    """Routes requests to the instances of a fleet whose prefill and decode are separate.

    ``route`` is what the ext_proc server calls. A script without Envoy uses ``register_instance``,
    ``run_health_checks`` and ``route_request``, which block until they are done and must not be called
    from a running event loop.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        prefill_leg: PrefillLeg | None = None,
        connector: Connector | None = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        self.config = config
        self.registry = Registry(HealthPolicy(config.unhealthy_threshold, config.healthy_threshold))
        for instance in config.instances():
            self.registry.add(instance)
        self.scheduler = Scheduler(config, self.registry)
        self.telemetry = telemetry or Telemetry(self.registry)
        self.connector = connector or NixlConnector()
        self.prefill_leg = prefill_leg

    # -- instances

    def register_instance(self, instance: PDInstance) -> None:
        """Add an instance; it takes requests once a health check found it serving.

        Raises :exc:`~vllm_pd_scheduler.registry.DuplicateInstance`.
        """
        self.registry.add(instance)

    def unregister_instance(self, instance_id: str) -> None:
        """Forget an instance; raises :exc:`~vllm_pd_scheduler.registry.UnknownInstance`."""
        self.registry.remove(instance_id)

    def drain_instance(self, instance_id: str) -> None:
        """Send an instance nothing new; raises :exc:`~vllm_pd_scheduler.registry.UnknownInstance`."""
        self.registry.drain(instance_id)

    def get_instances(self, role: InstanceRole | None = None) -> list[PDInstance]:
        """Return the registered instances, or those of one role."""
        return [endpoint.instance for endpoint in self.registry.endpoints(role)]

    # -- the request path

    async def route(self, headers: Mapping[str, str], body: bytes) -> Forward | Reject:
        """Decide where a request goes, prefilling it first where that is possible.

        ``headers`` has lower-case names, with the pseudo headers ``:method`` and ``:path``. Cancelling
        the call cancels the prefill.
        """
        path = headers.get(":path", "/").partition("?")[0]
        try:
            if path in SPLIT_PATHS and headers.get(":method") == "POST":
                outcome = await self._split(path, headers, JsonBody.parse(body))
            else:
                clean = strip_handoff(body)
                context = RequestContext(path, None, len(body), headers)
                outcome = self._to_decode(context, None if clean is body else clean, None, Served.PASSED)
        except BodyError as error:
            outcome = reject(400, str(error), "bad_body")
        if isinstance(outcome, Reject):
            self.telemetry.rejected(outcome)
        return outcome

    async def _split(self, path: str, headers: Mapping[str, str], body: JsonBody) -> Forward | Reject:
        model = body.get("model")
        context = RequestContext(path, model if isinstance(model, str) else None, len(body.raw), headers)
        if not self.registry.routable(InstanceRole.DECODE):
            return self._no_decode()
        changed = body.raw if body.stripped else None
        if not self.connector.can_split(body):
            return self._to_decode(context, changed, None, Served.WHOLE)
        prefilled = await self._prefill(context, headers, body)
        if isinstance(prefilled, Reject):
            return prefilled
        if prefilled is None:
            return self._to_decode(context, changed, None, Served.LOCAL)
        endpoint, handoff = prefilled
        spliced, at = self.connector.decode_body(body, handoff)
        return self._to_decode(context, spliced, endpoint, Served.SPLIT, at)

    async def _prefill(
        self, context: RequestContext, headers: Mapping[str, str], body: JsonBody
    ) -> tuple[Endpoint, Handoff] | Reject | None:
        """Prefill on one instance after another, up to ``max_retries`` more; ``None``: let decode do it."""
        if self.prefill_leg is None:
            return None
        tried: list[Endpoint] = []
        leg_body = b""
        while len(tried) <= self.config.max_retries:
            picked = self.scheduler.pick(InstanceRole.PREFILL, context, exclude=tried)
            if not picked:
                break
            endpoint = picked[0]
            tried.append(endpoint)
            leg_body = leg_body or self.connector.prefill_body(body)
            reservation = self.registry.reserve(endpoint)
            try:
                with self.telemetry.prefill(endpoint):
                    answer = await self.prefill_leg(endpoint, context.path, headers, leg_body)
            except PrefillFailed as error:
                self.telemetry.prefill_failed(endpoint, str(error))
                continue
            finally:
                reservation.release()
            if answer.status == 200:
                handoff = self.connector.handoff(answer.body)
                if handoff is None:
                    self.telemetry.prefill_failed(endpoint, "no_handoff")
                    return None
                return endpoint, handoff
            if _is_the_clients_fault(answer.status):
                return Reject(
                    answer.status, answer.body, {"content-type": answer.content_type}, "prefill_4xx"
                )
            self.telemetry.prefill_failed(endpoint, f"status_{answer.status}")
        return None

    def _to_decode(
        self,
        context: RequestContext,
        body: bytes | None,
        prefill: Endpoint | None,
        served: Served,
        handoff_at: int | None = None,
    ) -> Forward | Reject:
        picked = self.scheduler.pick(InstanceRole.DECODE, context, count=1 + self.config.max_retries)
        if not picked:
            return self._no_decode()
        # A connection that fails goes to the next in the list, with the same headers: same key only.
        key = picked[0].instance.api_key
        decode = [endpoint for endpoint in picked if endpoint.instance.api_key == key]
        self.telemetry.forwarded(decode[0], served)
        remove = [name for name in context.headers if name.startswith(names.STEERING_PREFIXES)]
        return Forward(decode, prefill, body, handoff_at, remove, self.registry.reserve(decode[0]))

    def _no_decode(self) -> Reject:
        endpoints = self.registry.endpoints(InstanceRole.DECODE)
        states = ", ".join(f"{e.id} is {e.state}" for e in endpoints[:8]) or "none is registered"
        return reject(503, f"No decode instance can serve this request now: {states}.", "no_decode")

    # -- without Envoy

    def run_health_checks(self) -> dict[str, bool]:
        """Probe every instance once; return whether each can serve, by id. Blocks up to the timeout."""
        from .direct import check_all

        return check_all(self)

    def route_request(self, body: Mapping[str, Any]) -> RouteResult:
        """Serve one request (the body of a completion or chat completion), prefill then decode.

        Blocks until the whole answer is there. Never raises for what happens to the request: see
        :attr:`RouteResult.error`. Health checks run first if none has been run yet.
        """
        from .direct import serve_one

        return serve_one(self, body)


@dataclass(frozen=True, slots=True)
class RouteResult:
    """How a request of :meth:`PDRouter.route_request` ended.

    ``instance`` is the decode instance that answered, ``prefill_instance`` the one that prefilled, if
    one did. ``response`` is the decoded answer; if there is none, ``error`` says why.
    """

    success: bool
    instance: PDInstance | None = None
    prefill_instance: PDInstance | None = None
    status: int = 0
    response: dict[str, Any] | None = None
    error: str | None = None


def _is_the_clients_fault(status: int) -> bool:
    """Whether another instance would answer the same. Timeouts and overload are the instance's own."""
    return 400 <= status < 500 and status not in (408, 429)
