"""Who may use the server, and how it is spoken with."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from tests.support.certificates import Certificates, make_certificates
from tests.support.fake_valkey import fake
from tests.support.processes import unused_ports
from tests.support.valkey import Server, needs_server, running
from tests.support.valkey_replicas import Replica, replicas
from tests.support.waiting import until
from vllm_pd_scheduler.config import ReplicasConfig, SecretSource
from vllm_pd_scheduler.sync.channel import START

pytestmark = [needs_server, pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy. fixture")]


def _secret(tmp_path: Path, text: str) -> SecretSource:
    path = tmp_path / "password"
    path.write_text(text)
    return SecretSource(file=str(path))


async def test_a_password_and_what_is_said_without_the_right_one(tmp_path: Path) -> None:
    with running(tmp_path / "server", "requirepass secret") as server:
        right = _secret(tmp_path, "secret")
        async with replicas(2, server.url, password=right) as (one, two):
            one.channel.send(b"hello")
            await until(lambda: two.heard.messages == [b"hello"])
        async with Replica(server.url).running() as none:
            await none.says("it wants a password: see replicas.password")
        wrong = _secret(tmp_path, "wrong")
        async with Replica(server.url, password=wrong).running() as one:
            await one.says("it does not take the user and password")
            _secret(tmp_path, "secret")  # a new one counts from the next attempt on
            await one.connected()


@pytest.mark.parametrize(
    "echo",
    [
        "-ERR unknown command 'HELLO', with args beginning with: '3' 'AUTH' 'default' 'hush-hush' \r\n",
        "-ERR unknown command `HELLO`, with args beginning with: `3`, `AUTH`, `default`, `hush-hu\r\n",
    ],
)
async def test_a_server_that_quotes_the_password_does_not_have_it_said(tmp_path: Path, echo: str) -> None:
    password = _secret(tmp_path, "hush-hush")
    async with (
        fake({b"HELLO": echo.encode(), b"AUTH": echo.replace("HELLO", "AUTH").encode()}) as url,
        Replica(url, password=password).running() as one,
        Replica(url, sentinel="ours", sentinel_password=password).running() as of_sentinels,
    ):
        await one.says("unknown command")
        await until(lambda: of_sentinels.heard.problems)
        assert "hush" not in "".join(one.heard.problems + of_sentinels.heard.problems)


async def test_an_acl_user_with_the_rights_of_the_docs(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs/replicas.md").read_text()
    rule = next(line for line in page.splitlines() if line.startswith("ACL SETUSER"))
    with running(tmp_path / "server") as server:
        assert server.ask(*rule.replace(">SECRET", ">secret").split()) == "+OK\r\n"
        user = server.url.replace("//", "//scheduler@")
        async with replicas(2, user, password=_secret(tmp_path, "secret")) as (one, two):
            one.channel.send(b"hello")
            await one.channel.append(b"1", START)
            await until(lambda: two.heard.messages == [b"hello"] and two.heard.changes[-1].data == b"1")
        server.ask("ACL", "SETUSER", "scheduler", "-eval")
        async with Replica(user, password=_secret(tmp_path, "secret")).running() as less:
            await less.says("the user may not do what is needed (docs/replicas.md has the ACL rule)")
            assert "eval" in less.channel.problem


async def test_a_user_without_a_password_is_told_too(server: Server) -> None:
    url = server.url.replace("//", "//nobody@")
    async with Replica(url).running() as one:
        await one.says("it does not take the user and password: see replicas.password and the user in")
        server.ask("ACL", "SETUSER", "nobody", "on", "nopass", "allchannels", "allkeys", "+@all")
        await until(lambda: not one.channel.problem)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("tls"))


async def test_tls_both_ways_and_what_is_said_if_it_fails(tmp_path: Path, certificates: Certificates) -> None:
    port = unused_ports(1)[0]
    files = certificates.server
    options = f"tls-port {port}", f"tls-cert-file {files['cert']}", f"tls-key-file {files['key']}"
    with running(tmp_path / "server", *options, f"tls-ca-cert-file {certificates.ca}") as server:
        url = f"valkeys://127.0.0.1:{port}"
        tls = {"ca": certificates.ca, **certificates.client}

        async def one(settings: dict[str, str], where: str = url) -> Replica:
            config = ReplicasConfig.model_validate({"url": where, "tls": settings})
            return Replica(where, context=config.tls_settings().context(), tls=config.tls)

        async with (await one(tls)).running() as right:
            await right.connected()
        async with (await one({"ca": certificates.stranger["cert"]})).running() as stranger:
            await stranger.says("its certificate is not trusted")
        async with (await one({"ca": certificates.ca})).running() as unknown:
            await unknown.says("certificate required")
        async with (await one(tls, f"valkeys://127.0.0.1:{server.port}")).running() as plain:
            await until(lambda: len(plain.heard.problems) > 0)
        async with Replica(f"valkey://127.0.0.1:{port}").running() as clear:
            await until(lambda: len(clear.heard.problems) > 0)


async def test_a_server_without_tls_is_said() -> None:
    context = ssl.create_default_context()
    async with fake({}) as url, Replica(url.replace("valkey:", "valkeys:"), context=context).running() as one:
        await one.says("no connection with TLS within")
