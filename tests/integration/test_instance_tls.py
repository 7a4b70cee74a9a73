"""Instances that serve TLS, behind a real Envoy: who is trusted, and that nothing goes there in clear."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from tests.support.certificates import Certificates, make_certificates
from tests.support.processes import NO_EJECTION, Client, Stack, ready, spawned
from tests.support.sim_fleet import Fleet
from tests.support.waiting import HUNG_S, until
from vllm_pd_scheduler.config import parse_config
from vllm_pd_scheduler.envoy.configuration import render_config
from vllm_pd_scheduler.router import PDRouter
from vllm_pd_scheduler.sim.profile import EngineProfile

GUIDE = Path(__file__).parents[2] / "docs" / "security.md"
PROMPT = "The cache goes from one to the other. " * 8
NAME = "localhost"


@dataclass
class Secured:
    """A fleet with TLS, the certificates around it, and those of another authority."""

    fleet: Fleet
    made: Certificates
    others: Certificates

    @asynccontextmanager
    async def client(self, stack: Stack) -> AsyncIterator[Client]:
        """A client that can look at the instances too."""
        connector = aiohttp.TCPConnector(ssl=self.made.client_context(self.made.client))
        timeout = aiohttp.ClientTimeout(total=HUNG_S)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            yield Client(session, stack, self.fleet)

    def config(self, **more: Any) -> dict[str, Any]:
        return {
            "strategy": "round_robin",
            "instance_tls": {"ca": self.made.ca, "server_name": NAME},
            **NO_EJECTION,
            **self.fleet.config(),
            **more,
        }


@pytest.fixture(scope="module")
def one_sided(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    with _fleet(tmp_path_factory.mktemp("certificates")) as found:
        yield found


@pytest.fixture(scope="module")
def mutual(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    with _fleet(tmp_path_factory.mktemp("certificates"), mutual=True) as found:
        yield found


class _fleet:
    """Two P and two D whose servers have TLS; with ``mutual`` they want certificates of their clients."""

    def __init__(self, directory: Path, mutual: bool = False) -> None:
        made = make_certificates(directory)
        (directory / "others").mkdir()
        files = [f"--ssl-certfile={made.server['cert']}", f"--ssl-keyfile={made.server['key']}"]
        files += [f"--ssl-ca-certs={made.ca}", "--ssl-cert-reqs=2"] if mutual else []
        context = made.client_context(made.client)
        self.fleet = Fleet(2, 2, profile=EngineProfile.instant(), arguments=files, tls=context)
        self.secured = Secured(self.fleet, made, make_certificates(directory / "others"))

    def __enter__(self) -> Secured:
        self.fleet.start()
        return self.secured

    def __exit__(self, *_: object) -> None:
        self.fleet.stop()


async def check_text(client: Client) -> None:
    """A P/D request, whole and streamed: text as the instance alone gives it, and the hand-off was used."""
    body = {"prompt": PROMPT, "max_tokens": 12}
    async with client.session.post(client.fleet["decode-0"].url + "/v1/completions", json=body) as response:
        expected = (await response.json())["choices"][0]["text"]
    for stream in (False, True):
        answer = await client.post("/v1/completions", {**body, "stream": stream})
        assert answer.text == expected
        assert answer.headers["x-pd-prefill"].startswith("prefill-")
        seen = await client.request_of(answer)
        assert (seen["hand_off"], seen["outcomes"]) == ("receive", ["good"])


@pytest.mark.parametrize("way", ["straight", "listener"])
@pytest.mark.parametrize("certificates", ["one_sided", "mutual"])
async def test_every_way_to_an_instance(
    request: pytest.FixtureRequest, tmp_path: Path, certificates: str, way: str
) -> None:
    secured: Secured = request.getfixturevalue(certificates)
    stack = Stack(tmp_path)
    tls = {"ca": secured.made.ca, "server_name": NAME, **secured.made.client}
    more = stack.listener if way == "listener" else {}
    with spawned(stack.up(secured.config(instance_tls=tls, **more))) as up:
        async with secured.client(stack) as client:
            await ready(client, up)
            assert set((await client.states()).values()) == {"healthy"}
            assert (await client.instance("decode-0"))["kv_cache_usage"] is not None, "scraped"
            await check_text(client)
            assert (await client.self_check("prefill-0", "decode-0"))["result"] == "match"
            # A decode instance that fails: the next one answers, and the hand-off is freed on P.
            await client.fault("decode-0", status=500)
            for _ in range(2):
                assert (await client.complete(prompt=PROMPT)).headers["x-pd-decode"] == "decode-1"

            async def released() -> bool:
                _, page = await client.admin("GET", "/metrics")
                return bool(
                    re.search(r'pd_scheduler_handoffs_unused_total\{outcome="released".*\} [1-9]', page)
                )

            await until(released)
            await client.fault("decode-0")


async def unhealthy(client: Client) -> str:
    """Wait until no instance can serve; return the reason, which must be the same for all."""

    async def all_out() -> bool:
        try:
            return set((await client.states()).values()) == {"unhealthy"}
        except aiohttp.ClientConnectionError:
            return False

    await until(all_out)
    reasons = {(await client.instance(name))["reason"] for name in await client.states()}
    assert len(reasons) == 1, reasons
    return str(reasons.pop())


@pytest.mark.parametrize(
    ("tls", "expected"),
    [
        ("another authority", "its certificate is not trusted: "),
        ("another name", "its certificate is not trusted: Hostname mismatch.*'vllm.example'"),
        ("in clear", "/health hung up without an answer: if it serves TLS, set instance_tls"),
    ],
)
async def test_an_instance_that_is_not_trusted_gets_nothing(
    one_sided: Secured, tmp_path: Path, tls: str, expected: str
) -> None:
    settings: dict[str, dict[str, Any]] = {
        "another authority": {"ca": one_sided.others.ca, "server_name": NAME},
        "another name": {"ca": one_sided.made.ca, "server_name": "vllm.example"},
    }
    stack = Stack(tmp_path)
    with spawned(stack.up(one_sided.config(instance_tls=settings.get(tls)))):
        async with one_sided.client(stack) as client:
            before = await client.seen_by_all()
            assert re.match(expected, await unhealthy(client))

            async def refused() -> bool:
                try:
                    return (await client.complete()).status == 503
                except aiohttp.ClientConnectionError:
                    return False  # Envoy is still to come

            await until(refused)
            assert await client.seen_by_all() == before


async def test_a_client_certificate_that_is_missing(mutual: Secured, tmp_path: Path) -> None:
    stack = Stack(tmp_path)
    with spawned(stack.up(mutual.config())):
        async with mutual.client(stack) as client:
            assert "if it wants a client certificate, set cert and key" in await unhealthy(client)


async def test_a_mixed_fleet(one_sided: Secured, tmp_path: Path) -> None:
    with Fleet(0, 1, profile=EngineProfile.instant()) as clear:
        (entry,) = clear.config()["decode_instances"]
        config = one_sided.config()
        config["decode_instances"] += [{**entry, "id": "in-clear", "tls": False}]
        stack = Stack(tmp_path)
        with spawned(stack.up(config)) as up:
            async with one_sided.client(stack) as client:
                await ready(client, up)
                answers = [await client.complete(prompt=PROMPT, max_tokens=12) for _ in range(6)]
    assert {answer.headers["x-pd-decode"] for answer in answers} == {"decode-0", "decode-1", "in-clear"}
    assert len({answer.text for answer in answers}) == 1


async def test_names_of_their_own(one_sided: Secured, tmp_path: Path) -> None:
    """A host's own name, and one given for an instance, are what its certificate must be for."""
    config = one_sided.config(instance_tls={"ca": one_sided.made.ca, "server_name": "vllm.example"})
    for instance in config["prefill_instances"] + config["decode_instances"]:
        instance["server_name"] = NAME
    by_host = one_sided.config(instance_tls={"ca": one_sided.made.ca})
    for instance in by_host["prefill_instances"] + by_host["decode_instances"]:
        instance["host"] = NAME
    for settings in (config, by_host):
        stack = Stack(tmp_path)
        with spawned(stack.up(settings)) as up:
            async with one_sided.client(stack) as client:
                await ready(client, up)
                await check_text(client)


@pytest.mark.parametrize("as_documented", [True, False])
async def test_an_envoy_of_ones_own(one_sided: Secured, tmp_path: Path, as_documented: bool) -> None:
    """With what docs/security.md adds it works; without, instances with TLS get nothing at all."""
    stack = Stack(tmp_path)
    command = stack.envoy()
    config = render_config(stack.ports)
    if as_documented:
        text = re.search(r"```yaml\n(typed_config:\n.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
        assert text is not None
        files = {"ca.pem": one_sided.made.ca, "envoy.pem": one_sided.made.client["cert"]}
        files["envoy.key"] = one_sided.made.client["key"]
        documented = text[1]
        for name, path in files.items():
            documented = documented.replace(f"/etc/envoy/{name}", path)
        for cluster in config["static_resources"]["clusters"]:
            for match in cluster.get("transport_socket_matches", []):
                match["transport_socket"].update(yaml.safe_load(documented))
    (tmp_path / "envoy.yaml").write_text(yaml.safe_dump(config))
    with spawned(stack.serve(one_sided.config(**stack.listener))) as scheduler, spawned(command) as envoy:
        async with one_sided.client(stack) as client:
            await ready(client, envoy)
            before = await client.seen_by_all()
            if as_documented:
                await client.until_split()  # the scheduler is found healthy a little later than the instances
                await check_text(client)
            else:

                async def refused() -> bool:
                    assert (await client.complete()).status == 503
                    return "CERTIFICATE_VERIFY_FAILED" in envoy.output

                await until(refused)  # without the scheduler there is one further attempt, and no reason
                assert await client.seen_by_all() == before
            assert "Traceback" not in scheduler.output


def test_the_library(one_sided: Secured) -> None:
    router = PDRouter(parse_config(one_sided.config()))
    assert set(router.run_health_checks().values()) == {True}
    result = router.route_request({"prompt": PROMPT, "max_tokens": 12})
    assert result.success, result.error
    assert result.prefill_instance is not None
    untrusted = {"ca": one_sided.others.ca, "server_name": NAME}
    router = PDRouter(parse_config(one_sided.config(instance_tls=untrusted)))
    assert set(router.run_health_checks().values()) == {False}
    assert router.route_request({"prompt": PROMPT}).status == 503
