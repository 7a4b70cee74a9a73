"""Reads a compose file, and says what `docker compose` would ask the engine for.

Where there is an engine but no compose plugin, the file itself is still what the tests run.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "deploy" / "compose.yaml"
VLLM_COMPOSE = ROOT / "deploy" / "compose.vllm.yaml"
OBSERVABILITY = ROOT / "deploy" / "compose.observability.yaml"
"""Goes on top of ``COMPOSE``."""
REPLICAS = ROOT / "deploy" / "compose.replicas.yaml"

Service = dict[str, Any]

_VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?::(?P<kind>[-?])(?P<rest>[^}]*))?\}")
_AS_THEY_ARE = {
    *("image", "entrypoint", "command", "environment", "hostname", "stop_signal"),
    *("user", "read_only", "cap_drop", "security_opt"),
}
_NOT_FOR_THE_ENGINE = {"build", "stop_grace_period"}


def read_services(path: Path, environment: Mapping[str, str] | None = None) -> dict[str, Service]:
    """Return the services of a compose file with `${NAME:-default}` and `${NAME:?why}` filled in."""
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    services: dict[str, Service] = _filled_in(document["services"], environment or {})
    return services


def _filled_in(value: Any, environment: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _filled_in(item, environment) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled_in(item, environment) for item in value]
    if not isinstance(value, str):
        return value

    def variable(match: re.Match[str]) -> str:
        if given := environment.get(match["name"]):
            return given
        if match["kind"] != "-":
            raise KeyError(f"{match['name']}: {match['rest']}")
        return str(match["rest"])

    return _VARIABLE.sub(variable, value)


def mounts(service: Service, directory: Path) -> list[tuple[Path, str]]:
    """Return what a service has mounted: the file here, and `target:mode` there."""
    pairs = [volume.split(":", 1) for volume in service.get("volumes", [])]
    return [((directory / source).resolve(), target) for source, target in pairs]


def create_arguments(
    service: Service, directory: Path, network: dict[str, Any], container: Callable[[str], str]
) -> dict[str, Any]:
    """Return the arguments of `DockerClient.containers.create` for a service.

    It joins `network`, or the one of the service that it names, whose container id `container` returns.
    Ports are published on any unused one of this machine. Raise ValueError for a key that is not known here:
    what is not understood is not tested.
    """
    arguments: dict[str, Any] = dict(network)
    for key, value in service.items():
        match key, value:
            case _ if key in _AS_THEY_ARE:
                arguments[key] = value
            case _ if key in _NOT_FOR_THE_ENGINE:
                pass
            case "restart", str(policy):
                arguments["restart_policy"] = {"Name": policy}
            case "healthcheck", {"disable": True}:
                arguments["healthcheck"] = {"test": ["NONE"]}
            case "volumes", _:
                arguments["volumes"] = [f"{source}:{there}" for source, there in mounts(service, directory)]
            case "ports", list(ports):
                arguments["ports"] = {f"{port.rpartition(':')[2]}/tcp": ("127.0.0.1",) for port in ports}
            case "network_mode", str(mode) if mode.startswith("service:"):
                for name in network:
                    del arguments[name]
                arguments["network_mode"] = f"container:{container(mode.removeprefix('service:'))}"
            case _:
                raise ValueError(f"compose key {key}: {value!r} is not known to this test")
    return arguments
