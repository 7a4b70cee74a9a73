"""Objects of the Kubernetes API, as a fleet of vLLM has them."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]


def pod(
    name: str,
    ip: str | None = "10.0.0.1",
    role: str | None = "decode",
    *,
    ready: bool = True,
    annotations: dict[str, str] | None = None,
    created: str = "2026-01-01T00:00:00Z",
    **labels: str,
) -> Json:
    """Return a pod as a vLLM's would be; further labels by their keys with ``_`` for ``-``."""
    found = {"app": "vllm", **{key.replace("_", "-"): value for key, value in labels.items()}}
    if role is not None:
        found["llm-d.ai/role"] = role
    metadata: Json = {"name": name, "labels": found, "creationTimestamp": created}
    if annotations:
        metadata["annotations"] = annotations
    status: Json = {
        "phase": "Running" if ip else "Pending",
        "conditions": [{"type": "Ready", "status": "True" if ready and ip else "False"}],
    }
    if ip:
        status |= {"podIP": ip, "podIPs": [{"ip": ip}]}
    return {"metadata": metadata, "spec": {"containers": [{"name": "vllm"}]}, "status": status}


def endpoint(ip: str, name: str | None = None, **conditions: bool) -> Json:
    """Return an endpoint of a slice."""
    found: Json = {"addresses": [ip], "conditions": conditions}
    if name is not None:
        found["targetRef"] = {"kind": "Pod", "name": name, "uid": f"uid-{name}"}
    return found


def endpoint_slice(
    name: str, service: str, *endpoints: Json, ports: dict[str, int] | None = None, family: str = "IPv4"
) -> Json:
    return {
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": service}},
        "addressType": family,
        "endpoints": list(endpoints),
        "ports": [
            {"name": key, "port": value, "protocol": "TCP"}
            for key, value in (ports or {"http": 8000}).items()
        ],
    }


def pool(name: str, *ports: int, **labels: str) -> Json:
    return {
        "metadata": {"name": name},
        "spec": {
            "selector": {"matchLabels": labels},
            "targetPorts": [{"number": port} for port in ports],
            "appProtocol": "http",
        },
    }
