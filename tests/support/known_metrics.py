"""Which metrics there are, with their labels: those of the code, and what we read of others."""

import re
import time
from collections.abc import Collection, Mapping

from tests.support.channels import Meeting
from vllm_pd_scheduler.admin.changes import AdminChanges
from vllm_pd_scheduler.admin.collectors import collectors
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.models import PD_ROLES, MetricsSnapshot, PDInstance
from vllm_pd_scheduler.router import PDRouter
from vllm_pd_scheduler.service.sharing import join

_CLASS = "envoy_response_code_class"
_INGRESS = "envoy_http_conn_manager_prefix"
_CLUSTER = "envoy_cluster_name"
_VLLM = ("engine", "model_name", "role")

OTHERS: Mapping[str, Collection[str]] = {
    # Envoy 1.40 at /stats/prometheus; test_prometheus.py asks a real one.
    "envoy_access_logs_grpc_access_log_logs_dropped": (),
    "envoy_cluster_lua_errors": (_CLUSTER,),
    "envoy_cluster_update_rejected": (_CLUSTER,),
    "envoy_cluster_upstream_rq_retry": (_CLUSTER,),
    "envoy_http_downstream_cx_active": (_INGRESS,),
    "envoy_http_downstream_rq_active": (_INGRESS,),
    "envoy_http_downstream_rq_xx": (_INGRESS, _CLASS),
    "envoy_http_ext_proc_failure_mode_allowed": (_INGRESS,),
    "envoy_http_ext_proc_streams_failed": (_INGRESS,),
    "envoy_http_ext_proc_streams_started": (_INGRESS,),
    "envoy_http_lua_errors": (_INGRESS,),
    "envoy_server_memory_physical_size": (),
    # vLLM 0.32 with NIXL at /metrics, read from a real pair. `role` is the scrape configuration's.
    "vllm:external_prefix_cache_hits_total": _VLLM,
    "vllm:nixl_num_failed_transfers_total": _VLLM,
    "vllm:nixl_num_kv_expired_reqs_total": _VLLM,
    "vllm:num_requests_running": _VLLM,
    # Prometheus's own.
    "ALERTS": ("alertname", "alertstate", "severity"),
    "up": (),
}
"""Labels of what others than the scheduler measure, by name."""

_OF_TARGETS = {"instance", "job", "pod"}
"""Labels that ``scrape.yml`` gives every series."""
_WORDS = {"and", "bool", "by", "offset", "on", "or", "unless"}
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)\s*\{([^}]*)\}")
_MATCHER = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*""')


def filled_router() -> PDRouter:
    """Return a router whose metrics have a value each, as far as they are gauges."""
    router = PDRouter(SchedulerConfig(shadow_strategy="slo", ttft_slo=1.0, tpot_slo=0.1))
    registry = router.registry
    for role in PD_ROLES:
        endpoint = registry.add(PDInstance(role.value, role, "10.0.0.1", 80))
        registry.scraped(endpoint, MetricsSnapshot(0.0, kv_capacity=1000.0), 0, 0.0)
        registry.resolved(endpoint, "10.0.0.1")
    join(router, AdminChanges(router), Meeting().channel(), "fleet", "")
    router.membership.heard("config", 0.0)
    registry.load.learn_bytes("m", 400, 100)
    return router


def real_metrics(router: PDRouter) -> dict[str, tuple[str, list[str]]]:
    """Return type and labels of every metric of a router, by the name under which it is scraped."""
    page = (router.telemetry.prometheus, collectors(router, time.monotonic))
    found = {}
    for collector in (each for registry in page for each in registry._collector_to_names):
        for family in collector.collect():
            labels = getattr(collector, "_labelnames", None)
            if labels is None:
                labels = family._labelnames  # type: ignore[attr-defined]  # of those that a collector of ours makes
            name = family.name + "_total" * (family.type == "counter")
            found[name] = (family.type, list(labels))
    return found


def known_series() -> dict[str, set[str]]:
    """Return the labels of every series that Prometheus may have, by name."""
    series = {name: set(labels) for name, labels in OTHERS.items()}
    for name, (kind, labels) in real_metrics(filled_router()).items():
        if kind == "histogram":
            series |= {f"{name}_count": set(labels), f"{name}_sum": set(labels)}
            series[f"{name}_bucket"] = {*labels, "le"}
        else:
            series[name] = set(labels)
    return {name: labels | _OF_TARGETS for name, labels in series.items()}


def problems(expression: str, known: Mapping[str, set[str]]) -> list[str]:
    """Return what a PromQL expression names that does not exist: series, and labels of them."""
    text = re.sub(r'"(?:[^"\\]|\\.)*"', '""', expression)
    found = []
    used: set[str] = set()
    for name, matchers in _SELECTOR.findall(text):
        for label in _MATCHER.findall(matchers):
            if label not in known.get(name, {label}):
                found.append(f"{name} has no label {label}")
    for name in names(expression):
        if name not in known:
            found.append(f"there is no {name}")
        used |= known.get(name, set())
    for group in _GROUPING.findall(text):
        found += [f"nothing has a label {label}" for label in re.findall(r"\w+", group) if label not in used]
    return found


def names(expression: str) -> set[str]:
    """Return the names of the series in a PromQL expression."""
    text = re.sub(r'"(?:[^"\\]|\\.)*"', '""', expression)
    text = _GROUPING.sub(" ", re.sub(r"\{[^}]*\}|\[[^\]]*\]|\boffset\s+\w+", " ", text))
    return {word for word in re.findall(r"(?<![\w:.])[a-zA-Z_:][\w:]*+(?!\s*\()", text) if word not in _WORDS}
