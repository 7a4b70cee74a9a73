"""A gateway that chooses D itself, in a fleet of two revisions: no text of a hand-off that is not for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.gateway import Gateway, gateway_client, gateway_running
from tests.support.processes import NO_EJECTION
from tests.support.sidecar import config_with, sidecars
from tests.support.sim_fleet import Fleet
from vllm_pd_scheduler.sim.profile import EngineProfile


class Stubborn(Gateway):
    """Reads the destination where nobody writes it, so that its fallback policy always chooses."""

    def render(self, *ports: int) -> dict[str, Any]:
        config = super().render(*ports)
        (cluster,) = (each for each in config["static_resources"]["clusters"] if each["name"] == "decode")
        (policy,) = cluster["load_balancing_policy"]["policies"]
        override = policy["typed_extension_config"]["typed_config"]
        override["override_host_sources"] = [{"header": "x-nowhere"}]
        return config


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(2, 2, profile=EngineProfile.instant(), arguments=["--max-model-len=4096"]) as running:
        yield running


def of_two_revisions(config: dict[str, Any]) -> dict[str, Any]:
    """A fleet's configuration in which each P fits one D."""
    roles = ("prefill_instances", "decode_instances")
    revised = {
        role: [{**each, "revision": f"r{number}"} for number, each in enumerate(config[role])]
        for role in roles
    }
    return {**config, **NO_EJECTION, "strategy": "round_robin", **revised}


@pytest.mark.parametrize("leg", ["scheduler", "sidecar"])
async def test_what_does_not_fit_is_not_let_through(fleet: Fleet, tmp_path: Path, leg: str) -> None:
    async with sidecars(fleet) as beside:
        config = config_with(fleet, beside) if leg == "sidecar" else fleet.config()
        with gateway_running(tmp_path, Stubborn(), of_two_revisions(config)) as running:
            async with gateway_client(running, fleet) as client:
                found: Counter[str] = Counter()
                for number in range(40):
                    answer = await client.complete(prompt=f"prompt {number} " * 20)
                    if answer.status == 200:
                        pair = answer.headers["x-pd-prefill"], answer.headers["x-pd-decode"]
                        assert pair[0][-1] == pair[1][-1], pair
                    else:
                        assert answer.status == 503
                    found[answer.headers.get("x-pd-reason", "")] += 1
                assert set(found) == {"", "handoff_misdirected"}, "the one by chance, the other too"
                await client.until_in_flight(0)
                assert "Traceback" not in running.scheduler.output


@pytest.mark.parametrize("gateway", [Gateway(), Gateway(cluster="original_dst")], ids=lambda g: g.cluster)
@pytest.mark.parametrize("leg", ["scheduler", "sidecar"])
async def test_what_does_is(fleet: Fleet, tmp_path: Path, leg: str, gateway: Gateway) -> None:
    async with sidecars(fleet) as beside:
        config = config_with(fleet, beside) if leg == "sidecar" else fleet.config()
        with gateway_running(tmp_path, gateway, of_two_revisions(config)) as running:
            async with gateway_client(running, fleet) as client:
                for number in range(12):
                    for path, body in (
                        ("/v1/completions", {"prompt": f"prompt {number} " * 20, "max_tokens": 8}),
                        ("/v1/responses", {"input": f"prompt {number} " * 20, "max_output_tokens": 8}),
                    ):
                        answer = await client.post(path, body)
                        assert answer.status == 200, answer
                        assert answer.headers["x-pd-prefill"][-1] == answer.headers["x-pd-decode"][-1]
