"""The configuration is read again: what is live counts at once, the rest is named, a bad one is refused."""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.certificates import make_certificates
from tests.support.config import fleet
from vllm_pd_scheduler.config import ConfigError, SchedulerConfig, load_config
from vllm_pd_scheduler.connectors import Connector
from vllm_pd_scheduler.discovery import CONFIG
from vllm_pd_scheduler.discovery.sources import Sources
from vllm_pd_scheduler.models import InstanceRole
from vllm_pd_scheduler.request.body import JsonBody
from vllm_pd_scheduler.router import PDRouter
from vllm_pd_scheduler.service.reload import ConfigFile, Reload
from vllm_pd_scheduler.strategies.least_load import LeastLoad

P, D = InstanceRole.PREFILL, InstanceRole.DECODE

OTHERS: dict[str, Any] = {
    "preset": "low_latency",
    "revisions": {"blue": 9, "green": 1},
    "self_check_interval": 60.0,
    "strategy": "round_robin",
    "prefill_strategy": "weighted",
    "decode_strategy": "slo",
    "shadow_strategy": "weighted",
    "disaggregation": "never",
    "late_binding": True,
    "session_header": "x-other",
    "ttft_slo": 1.0,
    "tpot_slo": 1.0,
    "max_waiting": 3,
    "max_kv_usage": 0.5,
    "max_in_flight_tokens": 1000,
    "on_prefill_failure": "fail",
    "max_ejected_share": 0.1,
    "ejection_success_rate": 0.1,
    "max_local_prefill_share": 0.1,
    "public_paths": ["/v1/models"],
    "prefill_listener": "http://127.0.0.1:10001",
    "grpc_host": "127.0.0.2",
    "admin_host": "127.0.0.2",
    "grpc_port": 9999,
    "grpc_health_port": 9998,
    "metrics_host": "127.0.0.2",
    "metrics_port": 9997,
    "prefill_leg": "sidecar",
    "explain_header": False,
    "tokenize_once": False,
    "tracing": {},
    "turning": {},
    "log_format": "json",
    "load_weight": 0.1,
    "kv_cache_weight": 0.1,
    "latency_weight": 0.1,
    "decode_instances": [{"id": "d1", "host": "10.0.0.9", "port": 8200}],
    "prefill_instances": [{"id": "p1", "host": "10.0.0.8", "port": 8100}],
    "encode_instances": [{"id": "e1", "host": "10.0.0.7", "port": 8300}],
    "encode_connector": "ec-example",
    "metaserver_host": "127.0.0.2",
    "metaserver_port": 9996,
    "metaserver_url": "http://10.0.0.5:9005",
    "metaserver_callers": "any",
    "continuation_port": 9995,
    "continuation_ingress": "http://127.0.0.1:10009",
}
"""Another value of each key whose default is no number; of the others it is one more."""


class Running:
    """A router whose configuration is in a file."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.path = directory / "config.json"
        self.write(**settings)
        started = load_config(self.path)
        self.router = PDRouter(started.model_copy())
        self.applied = 0
        membership = self.router.membership
        self.sources = Sources(self.router.config, membership, time.monotonic)
        self.reloads = Reload(
            ConfigFile(self.path, started, lambda config: config), self.router, self.sources, self._apply
        )

    def _apply(self) -> None:
        self.applied += 1

    def write(self, **settings: Any) -> None:
        self.path.write_text(json.dumps(fleet(**settings)))

    async def reload(self, **settings: Any) -> tuple[list[str], list[str]]:
        self.write(**settings)
        try:
            outcome = await self.reloads.reload("signal")
        finally:
            await self.sources.stop()
        return outcome.changed, outcome.needs_restart

    def events(self) -> list[str]:
        return [event.text for event in self.router.events.after(0) if event.kind == "config"]


@pytest.fixture
def running(tmp_path: Path) -> Running:
    return Running(tmp_path)


def another(key: str, directory: Path) -> Any:
    """Another value for a key."""
    if key in OTHERS:
        return OTHERS[key]
    if key.endswith("_tls"):
        made = make_certificates(directory)
        return {"ca": made.ca} if key == "instance_tls" else made.server
    if key in ("api_key", "admin_token"):
        (directory / "secret").write_text("sk-other")
        return {"file": str(directory / "secret")}
    if key == "instance_files":
        (directory / "more.yaml").write_text("decode_instances: [{id: d7, host: 10.0.0.7, port: 1}]")
        return [str(directory / "more.yaml")]
    if key == "models":
        return {"chat": {"targets": {"m": 1}}}
    if key == "kv_events":
        return {"port": 5557}
    if key == "replicas":
        return {"url": "valkey://10.0.0.5"}
    if key == "connector":
        return "shared-store"
    if key == "discovery":
        return [{"type": "kubernetes", "selector": "app=vllm", "ports": [8000]}]
    if key in ("state_file", "grpc_socket"):
        return str(directory / key)
    return getattr(SchedulerConfig(), key) + 1


@pytest.mark.parametrize("key", SchedulerConfig.model_fields)
async def test_each_key_counts_at_once_or_is_named(running: Running, tmp_path: Path, key: str) -> None:
    new = {key: another(key, tmp_path)}
    if key == "instance_tls":  # for certificates are checked for names
        new |= {
            f"{role}_instances": [{"id": "x" + role, "host": f"{role}.example", "port": 1}] for role in (P, D)
        }
    before = getattr(running.router.config, key)
    changed, needs_restart = await running.reload(**new)
    live = not SchedulerConfig.needs_restart(key)
    assert key in (changed if live else needs_restart)
    assert (getattr(running.router.config, key) == before) is not live
    assert running.applied == 1
    assert await running.reload(**new) == ([], needs_restart), "until it is restarted"


def test_what_envoy_or_a_socket_has_needs_a_restart() -> None:
    needed = {key for key in SchedulerConfig.model_fields if SchedulerConfig.needs_restart(key)}
    assert {"grpc_port", "admin_tls", "max_retries", "public_paths", "stream_idle_timeout"} <= needed
    assert not {"strategy", "queue_size", "prefill_timeout", "decode_instances"} & needed


KEPT: dict[str, tuple[Any, Callable[[PDRouter], Any]]] = {
    "unhealthy_threshold": (9, lambda router: router.registry.policy.unhealthy_threshold),
    "healthy_threshold": (9, lambda router: router.registry.policy.healthy_threshold),
    "max_ejected_share": (0.1, lambda router: router.registry.policy.max_ejected_share),
    "ejection_failures": (9, lambda router: router.registry.get("d0").breaker._policy.failures),
    "queue_size": (9, lambda router: router.dispatcher.queue.max_requests),
    "queue_bytes": (9, lambda router: router.dispatcher.queue.max_bytes),
    "max_held_bytes": (1 << 21, lambda router: router.body_memory.limit),
    "max_local_prefill_share": (0.1, lambda router: router._core._local.share),
    "strategy": ("round_robin", lambda router: router.scheduler.strategies.name),
    "shadow_strategy": ("slo", lambda router: router.scheduler.strategies.shadow.name),  # type: ignore[union-attr]
}


@pytest.mark.parametrize("key", KEPT)
async def test_parts_that_keep_a_value_get_the_new_one(running: Running, key: str) -> None:
    value, read = KEPT[key]
    await running.reload(**{key: value})
    assert read(running.router) == value


async def test_weights_that_nobody_has_are_told(running: Running) -> None:
    await running.reload(revisions={"v1": 1})
    newest = running.router.events.after(0)[-1]
    assert newest.level == logging.WARNING
    assert newest.text.startswith(
        "no decode instance has a revision to which revisions gives a weight ('v1')"
    )


async def test_limits_hold_at_once(running: Running) -> None:
    registry, scheduler = running.router.registry, running.router.scheduler
    for endpoint in registry:
        registry.probed(endpoint, None)
    registry.work.reserve(registry.get("p0"))
    assert scheduler.has_room(P, 0.0)
    await running.reload(max_waiting=1)
    assert not scheduler.has_room(P, 0.0)
    await running.reload()
    assert scheduler.has_room(P, 0.0)


async def test_instances_come_and_go(running: Running) -> None:
    registry = running.router.registry
    more = [{"id": f"d{n}", "host": f"10.0.1.{n}", "port": 8200} for n in range(3)]
    running_there = registry.work.reserve(registry.get("d0"))
    assert await running.reload(decode_instances=more[1:]) == (["decode_instances"], [])
    assert {endpoint.id: endpoint.draining for endpoint in registry} == {
        "p0": False, "d0": True, "d1": False, "d2": False,
    }  # fmt: skip
    running_there.release()
    registry.probed(running_there.endpoint, None)
    assert {endpoint.id for endpoint in registry} == {"p0", "d1", "d2"}


async def test_a_new_key_is_no_other_instance(running: Running, tmp_path: Path) -> None:
    before = running.router.registry.get("d0")
    await running.reload(api_key=another("api_key", tmp_path))
    assert running.router.registry.get("d0") is before
    assert before.instance.api_key == "sk-other"


async def test_a_strategy_that_an_operator_has_changed_stays(running: Running) -> None:
    scheduler = running.router.scheduler
    scheduler.strategies.use("weighted", P)
    scheduler.strategies.use_shadow("slo")
    await running.reload(strategy="round_robin", shadow_strategy="least_load")
    assert scheduler.strategies.names == {P: "weighted", D: "round_robin"}
    assert scheduler.strategies.shadow is not None
    assert scheduler.strategies.shadow.name == "slo"


async def test_a_strategy_is_not_made_anew_for_nothing(running: Running) -> None:
    before = running.router.scheduler.strategies.of(D)
    await running.reload(queue_size=7)
    assert running.router.scheduler.strategies.of(D) is before


@pytest.mark.parametrize(
    "settings",
    [{"queue_sise": 1}, {"queue_size": -1, "strategy": "nonsense"}, {"decode_instances": []}],
    ids=["unknown key", "two problems", "no D"],
)
async def test_a_bad_one_changes_nothing_and_all_is_said(running: Running, settings: Any) -> None:
    before, instances = running.router.config.model_copy(), list(running.router.registry)
    running.write(**settings)
    with pytest.raises(ConfigError) as expected:
        load_config(running.path)
    with pytest.raises(ConfigError) as caught:
        await running.reload(**settings, late_binding=True)
    assert caught.value.problems == expected.value.problems
    assert (running.router.config, list(running.router.registry)) == (before, instances)
    assert running.applied == 0
    (text,) = running.events()
    assert text.startswith("the configuration is refused, all stays as it was: ")
    assert all(problem in text for problem in expected.value.problems)


async def test_what_needs_another_key_that_needs_a_restart_is_refused(running: Running) -> None:
    names = [{"id": "d0", "host": "10.0.0.2", "port": 8200, "server_name": "d0.example"}]
    prefill = [{"id": "p0", "host": "p0.example", "port": 8100}]
    with pytest.raises(ConfigError, match=r"needs instance_tls.*a change of instance_tls needs a restart"):
        await running.reload(instance_tls={}, decode_instances=names, prefill_instances=prefill)
    assert running.router.registry.get("p0").instance.host == "10.0.0.1"


class Moody(LeastLoad):
    """Can be made so often."""

    left = 99

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        Moody.left -= 1
        if Moody.left < 0:
            raise ValueError("no more")


async def test_a_strategy_that_cannot_be_made_changes_nothing(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    running.write(strategy=f"{__name__}:Moody", queue_size=7)
    load_config(running.path)
    monkeypatch.setattr("vllm_pd_scheduler.service.reload.rehearse", lambda _: [])
    monkeypatch.setattr(Moody, "left", 0)
    with pytest.raises(ConfigError):
        await running.reload(strategy=f"{__name__}:Moody", queue_size=7)
    assert running.router.config.queue_size == 1024
    assert running.router.config.strategy == "least_load"


class Unfinished(Connector):
    """Its author is not done."""


UNFINISHED = f"{__name__}:Unfinished"


@pytest.mark.parametrize("at_once", [False, True], ids=["as it is used", "as it is checked"])
@pytest.mark.parametrize("of", ["the fleet", "P", "D"])
async def test_a_connector_that_cannot_be_made_changes_nothing(
    running: Running, of: str, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"queue_size": 7, "connector": UNFINISHED}
    if of != "the fleet":
        key = "prefill_instances" if of == "P" else "decode_instances"
        settings = {"queue_size": 7, key: [{**fleet()[key][0], "connector": UNFINISHED}]}
    if not at_once:  # as if it could be made the first time alone
        monkeypatch.setattr("vllm_pd_scheduler.config.fleet_instance.make_connector", lambda _: None)
    router = running.router
    before = router.config.model_copy(), [each.instance for each in router.registry]
    with pytest.raises(ConfigError, match=r"cannot be made: it lacks can_split, handoff, prefill_body$"):
        await running.reload(**settings)
    assert (router.config, [each.instance for each in router.registry]) == before
    assert running.applied == 0
    body = JsonBody.parse(b'{"prompt":"x"}')
    assert router.connectors.can_split(body)
    assert await running.reload(queue_size=8) == (["queue_size"], [])
    assert router.config.queue_size == 8
    assert router.connectors.can_split(body)


async def test_what_is_said(running: Running) -> None:
    await running.reload(queue_size=7, grpc_port=9999)
    await running.reload(grpc_port=9999)
    await running.reload()
    assert running.events() == [
        "the configuration was read again: queue_size changed; needs a restart: grpc_port",
        "the configuration was read again: queue_size changed; needs a restart: grpc_port",
        "the configuration was read again: nothing has changed",
    ]
    outcome = await running.reloads.reload("discovery config", asked=False)
    assert (outcome.changed, len(running.events())) == ([], 3)
    assert running.router.membership.ages(time.monotonic())[CONFIG] < 60.0
