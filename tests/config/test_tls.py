"""TLS: what a configuration may name, and who gets into the scheduler's own servers."""

from __future__ import annotations

import asyncio
import logging
import ssl
import tempfile
import unittest
import unittest.mock
from pathlib import Path
from typing import Any

import aiohttp
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.certificates import make_certificates
from tests.support.processes import unused_ports
from tests.support.waiting import HUNG_S
from vllm_pd_scheduler.config import ConfigError, parse_config, tls
from vllm_pd_scheduler.config.tls import InstanceTlsConfig
from vllm_pd_scheduler.envoy.ports import EnvoyPorts
from vllm_pd_scheduler.service.app import App, StartupError
from vllm_pd_scheduler.service.run import up
from vllm_pd_scheduler.system.output import StandardStreams

FLEET = {
    "prefill_instances": [{"id": "p0", "host": "127.0.0.1", "port": 1}],
    "decode_instances": [{"id": "d0", "host": "127.0.0.1", "port": 2}],
    "health_check_timeout": 0.2,
}


class Case(unittest.IsolatedAsyncioTestCase):
    def setUp(self) -> None:
        self.directory = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.made = make_certificates(self.directory)
        self.grpc_port, self.admin_port = unused_ports(2)

    def config(self, **more: Any) -> dict[str, Any]:
        return {**FLEET, "grpc_port": self.grpc_port, "admin_port": self.admin_port, **more}

    async def running(self, **more: Any) -> App:
        return await self.enterAsyncContext(App(parse_config(self.config(**more))))

    async def admin(self, context: ssl.SSLContext | bool = True, scheme: str = "https") -> int:
        url = f"{scheme}://127.0.0.1:{self.admin_port}/healthz"
        async with aiohttp.ClientSession() as session, session.get(url, ssl=context) as response:
            return response.status

    async def health(self, credentials: grpc.ChannelCredentials | None) -> int:
        address = f"127.0.0.1:{self.grpc_port}"
        secure = grpc.aio.secure_channel(address, credentials) if credentials else None
        async with secure or grpc.aio.insecure_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            return int((await stub.Check(health_pb2.HealthCheckRequest(), timeout=HUNG_S)).status)

    def credentials(self, who: dict[str, str] | None = None) -> grpc.ChannelCredentials:
        ca = Path(self.made.ca).read_bytes()
        if who is None:
            return grpc.ssl_channel_credentials(ca)
        return grpc.ssl_channel_credentials(ca, Path(who["key"]).read_bytes(), Path(who["cert"]).read_bytes())


class ConfigTest(Case):
    def test_files_that_cannot_be_used(self) -> None:
        good, other = self.made.server, self.made.stranger
        absent, text = str(self.directory / "absent.pem"), self.directory / "text.pem"
        text.write_text("not a certificate")
        cases: list[tuple[Any, str]] = [
            ({**good, "cert": absent}, "absent.pem cannot be read: No such file or directory"),
            ({**good, "key": str(self.directory)}, "cannot be read: Is a directory"),
            (
                {**good, "cert": str(text)},
                "text.pem and .* are not a PEM certificate and its unencrypted key",
            ),
            ({**good, "key": str(text)}, "are not a PEM certificate and its unencrypted key"),
            ({**good, "key": other["key"]}, "are not a PEM .*key values mismatch"),
            ({**good, "client_ca": absent}, "absent.pem cannot be read"),
            ({**good, "client_ca": str(text)}, "text.pem has no PEM certificate"),
            ({**good, "cert": "a\0b"}, "cannot be read: embedded null"),
            ({"cert": good["cert"]}, '"cert" and "key" belong together'),
            ({**good, "ca": self.made.ca}, "ca: unknown key"),
            ("yes", "must be "),
        ]
        for key in ("grpc_tls", "admin_tls"):
            for value, expected in cases:
                with self.subTest(key=key, value=value), self.assertRaises(ConfigError) as caught:
                    parse_config(self.config(**{key: value}))
                self.assertEqual(len(caught.exception.problems), 1, caught.exception.problems)
                self.assertRegex(caught.exception.problems[0], f"^{key}[.:].*{expected}")

    def test_an_encrypted_key_is_refused_and_not_asked_about(self) -> None:
        from cryptography.hazmat.primitives import serialization

        key = serialization.load_pem_private_key(Path(self.made.server["key"]).read_bytes(), None)
        encrypted = self.directory / "encrypted.key"
        encrypted.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.BestAvailableEncryption(b"secret"),
            )
        )
        with self.assertRaisesRegex(ConfigError, "unencrypted key"):
            parse_config(self.config(admin_tls={**self.made.server, "key": str(encrypted)}))

    async def test_up_refuses_it(self) -> None:
        async def started() -> None: ...

        config = parse_config(self.config(grpc_tls=self.made.server))
        with self.assertRaisesRegex(StartupError, "grpc_tls: .* use serve"):
            await up(config, EnvoyPorts(*unused_ports(4), "127.0.0.1"), "error", started, StandardStreams())


class InstanceTlsTest(Case):
    """What ``instance_tls`` may be, and the name that each instance's certificate must be for."""

    def problems(self, **more: Any) -> list[str]:
        with self.assertRaises(ConfigError) as caught:
            parse_config(self.config(**more))
        return caught.exception.problems

    def entry(self, **more: Any) -> dict[str, Any]:
        return {"decode_instances": [{"id": "d0", "host": "127.0.0.1", "port": 2, **more}]}

    def test_files_and_names_that_cannot_be_used(self) -> None:
        absent, text = str(self.directory / "absent.pem"), self.directory / "text.pem"
        text.write_text("not a certificate")
        cases: list[tuple[Any, str]] = [
            ({"ca": absent}, "absent.pem cannot be read: No such file or directory"),
            ({"ca": str(text)}, "text.pem has no PEM certificate"),
            ({"cert": self.made.client["cert"]}, '"cert" and "key" belong together'),
            ({**self.made.client, "key": self.made.stranger["key"]}, "key values mismatch"),
            ({**self.made.client, "cert": absent}, "absent.pem cannot be read"),
            ({"client_ca": self.made.ca}, "client_ca: unknown key"),
            ({"server_name": "10.0.0.1"}, "server_name: must be a DNS name"),
            ({"server_name": "https://vllm"}, "server_name: must be a DNS name"),
            (True, "must be "),
        ]
        for value, expected in cases:
            named = {"server_name": "vllm", **value} if isinstance(value, dict) else value
            with self.subTest(value=value):
                (problem,) = self.problems(instance_tls=named)
                self.assertRegex(problem, f"^instance_tls[.:].*{expected}")

    def test_whose_certificate(self) -> None:
        tls = {"ca": self.made.ca, "server_name": "vllm.example"}
        for common, entry, expected in (
            (tls, {}, "vllm.example"),
            (tls, {"server_name": "d0.example"}, "d0.example"),
            (tls, {"tls": True}, "vllm.example"),
            (tls, {"tls": False}, None),
            ({"ca": self.made.ca}, {"host": "d0.internal."}, "d0.internal"),
            (None, {}, None),
            (None, {"tls": False}, None),
        ):
            with self.subTest(common=common, entry=entry):
                more = {"instance_tls": common} if common else {}
                prefill = [{**FLEET["prefill_instances"][0], "tls": False}]  # type: ignore[index]
                config = parse_config(self.config(prefill_instances=prefill, **more, **self.entry(**entry)))
                instance = list(config.instances())[-1]
                self.assertEqual(instance.tls_name, expected)
                self.assertEqual(instance.url.split(":")[0], "https" if expected else "http")

    def test_entries_that_do_not_fit(self) -> None:
        self.assertEqual(
            [problem.split(" ")[0] for problem in self.problems(instance_tls={"ca": self.made.ca})],
            ["prefill_instances[0].server_name:", "decode_instances[0].server_name:"],
            "both are listed by an IP address",
        )
        for entry in ({"tls": True}, {"server_name": "d0.example"}):
            (problem,) = self.problems(**self.entry(**entry))
            (key,) = entry
            self.assertRegex(problem, rf"^decode_instances\[0\]\.{key}: needs instance_tls")

    def test_without_ca_it_is_the_systems(self) -> None:
        with unittest.mock.patch.object(tls, "_SYSTEM_CA", (None, "/nowhere", self.made.ca)):
            self.assertEqual(InstanceTlsConfig().ca_file(), self.made.ca)
            self.assertEqual(len(InstanceTlsConfig().context().get_ca_certs()), 1)
        with unittest.mock.patch.object(tls, "_SYSTEM_CA", (None, "/nowhere")):
            (problem,) = self.problems(instance_tls={"server_name": "vllm"})
        self.assertIn("instance_tls: no file with the system's certificate authorities is found", problem)

    def test_it_verifies_and_is_tls_1_2_at_least(self) -> None:
        context = InstanceTlsConfig(ca=self.made.ca).context()
        self.assertEqual((context.verify_mode, context.check_hostname), (ssl.CERT_REQUIRED, True))
        self.assertIs(context.minimum_version, ssl.TLSVersion.TLSv1_2)


class AdminTest(Case):
    async def test_tls(self) -> None:
        await self.running(admin_tls=self.made.server)
        self.assertEqual(await self.admin(self.made.client_context()), 200)
        with self.assertRaises(aiohttp.ClientConnectorCertificateError):
            await self.admin()
        with self.assertRaises(aiohttp.ClientError):
            await self.admin(scheme="http")

    def test_nothing_older_than_tls_1_2(self) -> None:
        config = parse_config(self.config(admin_tls=self.made.server))
        assert config.admin_tls is not None
        self.assertIs(config.admin_tls.context().minimum_version, ssl.TLSVersion.TLSv1_2)

    async def test_client_certificates(self) -> None:
        await self.running(admin_tls={**self.made.server, "client_ca": self.made.ca})
        self.assertEqual(await self.admin(self.made.client_context(self.made.client)), 200)
        for who in (None, self.made.stranger):
            with self.assertRaises((aiohttp.ClientError, ConnectionError)):
                await self.admin(self.made.client_context(who))


class GrpcTest(Case):
    async def test_tls(self) -> None:
        await self.running(grpc_tls=self.made.server)
        self.assertEqual(await self.health(self.credentials()), 1)
        await self.refused(None)
        await self.refused(grpc.ssl_channel_credentials())

    async def test_client_certificates(self) -> None:
        await self.running(grpc_tls={**self.made.server, "client_ca": self.made.ca})
        self.assertEqual(await self.health(self.credentials(self.made.client)), 1)
        for who in (None, self.made.stranger):
            await self.refused(self.credentials(who))

    async def refused(self, credentials: grpc.ChannelCredentials | None) -> None:
        with self.assertRaises(grpc.aio.AioRpcError) as caught:
            await self.health(credentials)
        self.assertIs(caught.exception.code(), grpc.StatusCode.UNAVAILABLE)


class WarningTest(Case):
    async def test_a_port_open_to_others_without_tls(self) -> None:
        with self.assertLogs("vllm_pd_scheduler.service.envoy_server", logging.WARNING) as logs:
            await self.running(grpc_host="0.0.0.0")
        self.assertEqual(len(logs.records), 1)
        self.assertIn("grpc_host 0.0.0.0 can be reached from other machines", logs.output[0])

    async def test_none_on_loopback_nor_with_tls(self) -> None:
        for more in ({}, {"grpc_host": "0.0.0.0", "grpc_tls": self.made.server}):
            with (
                self.subTest(more),
                self.assertNoLogs("vllm_pd_scheduler.service.envoy_server", logging.WARNING),
            ):
                async with asyncio.timeout(HUNG_S), App(parse_config(self.config(**more))):
                    pass


if __name__ == "__main__":
    unittest.main()
