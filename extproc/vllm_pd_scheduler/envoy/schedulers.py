"""The schedulers of an Envoy: where they are, which is near, and which one has a request.

A scheduler with a name begins the ids of its requests with it. Only that one knows what became of them, so
Envoy tells and asks that one.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Any

from ..config.tls import TlsConfig
from ..models import is_ip
from ..request import headers as names

NAME = re.compile(r"[a-z0-9]{1,16}")
"""Of a scheduler."""

_LOGGER = "envoy.access_loggers.http_grpc"
_NO_NAMES = "local SCHEDULERS = {}"
"""The line of ``envoy.yaml``'s script that says where a question about a request goes."""


@dataclass(frozen=True, slots=True)
class SchedulerAddress:
    """Where a scheduler listens for Envoy: ``host:port``, or the path of a Unix socket.

    Requests whose ids begin with ``name`` and a dot are this one's. Those of a greater ``priority`` are asked
    while no nearer one is healthy.
    """

    address: str
    name: str = ""
    priority: int = 0

    @classmethod
    def parse(cls, text: str) -> SchedulerAddress:
        """Return the scheduler of ``[NAME=]ADDRESS[,PRIORITY]``; raise :exc:`ValueError`."""
        name, equals, address = text.partition("=")
        if not equals or text.startswith("/"):
            name, address = "", text
        elif not NAME.fullmatch(name):
            raise ValueError(f"{text!r}: {_no_name(name)}")
        address, _, priority = address.partition(",")
        if priority and not priority.isdecimal():
            raise ValueError(f"{text!r}: the priority after the comma is a number, 0 or more")
        return cls(address, name, int(priority[:9] or 0))

    @property
    def cluster(self) -> str:
        """The name of the cluster that is this scheduler alone."""
        return f"scheduler_{self.name}"


def put_schedulers(
    config: dict[str, Any], schedulers: Sequence[SchedulerAddress], tls: TlsConfig | None = None
) -> None:
    """Put these schedulers in place of the one of ``envoy.yaml``; ``tls`` is what they have set.

    Raise :exc:`ValueError` if their names or addresses cannot be.
    """
    _require_distinct(schedulers)
    clusters = config["static_resources"]["clusters"]
    by_name = {each["name"]: each for each in clusters}
    near_first = sorted(schedulers, key=attrgetter("priority"))
    groups = [list(group) for _, group in groupby(near_first, attrgetter("priority"))]
    if tls is not None:
        for name in ("scheduler", "xds"):
            by_name[name]["transport_socket"] = _transport_socket(tls)
    _assign(by_name["scheduler"], groups)
    # One tells the endpoints of all clusters, so that they fit together: the first that is healthy.
    _assign(by_name["xds"], [[each] for each in near_first])
    if len(schedulers) > 1:
        by_name["xds"]["health_checks"] = by_name["scheduler"]["health_checks"]
        # Reports and endpoints go on while all are draining: then all are asked.
        by_name["xds"]["common_lb_config"] = {"healthy_panic_threshold": {"value": 1}}
    named = [each for each in schedulers if each.name]
    if not named:
        return
    for each in named:
        # Without health checks: one that drains is still told what became of its requests.
        own = {key: value for key, value in by_name["scheduler"].items() if not key.startswith("health")}
        own |= {"name": each.cluster}
        _assign(own, [[each]])
        clusters.append(own)
    for loggers in _logger_lists(config):
        loggers[:] = [one for logger in loggers for one in _for_each(logger, named)]
    _name_in_script(by_name["decode"], named)


def _transport_socket(tls: TlsConfig) -> dict[str, Any]:
    """Return the TLS by which Envoy speaks with schedulers that have this.

    With ``client_ca`` both sides have certificates of that authority, and Envoy shows the schedulers' own.
    Without it nothing is known by which Envoy could tell whom it speaks with.
    """
    common: dict[str, Any] = {"alpn_protocols": ["h2"]}
    if tls.client_ca is not None:
        common["validation_context"] = {"trusted_ca": {"filename": tls.client_ca}}
        if tls.cert is not None:
            files = {"certificate_chain": {"filename": tls.cert}, "private_key": {"filename": tls.key}}
            common["tls_certificates"] = [files]
    return {
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
            "common_tls_context": common,
        },
    }


def _no_name(name: str) -> str:
    return f"{name!r} is no name of a scheduler: 1 to 16 of a to z and 0 to 9"


def _require_distinct(schedulers: Sequence[SchedulerAddress]) -> None:
    if not schedulers:
        raise ValueError("an Envoy needs a scheduler")
    for what, values in (
        ("address", [each.address for each in schedulers]),
        ("name", [each.name for each in schedulers if each.name]),
    ):
        for value, count in Counter(values).items():
            if count > 1:
                raise ValueError(f"{count} schedulers have the {what} {value}: each needs its own")
    unnamed = [each.address for each in schedulers if not each.name]
    if unnamed and len(unnamed) < len(schedulers):
        raise ValueError(f"the scheduler at {unnamed[0]} has no name and others have: name all or none")
    for each in schedulers:
        if each.name and not NAME.fullmatch(each.name):
            raise ValueError(_no_name(each.name))
        if each.priority < 0:
            raise ValueError(f"{each.address}: a priority is 0 or more")
        _endpoint(each)


def _assign(cluster: dict[str, Any], near: Sequence[Sequence[SchedulerAddress]]) -> None:
    """Give a cluster these hosts, the nearest first. Of those that are equally near each is asked in turn."""
    assignment: dict[str, Any] = {
        "cluster_name": cluster["name"],
        "endpoints": [{"lb_endpoints": [{"endpoint": _endpoint(each)} for each in group]} for group in near],
    }
    for priority, endpoints in enumerate(assignment["endpoints"][1:], 1):
        endpoints["priority"] = priority  # Envoy wants them without gaps
    if len(near) > 1:
        # As long as one of a priority is healthy, nothing goes to those farther away.
        assignment["policy"] = {"overprovisioning_factor": 100 * max(map(len, near))}
    cluster["load_assignment"] = assignment
    names = any(_has_dns_name(each) for group in near for each in group)
    cluster["type"] = "STRICT_DNS" if names else "STATIC"
    if names:
        # Who listens at :: has IPv4 too; many have nothing else.
        cluster["dns_lookup_family"] = "V4_PREFERRED"


def _endpoint(scheduler: SchedulerAddress) -> dict[str, Any]:
    if scheduler.address.startswith("/"):
        return {"address": {"pipe": {"path": scheduler.address}}}
    host, port = _host_and_port(scheduler)
    return {"address": {"socket_address": {"address": host, "port_value": port}}}


def _has_dns_name(scheduler: SchedulerAddress) -> bool:
    return not scheduler.address.startswith("/") and not is_ip(_host_and_port(scheduler)[0])


def _host_and_port(scheduler: SchedulerAddress) -> tuple[str, int]:
    host, _, port = scheduler.address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port[:6]) < 65536:
        raise ValueError(f"{scheduler.address!r} is neither host:port nor the path of a Unix socket")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _logger_lists(config: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """Yield the lists of access loggers: of requests, and of attempts."""
    for listener in config["static_resources"]["listeners"]:
        manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
        if "access_log" in manager:
            yield manager["access_log"]
        for each in manager["http_filters"]:
            if "upstream_log" in each["typed_config"]:
                yield each["typed_config"]["upstream_log"]


def _for_each(logger: dict[str, Any], named: Sequence[SchedulerAddress]) -> Iterator[dict[str, Any]]:
    """Yield a logger of its own for each scheduler, in place of one that tells any.

    What has no id is told to all: nobody knows whose it was, if it was anybody's.
    """
    if logger["name"] != _LOGGER:
        yield logger
        return
    for each in named:
        own = copy.deepcopy(logger)
        own["typed_config"]["common_config"]["grpc_service"]["envoy_grpc"]["cluster_name"] = each.cluster
        its_own = _header({"string_match": {"prefix": f"{each.name}."}})
        if own["filter"] == _header({"present_match": True}):
            own["filter"] = its_own
        else:
            nobodys = _header({"present_match": True, "invert_match": True})
            concerns = {"or_filter": {"filters": [its_own, nobodys]}}
            own["filter"] = {"and_filter": {"filters": [concerns, own["filter"]]}}
        yield own


def _header(match: dict[str, Any]) -> dict[str, Any]:
    return {"header_filter": {"header": {"name": names.ID, **match}}}


def _name_in_script(decode: dict[str, Any], named: Sequence[SchedulerAddress]) -> None:
    table = ", ".join(f'["{each.name}"] = "{each.cluster}"' for each in named)
    for options in decode["typed_extension_protocol_options"].values():
        for each in options["http_filters"]:
            source = each["typed_config"].get("default_source_code")
            if source is not None:
                source["inline_string"] = source["inline_string"].replace(
                    _NO_NAMES, f"local SCHEDULERS = {{{table}}}"
                )
