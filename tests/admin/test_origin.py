"""Who may ask the admin interface for what: this machine's programs, and no web page of another site."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.support.admin import NEW, Admin

CHANGES: list[tuple[str, str, Any]] = [
    ("PUT", "/strategy", {"strategy": "weighted"}),
    ("PUT", "/shadow", {"strategy": "weighted"}),
    ("DELETE", "/shadow", None),
    ("PUT", "/log-level", {"level": "WARNING"}),
    ("POST", "/instances", NEW),
    ("POST", "/instances/d0/drain", None),
    ("POST", "/instances/d0/drain?wait=true", None),
    ("POST", "/instances/d0/undrain", None),
    ("DELETE", "/instances/d0", None),
]
READS = ["/", "/openapi.json", "/version", "/status", "/config", "/log-level", "/strategy", "/shadow"]
READS += ["/instances", "/instances/d0", "/metrics"]


@pytest_asyncio.fixture
async def admin() -> AsyncIterator[Admin]:
    made = Admin(admin_host="127.0.0.5", drain_timeout=0.0)
    await made.serve()
    yield made
    await made.client.close()


@pytest_asyncio.fixture
async def guarded() -> AsyncIterator[Admin]:
    made = Admin(admin_host="0.0.0.0")
    await made.serve(token="s3cret")
    yield made
    await made.client.close()


OWN = [
    "localhost",
    "localhost:9003",
    "LOCALHOST",
    "localhost.",
    "127.0.0.1:1",
    "127.0.0.5",
    "[::1]:9003",
    "[::1]",
]
OTHERS = [
    "attacker.example",
    "attacker.example:9003",
    "10.0.0.1",
    "localhost.attacker.example",
    "127.0.0.1.nip.io",
]
OTHERS += ["", "[::1", "0.0.0.0", "[::ffff:10.0.0.1]", "attacker.example@", "2130706433"]


class TestHost:
    """A name that is made to lead here (DNS rebinding)."""

    @pytest.mark.parametrize("host", OWN)
    async def test_this_machine(self, admin: Admin, host: str) -> None:
        assert (await admin.ask("GET", "/instances", host=host))[0] == 200
        assert (await admin.ask("POST", "/instances/d0/drain", host=host))[0] == 202

    @pytest.mark.parametrize("host", OTHERS)
    async def test_another(self, admin: Admin, host: str) -> None:
        for path in READS:
            status, body = await admin.ask("GET", path, host=host)
            assert (status, body["error"][:5]) == (421, "Host:"), path
        for method, path, given in CHANGES:
            assert (await admin.ask(method, path, given, host=host))[0] == 421
        assert not admin.router.registry.get("d0").draining

    async def test_probes_ask_by_any(self, admin: Admin) -> None:
        assert (await admin.ask("GET", "/healthz", host="10.1.2.3:9003"))[0] == 200
        assert (await admin.ask("GET", "/readyz", host="10.1.2.3:9003"))[0] == 503

    async def test_without_one(self, admin: Admin) -> None:
        """HTTP/1.0, as load balancers speak it."""
        reader, writer = await asyncio.open_connection("127.0.0.1", admin.client.port)
        writer.write(b"GET /instances HTTP/1.0\r\n\r\n")
        assert b" 200 " in await reader.readline()
        writer.close()

    async def test_with_the_token_any_will_do(self, guarded: Admin) -> None:
        """No page has it; and the interface is reached by names that nobody told us."""
        for host in ("pd.example:9003", "10.1.2.3"):
            assert (await guarded.ask("GET", "/instances", host=host))[0] == 401
            sent = {"host": host, "authorization": "Bearer s3cret"}
            assert (await guarded.ask("GET", "/instances", **sent))[0] == 200


class TestOrigin:
    """What a browser says of the page that asks."""

    @pytest.mark.parametrize(
        "headers",
        [
            {"sec-fetch-site": "cross-site"},
            {"sec-fetch-site": "same-site", "origin": "http://localhost:3000"},
            {"origin": "http://attacker.example"},
            {"origin": "http://localhost:3000"},
            {"origin": "null"},
            {"origin": ""},
            {"origin": "http://[::1"},
            {"origin": "http://localhost:99999"},
            {"sec-fetch-site": "", "origin": "http://localhost"},
            {"sec-fetch-site": "cross-site", "origin": "http://localhost"},
        ],
        ids=str,
    )
    async def test_a_page_of_another_site_changes_nothing(
        self, admin: Admin, headers: dict[str, str]
    ) -> None:
        for method, path, body in CHANGES:
            status, answer = await admin.ask(method, path, body, host="localhost", **headers)
            assert (status, list(answer)) == (403, ["error"]), path
        assert {e.id for e in admin.router.registry} == {"p0", "d0"}
        assert not admin.router.registry.get("d0").draining
        assert admin.router.scheduler.strategies.name == "least_load"

    @pytest.mark.parametrize(
        "headers",
        [
            {},
            {"sec-fetch-site": "same-origin"},
            {"sec-fetch-site": "same-origin", "origin": "http://localhost:9003"},
            {"sec-fetch-site": "none"},
            {"origin": "http://localhost:9003"},
            {"origin": "HTTP://LOCALHOST:9003"},
        ],
        ids=str,
    )
    async def test_our_own_page_and_programs_do(self, admin: Admin, headers: dict[str, str]) -> None:
        sent = {"host": "localhost:9003", **headers}
        assert (await admin.ask("POST", "/instances/d0/drain", **sent))[0] == 202

    async def test_the_usual_port_may_be_left_out(self, admin: Admin) -> None:
        for origin, host in (
            ("http://localhost", "localhost:80"),
            ("https://localhost:443", "localhost:443"),
        ):
            assert (await admin.ask("POST", "/instances/d0/drain", origin=origin, host=host))[0] == 202

    async def test_also_with_a_token(self, guarded: Admin) -> None:
        sent = {"authorization": "Bearer s3cret", "origin": "http://attacker.example"}
        assert (await guarded.ask("POST", "/instances/d0/drain", **sent))[0] == 403

    async def test_it_may_read_what_a_browser_will_not_show_it(self, admin: Admin) -> None:
        for path in READS:
            status, _ = await admin.ask("GET", path, **{"sec-fetch-site": "cross-site"})
            assert status == 200


class TestWhatIsAskedFor:
    """What nobody looks at is refused."""

    @pytest.mark.parametrize(("method", "path", "body"), CHANGES, ids=lambda value: str(value)[:20])
    async def test_a_body_is_json(self, admin: Admin, method: str, path: str, body: Any) -> None:
        kinds = ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "")
        for kind in kinds:
            status, answer = await admin.ask(method, path, body or {}, **{"content-type": kind})
            assert (status, "content-type" in answer["error"]) == (415, True)

    @pytest.mark.parametrize(
        ("method", "path"), [(method, path) for method, path, body in CHANGES if body is None]
    )
    async def test_a_body_where_there_is_none(self, admin: Admin, method: str, path: str) -> None:
        status, answer = await admin.ask(method, path, {"wait": True})
        assert (status, answer["error"]) == (400, "wait: unknown key")
        assert not admin.router.registry.get("d0").draining

    async def test_an_empty_object_asks_for_nothing(self, admin: Admin) -> None:
        assert (await admin.ask("POST", "/instances/d0/drain", {}))[0] == 202

    async def test_a_query_on_every_route(self, admin: Admin) -> None:
        server = admin.client.server.app  # type: ignore[attr-defined]
        for route in server.router.routes():
            path = route.resource.canonical.replace("{id}", "d0")
            for query in ("?wiat=true", "?role=decode&wiat=true", "?wait=true&wait=false", "?=", "?x"):
                async with admin.client.request(route.method, path + query) as answer:
                    assert answer.status == 400, f"{route.method} {path}{query}"
                    if route.method != "HEAD":
                        assert (await answer.json())["error"].startswith("query: ")
        assert {e.id for e in admin.router.registry} == {"p0", "d0"}
        assert not admin.router.registry.get("d0").draining

    @pytest.mark.parametrize("query", ["wait=True", "wait=1", "wait=", "wait=true%20"])
    async def test_a_value(self, admin: Admin, query: str) -> None:
        status, answer = await admin.ask("POST", f"/instances/d0/drain?{query}")
        assert (status, answer["error"]) == (400, "wait: must be 'true' or 'false'")
        assert not admin.router.registry.get("d0").draining

    @pytest.mark.parametrize("query", ["role=", "role=Decode", "role=both"])
    async def test_a_role(self, admin: Admin, query: str) -> None:
        status, answer = await admin.ask("GET", f"/instances?{query}")
        assert (status, answer["error"]) == (400, "role: must be 'prefill', 'decode' or 'encode'")
