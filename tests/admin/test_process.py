"""What the admin interface shows of the process: version, status, configuration, log level."""

import logging
import platform
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime

import pytest
import pytest_asyncio

from tests.support.admin import KEYS, Admin
from vllm_pd_scheduler import __version__
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.config.instances import MASK
from vllm_pd_scheduler.models import InstanceRole, MetricsSnapshot, PDInstance


@pytest_asyncio.fixture
async def admin() -> AsyncIterator[Admin]:
    found = Admin()
    await found.serve()
    yield found
    await found.client.close()


async def test_version(admin: Admin) -> None:
    status, found = await admin.ask("GET", "/version")
    assert (status, found["version"], found["python"]) == (200, __version__, platform.python_version())
    assert datetime.fromisoformat(found["started_at"]) <= datetime.now(UTC)
    assert found["uptime_s"] >= 0
    assert found["envoy_config"]


async def test_status(admin: Admin) -> None:
    _, found = await admin.ask("GET", "/status")
    expected = {
        "version": __version__,
        "ready": False,
        "strategy": {"prefill": "least_load", "decode": "least_load"},
        "settings": {"preset": None, "disaggregation": "always", "late_binding": False},
        "shadow": None,
        "queue": {"requests": 0, "bytes": 0, "requests_elsewhere": 0},
        "held_bytes": 0,
        "roles": {
            "prefill": {"total": 1, "routable": 0},
            "decode": {"total": 1, "routable": 0},
            "encode": {"total": 0, "routable": 0},
        },
        "misfits": [],
        "replicas": None,
    }
    assert {key: value for key, value in found.items() if key not in ("started_at", "uptime_s")} == expected
    admin.healthy("d0")
    await admin.ask("PUT", "/strategy", {"decode_strategy": "slo"})
    await admin.ask("PUT", "/shadow", {"strategy": "weighted"})
    _, found = await admin.ask("GET", "/status")
    assert (found["ready"], found["shadow"]) == (True, "weighted")
    assert found["strategy"] == {"prefill": "least_load", "decode": "slo"}
    assert found["roles"]["decode"] == {"total": 1, "routable": 1}
    admin.router.register_instance(PDInstance("p1", InstanceRole.PREFILL, "10.0.0.1", 8101, revision="v2"))
    (misfit,) = (await admin.ask("GET", "/status"))[1]["misfits"]
    assert misfit.startswith("p1 can hand over to no decode instance")
    admin.ready = False
    assert (await admin.ask("GET", "/status"))[1]["ready"] is False


async def test_what_an_instance_tells(admin: Admin) -> None:
    admin.healthy("d0")
    registry = admin.router.registry
    endpoint = registry.get("d0")
    snapshot = MetricsSnapshot(0.0, running=3.0, kv_usage=0.5, kv_capacity=1000.0)
    registry.scraped(endpoint, snapshot, 0)
    registry.ends.failed(endpoint, "decode: reset", 0.0)
    _, found = await admin.ask("GET", "/instances/d0")
    assert (found["shown_state"], found["source"], found["failures"]) == ("healthy", "admin", 1)
    assert (found["running"], found["kv_capacity_tokens"]) == (3.0, 1000.0)
    assert (found["tokens_in_flight"], found["metrics_age_s"] > 0) == (0.0, True)
    assert list(found["predicted"]) == ["decode_step_s"]
    _, found = await admin.ask("GET", "/instances/p0")
    assert (found["predicted"], found["metrics_age_s"]) == ({"prefill_left_s": 0.0}, None)


async def test_one_that_was_ejected(admin: Admin) -> None:
    registry = admin.router.registry
    registry.add(PDInstance("d1", InstanceRole.DECODE, "10.0.0.9", 80))
    admin.healthy("d0", "d1")
    for _ in range(3):
        registry.ends.failed(registry.get("d0"), "decode: reset", 0.0)
    _, found = await admin.ask("GET", "/instances/d0")
    assert (found["state"], found["shown_state"], found["failures"]) == ("unhealthy", "ejected", 3)
    registry.probed(registry.get("d0"), None, now=100.0)
    _, found = await admin.ask("GET", "/instances/d0")
    assert (found["state"], found["shown_state"]) == ("healthy", "trial")


async def test_where_an_instance_comes_from(admin: Admin) -> None:
    new = {"id": "d1", "role": "decode", "host": "10.0.0.3", "port": 8201}
    assert (await admin.ask("POST", "/instances", new))[1]["source"] == "admin"
    _, found = await admin.ask("GET", "/instances")
    assert {each["id"]: each["source"] for each in found["instances"]} == {
        "p0": "admin",
        "d0": "admin",
        "d1": "admin",
    }


class TestConfig:
    async def test_it_is_all_there_but_the_secrets(
        self, admin: Admin, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(KEYS[0], "sk-value")
        status, found = await admin.ask("GET", "/config")
        assert status == 200
        assert set(found) == set(SchedulerConfig.model_fields)
        assert found["decode_instances"][0]["api_key"] == {"env": MASK, "file": None}
        assert "sk-" not in str(found)

    def test_each_place_that_can_hold_a_secret(self) -> None:
        """Some put the secret where the variable's name should be: it is not set, and the start fails."""
        secret = {"env": "sk-pasted"}
        config = SchedulerConfig.model_validate(
            {
                "api_key": secret,
                "admin_token": secret,
                "prefill_instances": [{"id": "p", "host": "h", "port": 1, "api_key": secret}],
                "decode_instances": [{"id": "d", "host": "h", "port": 2, "api_key": {"file": "/run/key"}}],
            }
        )
        masked = config.masked()
        assert "sk-pasted" not in str(masked)
        assert masked["decode_instances"][0]["api_key"] == {"env": None, "file": "/run/key"}
        assert config.model_dump()["api_key"]["env"] == "sk-pasted", "only where it is asked for"


class TestLogLevel:
    @pytest.fixture(autouse=True)
    def _put_back(self) -> Iterator[None]:
        before = logging.getLogger().level
        yield
        logging.getLogger().setLevel(before)

    async def test_change_it(self, admin: Admin) -> None:
        for level in ("DEBUG", "ERROR", "WARNING", "INFO"):
            assert await admin.ask("PUT", "/log-level", {"level": level}) == (200, {"level": level})
            assert await admin.ask("GET", "/log-level") == (200, {"level": level})
            assert logging.getLogger("vllm_pd_scheduler.any").getEffectiveLevel() == getattr(logging, level)

    @pytest.mark.parametrize(
        "body", [{}, {"level": "LOUD"}, {"level": "debug"}, {"level": 10}, {"levels": "INFO"}]
    )
    async def test_what_it_cannot_be(self, admin: Admin, body: dict[str, object]) -> None:
        before = logging.getLogger().level
        status, found = await admin.ask("PUT", "/log-level", body)
        assert (status, found["error"][:5]) == (400, "level")
        assert logging.getLogger().level == before
