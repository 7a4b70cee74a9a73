"""The Helm chart with several schedulers, that meet at a server of its own or another one."""

import signal
from pathlib import Path

import pytest

from tests.support.chart import (
    DEFAULTS,
    MOUNTS,
    NAME,
    POLICY,
    SHARED,
    Values,
    accepted,
    config_of,
    render,
)
from tests.support.kubernetes_schema import check_schema, containers, of_kind, the_only
from tests.support.processes import spawned, unused_ports
from tests.support.valkey import SERVER, ask, needs_server, until_listening

pytestmark = pytest.mark.usefixtures("helm")


@pytest.mark.parametrize("own", [True, False], ids=["own", "existing"])
def test_schedulers_that_share_know_each_other(own: bool, mounted: Path) -> None:
    """Each Envoy asks its own scheduler, and those of the other pods while that is away."""
    elsewhere: Values = {
        "config": {"replicas": {"url": "valkeys://valkey.example", "key": "blue"}},
        "valkey": {"existingSecret": "valkey"},
    }
    found = render({**(SHARED if own else elsewhere), **POLICY, "replicas": 3})
    check_schema(found)
    config = accepted(found, mounted)
    assert config.replicas is not None
    assert config.replicas.password is not None
    assert config.replicas.password.read() == "s3cret"
    ((host, port),) = config.replicas.meeting().addresses
    services = {each["metadata"]["name"]: each["spec"] for each in of_kind(found, "Service")}
    pod = the_only(found, "Deployment")["spec"]["template"]
    if own:
        server = the_only(found, "StatefulSet")["spec"]["template"]
        assert services[host]["selector"] == server["metadata"]["labels"]
        assert services[host]["ports"] == [{"name": "valkey", "port": port, "targetPort": "valkey"}]
        assert not services[host]["selector"].items() <= pod["metadata"]["labels"].items()
    else:
        assert not of_kind(found, "StatefulSet")
        assert (host, port, config.replicas.key) == ("valkey.example", 6379, "blue")
    peers = services[f"{NAME}-schedulers"]
    assert peers["clusterIP"] == "None"
    assert peers["selector"].items() <= pod["metadata"]["labels"].items()
    assert (config.grpc_host, config.grpc_port, config.grpc_socket) == ("0.0.0.0", 9002, None)
    (script,) = [each["command"][-1] for each in containers(pod["spec"]) if each["name"] == "envoy-config"]
    asked = [word for word in script.split() if word.endswith((":9002", ":9002,1"))]
    assert asked == ["127.0.0.1:9002", f"{NAME}-schedulers:9002,1"]
    assert not any(
        mount["name"] == "socket" for each in containers(pod["spec"]) for mount in each["volumeMounts"]
    )
    (spread,) = pod["spec"]["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"] == peers["selector"]
    (policy,) = [each for each in of_kind(found, "NetworkPolicy") if each["metadata"]["name"] == NAME]
    (grpc,) = [rule for rule in policy["spec"]["ingress"] if rule["ports"] == [{"port": "grpc"}]]
    assert grpc["from"] == [{"podSelector": {"matchLabels": peers["selector"]}}]


def test_envoy_and_schedulers_show_each_other_certificates() -> None:
    found = render({**SHARED, "tls": {"grpc": "grpc-tls"}})
    assert config_of(found)["grpc_tls"] == {
        "cert": f"{MOUNTS}/grpc-tls/tls.crt",
        "key": f"{MOUNTS}/grpc-tls/tls.key",
        "client_ca": f"{MOUNTS}/grpc-tls/ca.crt",
    }
    for container in containers(the_only(found, "Deployment")["spec"]["template"]["spec"]):
        assert "grpc-tls" in [mount["name"] for mount in container["volumeMounts"]], container["name"]


def test_the_server_is_as_restricted_as_the_rest() -> None:
    pod = the_only(render(SHARED), "StatefulSet")["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"] == DEFAULTS["podSecurityContext"]
    (container,) = pod["containers"]
    assert container["securityContext"] == DEFAULTS["securityContext"]


@needs_server
def test_the_server_starts_with_its_password(tmp_path: Path) -> None:
    (container,) = the_only(render(SHARED), "StatefulSet")["spec"]["template"]["spec"]["containers"]
    shell, option, script = container["command"]
    (port,) = unused_ports(1)
    password = 'a "pass" \\ word #1'
    (tmp_path / "password").write_text(password)
    script = script.replace("/etc/valkey", str(tmp_path)).replace("/data", str(tmp_path))
    script = script.replace("valkey-server -", f"{SERVER} - --port {port} --bind 127.0.0.1")
    with spawned([shell, option, script]) as server:
        until_listening(port, server.process)
        assert ask(port, "PING").startswith("-NOAUTH")
        assert ask(port, "PING", password=password) == "+PONG\r\n"
        assert "always" in ask(port, "CONFIG", "GET", "appendfsync", password=password)
        server.signal(signal.SIGTERM)  # which the shell would not pass on
        assert server.wait() == 0
