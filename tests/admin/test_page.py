"""The dashboard's page: who gets it, and what a browser may do with it."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

import aiohttp
import pytest

from tests.support.admin import Admin
from vllm_pd_scheduler.admin.page import wants_page

CHROMIUM = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"
"""What a browser accepts that opens a page."""
FILES = resources.files("vllm_pd_scheduler.admin") / "dashboard"


@pytest.mark.parametrize("accept", [CHROMIUM, "text/html", "TEXT/HTML", "*/*;q=0.1, text/html;q=0.9"])
def test_a_browser_wants_the_page(accept: str) -> None:
    assert wants_page("GET", "/", {"accept": accept})


@pytest.mark.parametrize(
    "accept",
    [
        "",
        "*/*",
        "application/json",
        "text/html;q=0",
        "text/html;q=0.5, application/json",
        "text/*",
        "text/html;q=x",
    ],
)
def test_a_program_does_not(accept: str) -> None:
    assert not wants_page("GET", "/", {"accept": accept})


def test_it_is_at_one_path_and_only_read() -> None:
    assert not wants_page("GET", "/instances", {"accept": CHROMIUM})
    assert not wants_page("POST", "/", {"accept": CHROMIUM})


async def get(admin: Admin, **headers: str) -> tuple[aiohttp.ClientResponse, str]:
    async with admin.client.get("/", headers={"accept": CHROMIUM, **headers}) as response:
        return response, await response.text()


async def test_with_a_token_anybody_gets_the_page_and_nobody_the_index() -> None:
    admin = Admin()
    await admin.serve(token="s3cret")
    response, text = await get(admin)
    assert (response.status, response.content_type) == (200, "text/html")
    assert "p0" not in text, "nothing of the fleet"
    assert "s3cret" not in text
    for path in ("/", "/instances", "/live", "/history"):
        async with admin.client.get(path, headers={"accept": "application/json"}) as refused:
            assert refused.status == 401
    await admin.client.close()


async def test_the_page_runs_what_is_in_it_and_nothing_else() -> None:
    admin = Admin()
    await admin.serve()
    response, text = await get(admin)
    await admin.client.close()
    policy = dict(each.split(" ", 1) for each in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for tag in ("script", "style"):
        contents = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        hashes = [base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in contents]
        assert hashes
        assert policy[f"{tag}-src"].split() == [f"'sha256-{each}'" for each in hashes]
    assert response.headers["x-content-type-options"] == "nosniff"


async def test_the_page_loads_nothing() -> None:
    admin = Admin()
    await admin.serve()
    _, text = await get(admin)
    await admin.client.close()
    assert not re.findall(r"""\b(?:src|srcset|href|action)=["'](?!#|data:)""", text)
    assert not re.findall(r"@import|url\(|\son\w+=", text)
    addresses = set(re.findall(r"https?://[^\s\"'`]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}, "the name of SVG, not a place"
    assert "innerHTML" not in text


def test_each_file_is_in_the_page() -> None:
    names = {each.name for each in FILES.iterdir()} - {"index.html"}
    html = (FILES / "index.html").read_text()
    assert sorted(re.findall(r'(?:src|href)="([\w.]+)"', html)) == sorted(names)


async def test_a_page_that_is_known_is_not_sent_again() -> None:
    admin = Admin()
    await admin.serve()
    first, _ = await get(admin)
    again, text = await get(admin, **{"if-none-match": first.headers["etag"]})
    await admin.client.close()
    assert (again.status, text) == (304, "")
    assert first.headers["vary"].lower().startswith("accept")
