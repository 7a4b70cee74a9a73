"""Paths and web pages, as uvicorn and Starlette treat them."""

from collections.abc import Iterator

import aiohttp
import pytest
from yarl import URL

from tests.support.sim_fleet import Fleet
from tests.support.waiting import HUNG_S
from vllm_pd_scheduler.sim.profile import EngineProfile

PAGE = "https://app.example"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with Fleet(1, 1, profile=EngineProfile.instant(), arguments=[f'--allowed-origins=["{PAGE}"]']) as fleet:
        yield fleet["decode-0"].url


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/models", 200),
        ("/v1/models?a=/b", 200),
        ("/v1%2Fmodels", 200),
        ("/%76%31/%6dodels", 200),
        ("/v1/models/", 307),
        ("/v1%2fmodels%2F", 307),
        ("//v1/models", 404),
        ("/v1/%252e/models", 404),
        ("/v1%252Fmodels", 404),
        ("/V1/models", 404),
        ("/v1/models;a", 404),
        ("/v1/completions", 405),
        ("/v1/realtime", 404),
        ("/", 404),
    ],
)
async def test_paths(url: str, path: str, status: int) -> None:
    where = URL(url + path, encoded=True)
    async with aiohttp.ClientSession() as session, session.get(where, allow_redirects=False) as response:
        assert response.status == status
        if status == 307:
            assert response.headers["location"].endswith("/v1/models")


async def test_web_pages(url: str) -> None:
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    async with aiohttp.ClientSession() as session:
        for origin, status, allowed in ((PAGE, 200, PAGE), ("https://other.example", 400, None)):
            headers = {"Origin": origin}
            async with session.options(f"{url}/v1/completions", headers={**headers, **ask}) as response:
                assert (response.status, response.headers.get("Access-Control-Allow-Origin")) == (
                    status,
                    allowed,
                )
            async with session.get(f"{url}/v1/models", headers=headers) as response:
                assert response.headers.get("Access-Control-Allow-Origin") == allowed
        async with session.options(f"{url}/v1/completions", headers={"Origin": PAGE}) as response:
            assert response.status == 405


async def test_a_websocket(url: str) -> None:
    async with aiohttp.ClientSession() as session, session.ws_connect(f"{url}/v1/realtime") as socket:
        assert (await socket.receive_json(timeout=HUNG_S))["type"] == "session.created"
        await socket.send_str("a")
        assert await socket.receive_str(timeout=HUNG_S) == "a"
