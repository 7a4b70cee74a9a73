"""Certificates that change while the scheduler runs: new handshakes have the new ones."""

from __future__ import annotations

import asyncio
import os
import shutil
import ssl
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import aiohttp
import grpc
import pytest
import pytest_asyncio
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.certificates import Certificates as Made
from tests.support.certificates import make_certificates
from tests.support.processes import unused_ports
from tests.support.waiting import HUNG_S, until
from vllm_pd_scheduler.admin import AdminServer
from vllm_pd_scheduler.config import ConfigError, parse_config
from vllm_pd_scheduler.config.tls import InstanceTlsConfig, TlsConfig
from vllm_pd_scheduler.discovery import watch
from vllm_pd_scheduler.records.events import EventKind
from vllm_pd_scheduler.service.app import App
from vllm_pd_scheduler.service.certificates import Certificates, RenewedContext

NOBODY = {
    "prefill_instances": [{"id": "p0", "host": "127.0.0.1", "port": 1}],
    "decode_instances": [{"id": "d0", "host": "127.0.0.1", "port": 2}],
    "health_check_timeout": 0.2,
}


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with mock.patch.multiple(watch, LOOK_S=0.1, SETTLE_S=0.05):
        yield


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make_certificates(tmp_path)


def read(path: str) -> bytes:
    return Path(path).read_bytes()


class Running:
    """A scheduler with TLS on both of its servers."""

    def __init__(self, app: App, grpc_port: int, admin_port: int) -> None:
        self.app, self.grpc_port, self.admin_port = app, grpc_port, admin_port

    async def shown(self, port: int) -> bytes:
        """The certificate that a new connection to a port gets."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        try:
            found = writer.get_extra_info("ssl_object")
            if port == self.grpc_port:
                assert found.selected_alpn_protocol() == "h2"
            return bytes(found.getpeercert(binary_form=True))
        finally:
            writer.close()

    async def until_shown(self, cert: str) -> None:
        expected = ssl.PEM_cert_to_DER_cert(read(cert).decode())

        async def both() -> bool:
            return [await self.shown(port) for port in (self.grpc_port, self.admin_port)] == [expected] * 2

        await until(both)

    def events(self) -> list[str]:
        return [e.text for e in self.app.router.events.after(0) if e.kind is EventKind.CONFIG]


@pytest_asyncio.fixture
async def running(made: Made) -> AsyncIterator[Running]:
    grpc_port, admin_port = unused_ports(2)
    config = parse_config(
        {
            **NOBODY,
            "grpc_port": grpc_port,
            "admin_port": admin_port,
            "grpc_tls": made.server,
            "admin_tls": made.server,
        }
    )
    async with App(config) as app:
        yield Running(app, grpc_port, admin_port)


def renew(made: Made, **files: str) -> None:
    """Put other files in the place of the server's."""
    for key, path in files.items():
        new = Path(made.server[key]).with_suffix(".new")
        shutil.copy(path, new)
        os.replace(new, made.server[key])


async def test_new_connections_have_the_new_certificate(running: Running, made: Made) -> None:
    await running.until_shown(made.server["cert"])
    ca = read(made.ca)
    async with grpc.aio.secure_channel(
        f"127.0.0.1:{running.grpc_port}", grpc.ssl_channel_credentials(ca)
    ) as channel:
        watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await asyncio.wait_for(watching.read(), HUNG_S)).status == 1
        renew(made, **made.client)
        await running.until_shown(made.client["cert"])
        assert not watching.done(), "connections of before go on"


async def test_a_pair_that_does_not_fit_is_refused(running: Running, made: Made) -> None:
    before = Path(made.server["cert"]).with_suffix(".before")
    shutil.copy(made.server["cert"], before)
    renew(made, key=made.stranger["key"])
    await until(lambda: sum("certificates of before stay" in text for text in running.events()) >= 2)
    await running.until_shown(str(before))
    renew(made, cert=__file__)
    os.remove(made.server["key"])
    await until(lambda: any("cannot be read" in text for text in running.events()))
    await running.until_shown(str(before))
    for key in ("cert", "key"):
        shutil.copy(made.stranger[key], made.server[key])
    await running.until_shown(made.stranger["cert"])


async def test_a_directory_as_kubernetes_mounts_a_secret(made: Made, tmp_path: Path) -> None:
    """A link to a directory is moved, through which all files are found."""
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    for number, who in enumerate((made.server, made.client)):
        (mounted / f"..{number}").mkdir()
        shutil.copy(who["cert"], mounted / f"..{number}" / "tls.crt")
        shutil.copy(who["key"], mounted / f"..{number}" / "tls.key")
    (mounted / "..data").symlink_to("..0")
    for name in ("tls.crt", "tls.key"):
        (mounted / name).symlink_to(f"..data/{name}")
    settings = TlsConfig(cert=str(mounted / "tls.crt"), key=str(mounted / "tls.key"))
    events: Any = mock.Mock()
    certificates = Certificates("grpc_tls", settings, events)
    first = certificates.context.newest
    following = asyncio.ensure_future(certificates.follow())
    try:
        await until(lambda: certificates.context.newest is not first)  # what is there at the start
        first = certificates.context.newest
        (mounted / "..new").symlink_to("..1")
        os.replace(mounted / "..new", mounted / "..data")
        await until(lambda: certificates.context.newest is not first)
        assert [call.args[1] for call in events.add.call_args_list] == [
            "grpc_tls: the certificates were read again; new connections have them"
        ]
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def test_as_a_client_another_authority_counts_for_new_connections(tmp_path: Path) -> None:
    """And the one of before no more: whom to trust is replaced, not added to."""
    old, new = trustme.CA(), trustme.CA()
    ca = tmp_path / "ca.pem"
    old.cert_pem.write_to_path(ca)
    servers = {}
    for name, authority in (("old", old), ("new", new)):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("localhost").configure_cert(context)
        servers[name] = await asyncio.start_server(
            lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=context
        )
    certificates = Certificates("instance_tls", InstanceTlsConfig(ca=str(ca)), mock.Mock())

    async def trusted(name: str) -> bool:
        port = servers[name].sockets[0].getsockname()[1]
        try:
            _, writer = await asyncio.open_connection(
                "127.0.0.1", port, ssl=certificates.context, server_hostname="localhost"
            )
        except ssl.SSLCertVerificationError:
            return False
        writer.close()
        return True

    following = asyncio.ensure_future(certificates.follow())
    try:
        assert [await trusted("old"), await trusted("new")] == [True, False]
        new.cert_pem.write_to_path(ca)
        await until(lambda: trusted("new"))
        assert not await trusted("old")
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        for server in servers.values():
            server.close()


def test_all_that_a_loop_asks_of_a_context_is_the_newest(made: Made) -> None:
    context = RenewedContext(TlsConfig(**made.server).context())
    assert isinstance(context, ssl.SSLContext)
    context.set_alpn_protocols(["h2"])
    other = TlsConfig(**made.client).context()
    context.renew(other)
    side = context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_side=True)
    assert side.context is other


class TestSelfSigned:
    def config(self, **more: Any) -> dict[str, Any]:
        return {**NOBODY, "grpc_tls": {"self_signed": True, **more}}

    def test_what_goes_with_it(self, made: Made) -> None:
        parse_config(self.config())
        parse_config(self.config(client_ca=made.ca))
        for more in ({"cert": made.server["cert"]}, {"key": made.server["key"]}, made.server):
            with pytest.raises(ConfigError, match='grpc_tls: "self_signed" takes the place'):
                parse_config(self.config(**more))
        with pytest.raises(ConfigError, match="give both, or"):
            parse_config({**NOBODY, "grpc_tls": {"self_signed": False}})

    def test_without_the_package(self) -> None:
        with (
            mock.patch.dict(sys.modules, {"cryptography": None}),
            pytest.raises(ConfigError, match=r"self_signed needs the package cryptography: .*pip install"),
        ):
            parse_config(self.config())

    def test_nothing_is_written_to_a_disk(self) -> None:
        before = set(os.listdir("/proc/self/fd"))
        with mock.patch.object(tempfile, "mkstemp", side_effect=AssertionError):
            TlsConfig(self_signed=True).context()
        assert set(os.listdir("/proc/self/fd")) <= before

    async def test_a_gateway_connects(self) -> None:
        """One that checks no certificate; and health is answered in clear at its own port."""
        grpc_port, health_port, admin_port = unused_ports(3)
        config = parse_config(
            {
                **self.config(),
                "grpc_port": grpc_port,
                "grpc_health_port": health_port,
                "admin_port": admin_port,
                "drain_timeout": 0.5,
            }
        )
        async with App(config) as app:
            running = Running(app, grpc_port, admin_port)
            assert b"vllm-pd-scheduler" in await running.shown(grpc_port)
            async with grpc.aio.insecure_channel(f"127.0.0.1:{health_port}") as channel:
                stub = health_pb2_grpc.HealthStub(channel)

                async def status(name: str) -> int:
                    request = health_pb2.HealthCheckRequest(service=name)
                    return int((await stub.Check(request, timeout=HUNG_S)).status)

                assert [await status(name) for name in ("liveness", "readiness", "")] == [1, 1, 1]
                app.draining = True
                assert [await status(name) for name in ("liveness", "readiness", "")] == [1, 2, 1]
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await channel.unary_unary("/envoy.service.ext_proc.v3.ExternalProcessor/Process")(b"")
                assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED, "health and nothing else"


async def test_the_listener_for_metrics_has_nothing_else() -> None:
    grpc_port, admin_port, metrics_port = unused_ports(3)
    config = parse_config(
        {
            **NOBODY,
            "grpc_port": grpc_port,
            "admin_port": admin_port,
            "metrics_host": "0.0.0.0",
            "metrics_port": metrics_port,
        }
    )
    url = f"http://127.0.0.1:{metrics_port}"
    async with App(config) as app, aiohttp.ClientSession() as session:

        async def status(path: str, method: str = "GET") -> int:
            headers = {"host": "epp.llm.svc:9090"}  # as Prometheus or a probe names it
            async with session.request(method, url + path, headers=headers) as answer:
                return answer.status

        assert await status("/metrics") == await status("/healthz") == 200
        assert await status("/readyz") == 503, "no D serves"
        routes = AdminServer(app.router, is_ready=lambda: True).routes
        admin = {route.path for route in routes} - {"/metrics", "/healthz", "/readyz"}
        assert {await status(path.replace("{id}", "d0")) for path in admin} == {404}
        assert {await status(path, "POST") for path in ("/reload", "/drain", "/instances")} == {404}
        assert await status("/metrics", "DELETE") == 405
