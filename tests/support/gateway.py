"""An Envoy that asks the scheduler as inference gateways do: ``envoy/gateway.yaml``, and variants of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from tests.support.processes import Client, Process, Stack, spawned, unused_ports
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until
from vllm_pd_scheduler.envoy.process import find_envoy

CONFIG = Path(__file__).parents[2] / "envoy" / "gateway.yaml"
UNDELIVERED = "connect-failure,refused-stream,reset-before-request"


@dataclass
class Gateway:
    """What a gateway's Envoy is configured to do; the defaults are those of the file that ships.

    ``cluster``: ``decode`` (override_host) or ``original_dst``. ``source``: where override_host reads the
    destination, ``header`` or ``metadata`` alone; ``None``: either. ``response_body``: the mode of the
    response's body. ``subset``: of which endpoints it asks for one, as a list or one string with commas.
    ``tells_served``: whether override_host tells who has answered. ``trailers``: whether HTTP/1 has them.
    """

    cluster: str = "decode"
    source: str | None = None
    tls: bool = False
    failure_mode_allow: bool = True
    response_body: str = "FULL_DUPLEX_STREAMED"
    response_trailers: str = "SEND"
    retry_on: str = UNDELIVERED
    subset: list[str] | str | None = None
    tells_served: bool = True
    forwards_metadata: bool = True
    trailers: bool = False
    initial_metadata: dict[str, str] = field(default_factory=dict)
    ext_proc: dict[str, Any] = field(default_factory=dict)
    """Settings of the filter that are put over the file's."""

    def render(self, port: int, admin_port: int, grpc_port: int) -> dict[str, Any]:
        """Return the configuration of an Envoy on these ports."""
        config: dict[str, Any] = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
        config["admin"]["address"]["socket_address"]["port_value"] = admin_port
        (listener,) = config["static_resources"]["listeners"]
        listener["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": port}
        manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
        (host,) = manager["route_config"]["virtual_hosts"]
        (route,) = host["routes"]
        route["route"]["cluster"] = self.cluster
        route["route"]["retry_policy"]["retry_on"] = self.retry_on
        self._filter(manager["http_filters"])
        if self.trailers:
            manager["http_protocol_options"] = {"enable_trailers": True}
        for cluster in config["static_resources"]["clusters"]:
            if cluster["name"] in ("scheduler", "xds"):
                (locality,) = cluster["load_assignment"]["endpoints"]
                (endpoint,) = locality["lb_endpoints"]
                address = {"address": "127.0.0.1", "port_value": grpc_port}
                endpoint["endpoint"] = {"address": {"socket_address": address}}
                if self.tls:
                    cluster["transport_socket"] = _any_certificate()
            elif cluster["name"] == "decode":
                (policy,) = cluster["load_balancing_policy"]["policies"]
                override = policy["typed_extension_config"]["typed_config"]
                if self.source is not None:
                    sources = override["override_host_sources"]
                    override["override_host_sources"] = [each for each in sources if self.source in each]
                if not self.tells_served:
                    del override["selected_host_key"]
                if self.trailers:
                    (options,) = cluster["typed_extension_protocol_options"].values()
                    options["explicit_http_config"] = {"http_protocol_options": {"enable_trailers": True}}
        return config

    def _filter(self, filters: list[dict[str, Any]]) -> None:
        (ext_proc,) = (each for each in filters if each["name"] == "envoy.filters.http.ext_proc")
        settings = ext_proc["typed_config"]
        settings["failure_mode_allow"] = self.failure_mode_allow
        settings["processing_mode"]["response_body_mode"] = self.response_body
        settings["processing_mode"]["response_trailer_mode"] = self.response_trailers
        if not self.forwards_metadata:
            del settings["metadata_options"]
        if self.initial_metadata:
            pairs = [{"key": key, "value": value} for key, value in self.initial_metadata.items()]
            settings["grpc_service"]["initial_metadata"] = pairs
        settings.update(self.ext_proc)
        if self.subset is not None:
            filters.insert(0, _subset_filter(self.subset))


def _subset_filter(subset: list[str] | str) -> dict[str, Any]:
    value = {"x-gateway-destination-endpoint-subset": subset}
    kind = "type.googleapis.com/envoy.extensions.filters.http.set_metadata.v3.Config"
    metadata = [{"metadata_namespace": "envoy.lb.subset_hint", "value": value}]
    return {"name": "envoy.filters.http.set_metadata", "typed_config": {"@type": kind, "metadata": metadata}}


def _any_certificate() -> dict[str, Any]:
    """TLS without verification, as gateways speak it with a picker whose certificate is its own."""
    kind = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"
    context = {"alpn_protocols": ["h2"]}
    return {
        "name": "envoy.transport_sockets.tls",
        "typed_config": {"@type": kind, "common_tls_context": context},
    }


@dataclass
class GatewayStack(Stack):
    """A scheduler, and a gateway's Envoy before it."""

    gateway: Gateway = field(default_factory=Gateway)
    port: int = field(default_factory=lambda: unused_ports(1)[0])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def envoy(self) -> list[str]:
        """Return the command for the gateway's Envoy."""
        path = self.directory / "gateway.yaml"
        config = self.gateway.render(self.port, self.ports.admin, self.ports.grpc)
        path.write_text(yaml.safe_dump(config))
        return [find_envoy(), "-c", str(path), "--log-level", "warning", "--disable-hot-restart"]


@dataclass
class Running:
    """A scheduler and a gateway that run; ``config`` is the scheduler's."""

    stack: GatewayStack
    config: dict[str, Any]
    scheduler: Process
    envoy: Process
    exits: ExitStack

    def restart_scheduler(self) -> None:
        """Start the scheduler again, which has ended."""
        self.scheduler.wait()
        self.scheduler = self.exits.enter_context(spawned(self.stack.serve(self.config)))


@contextmanager
def gateway_running(directory: Path, gateway: Gateway, config: dict[str, Any]) -> Iterator[Running]:
    """Run a scheduler with this configuration, and the gateway before it."""
    stack = GatewayStack(directory, gateway=gateway)
    with ExitStack() as exits:
        scheduler = exits.enter_context(spawned(stack.serve(config)))
        envoy = exits.enter_context(spawned(stack.envoy()))
        yield Running(stack, config, scheduler, envoy, exits)


@asynccontextmanager
async def gateway_client(running: Running, fleet: Fleet) -> AsyncIterator[Client]:
    """Give a client of a gateway that is ready."""
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        client = Client(session, running.stack, fleet)
        await gateway_ready(client, running)
        yield client


async def gateway_ready(client: Client, running: Running) -> None:
    """Wait until a request goes through the scheduler, and all instances are healthy."""

    async def healthy() -> bool:
        for process in (running.scheduler, running.envoy):
            assert process.process.poll() is None, process.output
        try:
            status, found = await client.admin("GET", "/instances")
            if status != 200 or {each["state"] for each in found["instances"]} != {"healthy"}:
                return False
            return await reaches_scheduler(client)
        except (TimeoutError, aiohttp.ClientConnectionError):
            return False

    await until(healthy)


async def reaches_scheduler(client: Client) -> bool:
    """Whether the gateway asks the scheduler, which knows no such path."""
    answer = await client.send("GET", "/not-public")
    return answer.headers.get("x-pd-reason") == "not_public"
