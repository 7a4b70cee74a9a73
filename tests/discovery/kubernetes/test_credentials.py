"""As whom the API server is asked: a pod's service account, kubeconfig files and what they name."""

from __future__ import annotations

import base64
import json
import os
import ssl
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.certificates import Certificates, make_certificates
from tests.support.kubernetes import ApiServer
from vllm_pd_scheduler.discovery.kubernetes import in_cluster
from vllm_pd_scheduler.discovery.kubernetes.access import CredentialsError
from vllm_pd_scheduler.discovery.kubernetes.api import Api, Problem
from vllm_pd_scheduler.discovery.kubernetes.credentials import Credentials

LIST = "/api/v1/namespaces/llm/pods"


@pytest.fixture(autouse=True)
def _nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Have this process be in no cluster, and have no kubeconfig."""
    for name in ("KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT", "KUBECONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, certificates: Certificates) -> Path:
    """Return the directory with this process's service account, as if it ran in a pod."""
    directory = tmp_path / "serviceaccount"
    directory.mkdir()
    (directory / "token").write_text("token-1\n")
    (directory / "namespace").write_text("llm")
    (directory / "ca.crt").write_bytes(Path(certificates.ca).read_bytes())
    monkeypatch.setattr(in_cluster, "DIRECTORY", str(directory))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    return directory


def write(path: Path, **parts: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(parts))
    return str(path)


def config(path: Path, user: Any = None, cluster: Any = None, context: Any = None) -> str:
    """Write a kubeconfig file with one of each."""
    return write(
        path,
        **{"current-context": "x"},
        contexts=[{"name": "x", "context": {"cluster": "c", "user": "u", **(context or {})}}],
        clusters=[{"name": "c", "cluster": {"server": "https://k8s:6443/", **(cluster or {})}}],
        users=[{"name": "u", "user": user or {}}],
    )


def encoded(path: str) -> str:
    return base64.b64encode(Path(path).read_bytes()).decode()


def server_tls(certificates: Certificates, *, ask: bool = False) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.server["cert"], certificates.server["key"])
    if ask:
        context.load_verify_locations(certificates.ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


class TestChoice:
    async def test_a_pod(self, pod: Path) -> None:
        access = await Credentials().read()
        assert (access.server, access.namespace, access.token) == ("https://127.0.0.1:443", "llm", "token-1")

    async def test_a_pod_with_an_ipv6_address(self, pod: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
        assert (await Credentials().read()).server == "https://[fd00::1]:443"

    async def test_a_file_that_is_named_comes_first(self, pod: Path, tmp_path: Path) -> None:
        path = config(tmp_path / "k", context={"namespace": "other"})
        access = await Credentials(path).read()
        assert (access.server, access.namespace) == ("https://k8s:6443", "other")

    async def test_a_context_is_of_a_file(
        self, pod: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("KUBECONFIG", config(tmp_path / "k"))
        assert (await Credentials(context="x").read()).server == "https://k8s:6443"

    async def test_the_usual_file(self, tmp_path: Path) -> None:
        config(tmp_path / "home/.kube/config")
        access = await Credentials().read()
        assert (access.server, access.namespace, access.token) == ("https://k8s:6443", "default", None)

    async def test_nothing_to_ask_with(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        for named, path in ((None, tmp_path / "home/.kube/config"), (tmp_path / "none", tmp_path / "none")):
            if named is not None:
                monkeypatch.setenv("KUBECONFIG", str(named))
            with pytest.raises(
                CredentialsError, match=rf"^there is no {path}, .* by kubeconfig or KUBECONFIG$"
            ):
                await Credentials().read()

    async def test_several_files_are_one(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        first = write(
            tmp_path / "a",
            **{"current-context": "y"},
            clusters=[{"name": "c", "cluster": {"server": "https://first"}}],
        )
        second = write(
            tmp_path / "sub/b",
            **{"current-context": "x"},
            contexts=[{"name": "y", "context": {"cluster": "c", "user": "u"}}],
            clusters=[{"name": "c", "cluster": {"server": "https://second"}}],
            users=[{"name": "u", "user": {"tokenFile": "token"}}],
        )
        (tmp_path / "sub/token").write_text("beside\n")
        monkeypatch.setenv("KUBECONFIG", f"{tmp_path}/none:{first}:{second}")
        access = await Credentials().read()
        assert (access.server, access.token) == ("https://first", "beside")


class TestTokens:
    async def test_a_new_one_is_read_each_time(self, tmp_path: Path) -> None:
        (tmp_path / "token").write_text("one")
        credentials = Credentials(config(tmp_path / "k", {"tokenFile": "token", "token": "not this"}))
        assert (await credentials.read()).token == "one"
        (tmp_path / "token").write_text("two")
        assert (await credentials.read()).token == "two"

    async def test_a_refused_one_is_read_again_once(self, server: ApiServer, tmp_path: Path) -> None:
        token = tmp_path / "token"
        token.write_text("old")
        server.tokens = {"new"}
        async with Api(Credentials(server.kubeconfig(tmp_path / "k", tokenFile=str(token)))) as api:
            with pytest.raises(Problem, match="401 Unauthorized"):
                await api.get(LIST, {})
            assert server.credentials == ["Bearer old"] * 2
            token.write_text("new")
            await api.get(LIST, {})
            assert server.credentials[2:] == ["Bearer new"]

    async def test_it_is_nowhere_in_what_is_said(self, server: ApiServer, tmp_path: Path) -> None:
        credentials = Credentials(server.kubeconfig(tmp_path / "k", token="s3cret"))
        assert "s3cret" not in repr(await credentials.read())
        server.tokens = set()
        async with Api(credentials) as api:
            with pytest.raises(Problem) as caught:
                await api.get(LIST, {})
        assert "s3cret" not in str(caught.value)


class TestTls:
    async def test_a_pods_own_authority_and_token(
        self, pod: Path, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with ApiServer(tls=server_tls(certificates)) as server:
            server.tokens = {"token-1"}
            monkeypatch.setenv("KUBERNETES_SERVICE_PORT", server.url.rpartition(":")[2])
            async with Api(Credentials()) as api:
                await api.get(LIST, {})
                assert await api.namespace() == "llm"
                # Both may change.
                (pod / "token").write_text("token-2")
                server.tokens = {"token-2"}
                await api.get(LIST, {})
                authority = (pod / "ca.crt").read_text()
                (pod / "ca.crt").write_text("half of it")
                with pytest.raises(Problem, match="are not PEM"):
                    await api.get(LIST, {})
                (pod / "ca.crt").write_text(authority)
                await api.get(LIST, {})

    @pytest.mark.parametrize("inline", [True, False])
    async def test_client_certificates(
        self, certificates: Certificates, tmp_path: Path, inline: bool
    ) -> None:
        cert, key, ca = certificates.client["cert"], certificates.client["key"], certificates.ca
        user: Any = {"client-certificate": cert, "client-key": key}
        trust: Any = {"certificate-authority": ca}
        if inline:
            user = {"client-certificate-data": encoded(cert), "client-key-data": encoded(key)}
            trust = {"certificate-authority-data": encoded(ca)}
        async with ApiServer(tls=server_tls(certificates, ask=True)) as server:
            path = config(tmp_path / "k", user, {"server": server.url, **trust})
            async with Api(Credentials(path)) as api:
                await api.get(LIST, {})
            async with Api(Credentials(config(tmp_path / "k", {}, {"server": server.url, **trust}))) as api:
                with pytest.raises(Problem):
                    await api.get(LIST, {})

    async def test_whom_not_to_trust(self, certificates: Certificates, tmp_path: Path) -> None:
        async with ApiServer(tls=server_tls(certificates)) as server:
            async with Api(Credentials(config(tmp_path / "k", {}, {"server": server.url}))) as api:
                with pytest.raises(Problem, match="certificate verify failed"):
                    await api.get(LIST, {})
            named = {"server": server.url, "certificate-authority": certificates.ca}
            for more, problem in (
                ({}, None),
                ({"tls-server-name": "localhost"}, None),
                ({"tls-server-name": "another"}, "not valid for 'another'"),
                ({"tls-server-name": "another", "insecure-skip-tls-verify": True}, None),
            ):
                async with Api(Credentials(config(tmp_path / "k", {}, {**named, **more}))) as api:
                    if problem is None:
                        await api.get(LIST, {})
                        continue
                    with pytest.raises(Problem, match=problem):
                        await api.get(LIST, {})


def program(path: Path, text: str) -> str:
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def plugin(**more: Any) -> dict[str, Any]:
    return {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": "./plugin", **more}}


GIVES = """
import json, os, pathlib, sys
count = pathlib.Path(__file__).with_name("count")
number = int(count.read_text()) + 1 if count.exists() else 1
count.write_text(str(number))
asked = json.loads(os.environ["KUBERNETES_EXEC_INFO"])
assert asked["kind"] == "ExecCredential" and not asked["spec"]["interactive"]
status = {"token": f"{sys.argv[1]}-{os.environ['WHO']}-{number}"}
if os.environ.get("ENDS"):
    status["expirationTimestamp"] = os.environ["ENDS"]
if "cluster" in asked["spec"]:
    status["token"] += "-of-" + asked["spec"]["cluster"]["server"]
print(json.dumps({"kind": "ExecCredential", "apiVersion": asked["apiVersion"], "status": status}))
"""


class TestExec:
    @pytest.mark.parametrize(
        ("ends", "expected"),
        [
            ("2999-01-01T00:00:00Z", ["get-me-1", "get-me-1"]),
            ("2001-01-01T00:00:00Z", ["get-me-1", "get-me-2"]),
            ("", ["get-me-1", "get-me-1"]),
        ],
    )
    async def test_what_it_hands_out_is_used_until_its_end(
        self, tmp_path: Path, ends: str, expected: list[str]
    ) -> None:
        program(tmp_path / "plugin", GIVES)
        env = [{"name": "WHO", "value": "me"}, {"name": "ENDS", "value": ends}]
        credentials = Credentials(config(tmp_path / "k", plugin(args=["get"], env=env)))
        assert [(await credentials.read()).token for _ in range(2)] == expected

    async def test_it_runs_again_when_that_is_refused(self, server: ApiServer, tmp_path: Path) -> None:
        program(tmp_path / "plugin", GIVES)
        user = plugin(args=["get"], env=[{"name": "WHO", "value": "me"}])
        server.tokens = {"get-me-2"}
        async with Api(Credentials(server.kubeconfig(tmp_path / "k", **user))) as api:
            await api.get(LIST, {})
        assert server.credentials == ["Bearer get-me-1", "Bearer get-me-2"]

    async def test_it_may_know_the_cluster(self, tmp_path: Path) -> None:
        program(tmp_path / "plugin", GIVES)
        user = plugin(args=["get"], env=[{"name": "WHO", "value": "me"}], provideClusterInfo=True)
        assert (
            await Credentials(config(tmp_path / "k", user)).read()
        ).token == "get-me-1-of-https://k8s:6443/"

    async def test_a_certificate(self, tmp_path: Path) -> None:
        status = {"clientCertificateData": "CERT", "clientKeyData": "KEY"}
        program(tmp_path / "plugin", f"print({json.dumps(json.dumps({'status': status}))})")
        access = await Credentials(config(tmp_path / "k", plugin())).read()
        assert (access.token, access.cert, access.key) == (None, b"CERT", b"KEY")

    @pytest.mark.parametrize(
        ("text", "more", "problem"),
        [
            ("import sys; sys.exit('log in first')", {}, "plugin failed with status 1: log in first"),
            ("print('{}')", {}, "plugin has printed no credentials"),
            ("print('half')", {}, "plugin has printed no credentials"),
            ('print(\'{"status": {"token": "a b"}}\')', {}, "plugin has no token"),
            ('print(\'{"status": {"token": "a", "expirationTimestamp": "soon"}}\')', {}, "no credentials"),
            ("", {"command": "/none", "installHint": "install it"}, r"/none cannot be run: .*\(install it\)"),
            ("", {"apiVersion": "v7"}, "exec needs a command, and an apiVersion of"),
            ("", {"interactiveMode": "Always"}, "wants to ask a person"),
        ],
    )
    async def test_one_that_fails(self, tmp_path: Path, text: str, more: Any, problem: str) -> None:
        program(tmp_path / "plugin", text)
        with pytest.raises(CredentialsError, match=problem):
            await Credentials(config(tmp_path / "k", plugin(**more))).read()

    async def test_one_that_hangs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm_pd_scheduler.discovery.kubernetes import exec_plugin

        monkeypatch.setattr(exec_plugin, "TIMEOUT_S", 0.2)
        program(tmp_path / "plugin", "import time; time.sleep(600)")
        with pytest.raises(CredentialsError, match=r"has not answered for 0\.2 s"):
            await Credentials(config(tmp_path / "k", plugin())).read()


class TestWhatIsWrong:
    @pytest.mark.parametrize(
        ("content", "problem"),
        [
            (None, "k cannot be read: No such file or directory"),
            ("[", "k is not valid YAML"),
            ("[" * 10_000, "k is not valid YAML"),
            ("7", "k is not a kubeconfig file"),
            ("{}", "k has no current-context: name one as context"),
            ("current-context: x", "k has no context 'x'"),
            ("{current-context: x, contexts: [{name: x, context: {cluster: c}}]}", "k has no cluster 'c'"),
            ("{current-context: x, contexts: 7}", "k has no context 'x'"),
            ("{current-context: x, contexts: [7, {name: x, context: 7}]}", "k has no context 'x'"),
            (
                "{current-context: x, contexts: [{name: x, context: {cluster: c}}],"
                " clusters: [{name: c, cluster: {server: 'ftp://h'}}]}",
                "the cluster of context 'x' has no server",
            ),
        ],
    )
    async def test_files(self, tmp_path: Path, content: str | None, problem: str) -> None:
        if content is not None:
            (tmp_path / "k").write_text(content)
        with pytest.raises(CredentialsError, match=problem):
            await Credentials(str(tmp_path / "k")).read()

    @pytest.mark.parametrize(
        ("user", "cluster", "problem"),
        [
            ({"tokenFile": "none"}, {}, "none cannot be read: No such file"),
            ({"tokenFile": "k"}, {}, "k has no token"),
            ({"token": "two words"}, {}, "the user has no token"),
            ({"auth-provider": {"name": "gcp"}}, {}, "auth-provider is not supported"),
            ({"client-certificate-data": "?"}, {}, "client-certificate-data is not base64"),
            ({}, {"certificate-authority": "none"}, "none cannot be read"),
        ],
    )
    async def test_entries(self, tmp_path: Path, user: Any, cluster: Any, problem: str) -> None:
        with pytest.raises(CredentialsError, match=problem):
            await Credentials(config(tmp_path / "k", user, cluster)).read()

    async def test_a_pod_without_a_token(self, pod: Path) -> None:
        os.truncate(pod / "token", 0)
        with pytest.raises(CredentialsError, match="token has no token"):
            await Credentials().read()
