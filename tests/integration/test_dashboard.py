"""The dashboard in a real browser, before a real scheduler, Envoy and a simulated fleet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from tests.support.admin_thread import AdminThread
from tests.support.browser import MISSING, Browser, browsing
from tests.support.processes import Client

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

REFUSED = "the server responded with a status of"
"""What the console has of each answer that is a refusal."""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browsing() as found:
        yield found


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """A browser with an empty memory; afterwards nothing may have been wrong but what was refused."""
    chromium.complaints()
    yield chromium
    complaints = chromium.complaints()
    chromium.driver.get("about:blank")
    chromium.driver.delete_all_cookies()
    assert [each for each in complaints if REFUSED not in each] == []


def see(browser: Browser, client: Client, **view: int | bool) -> None:
    """Open the dashboard and wait until it shows the fleet."""
    browser.open(client.stack.admin + "/", **view)  # type: ignore[arg-type]
    browser.until_text("#problems", "2 of 2 prefill and 2 of 2 decode instances can serve")
    browser.until_text("#events", "decode-1 is healthy")


async def on(work: Callable[[], None]) -> None:
    """Run something that waits for the browser, while this process serves and asks."""
    await asyncio.to_thread(work)


def row(instance: str) -> str:
    return f"tr[data-id='{instance}']"


async def test_shows_the_fleet(browser: Browser, client: Client) -> None:
    def look() -> None:
        see(browser, client)
        assert browser.text("#state") == "serving"
        for instance in client.fleet.instances:
            browser.until_text(row(instance.id), "healthy", f"127.0.0.1:{instance.port}", "0 %")
        assert "2 of 2 can serve" in browser.text("#roles caption")
        browser.until_text("#charts", "Requests", "Time to first token", "Prefix hits", "now")
        assert browser.complaints() == []

    await on(look)


async def test_a_strategy_is_picked(browser: Browser, client: Client) -> None:
    def pick() -> None:
        see(browser, client)
        button = "#strategy button"
        browser.until(
            lambda: browser.run("return document.forms.strategy.elements.decode.value") == "round_robin"
        )
        assert not browser.find(button).is_enabled()
        Select(browser.find("select[name=decode]")).select_by_visible_text("least_load")
        browser.click(button)
        browser.until_text("#strategy-result", "round_robin and least_load are in use.")
        browser.until_text("#events", "least_load", "by admin")
        assert not browser.find(button).is_enabled()

    await on(pick)
    assert (await client.admin("GET", "/strategy"))[1]["decode_strategy"] == "least_load"
    assert (await client.admin("PUT", "/strategy", {"strategy": "round_robin"}))[0] == 200


async def test_a_drain_is_watched_and_that_of_the_last_one_refused(browser: Browser, client: Client) -> None:
    def drain() -> None:
        see(browser, client)
        browser.click(f"{row('decode-0')} .actions button")
        browser.until_text("#dialog", "Drain decode-0?")
        browser.click("#dialog [type=submit]")
        browser.until_text(row("decode-0"), "drained")
        browser.until_text("#problems", "decode-0 is drained")
        browser.until_text("#roles > :last-child caption", "1 of 2 can serve")

        browser.click(f"{row('decode-1')} .actions button")
        browser.click("#dialog [type=submit]")
        browser.until_text("#dialog .error", "decode-1 is the last decode instance that can serve")
        browser.until_text("#dialog", "Drain all the same")
        assert "healthy" in browser.text(row("decode-1")), "nothing was changed"
        browser.find("#dialog").send_keys(Keys.ESCAPE)

        browser.click(f"{row('decode-0')} .actions button")
        browser.until_text(row("decode-0"), "healthy")
        browser.until_text("#problems", "2 of 2 decode instances can serve")

    await on(drain)
    assert (await client.states())["decode-1"] == "healthy"


async def test_decisions_come_live_and_are_explained(browser: Browser, client: Client) -> None:
    await on(lambda: see(browser, client))
    answer = await client.complete(prompt="Why here?")
    prefill, decode = answer.headers["x-pd-prefill"], answer.headers["x-pd-decode"]
    newest = "#decisions tbody tr:first-child"

    def look() -> None:
        browser.until_text(newest, "split", f"{prefill} → {decode}", "/v1/completions")
        browser.until_text(f"{newest} td:last-child", "ok")
        browser.until_text("#charts", "ms")
        browser.click("#pause")
        browser.click(f"{newest} button")
        browser.until_text(
            "#dialog",
            answer.headers["x-request-id"],
            f"Prefill: {prefill}, chosen by round_robin",
            f"Decode: {decode}, chosen by round_robin",
            f"Attempts: {prefill} ok",
        )
        names = browser.run(
            "return [...document.querySelectorAll('#dialog tbody th')].map((e) => e.innerText)"
        )
        assert sorted(names) == ["decode-0", "decode-1", "prefill-0", "prefill-1"]
        browser.find("#dialog").send_keys(Keys.ESCAPE)
        browser.click("#pause")

    await on(look)


async def test_an_instance_is_added_and_removed(browser: Browser, client: Client) -> None:
    def add(port: str) -> None:
        browser.click("#add")
        for name, value in (("id", "decode-9"), ("host", "127.0.0.1"), ("port", port)):
            browser.type(f"#dialog [name={name}]", value)
        Select(browser.find("#dialog [name=role]")).select_by_visible_text("decode")
        browser.click("#dialog [type=submit]")

    def change() -> None:
        see(browser, client)
        add(str(client.fleet["decode-0"].port))
        browser.until_text("#dialog .error", "is already the decode instance 'decode-0'")
        browser.find("#dialog").send_keys(Keys.ESCAPE)
        add("9")
        browser.until_text(row("decode-9"), "unhealthy", "127.0.0.1:9")
        browser.until_text("#problems", "Problem", "decode-9 (decode) is unhealthy")
        browser.click(f"{row('decode-9')} .actions button:last-child")
        browser.until_text("#dialog", "Remove decode-9?")
        browser.click("#dialog [type=submit]")
        browser.until(lambda: not browser.driver.find_elements(By.CSS_SELECTOR, row("decode-9")))
        browser.until_text("#problems", "2 of 2 decode instances can serve")

    await on(change)


async def test_without_a_mouse(browser: Browser, client: Client) -> None:
    """Each button is reached and named; a dialog takes the focus, and gives it back."""

    def press(*keys: str) -> None:
        browser.driver.switch_to.active_element.send_keys(*keys)

    def focused() -> str:
        found = "const e = document.activeElement; return e.getAttribute('aria-label') ?? e.innerText"
        return str(browser.run(found)).strip()

    def steer() -> None:
        see(browser, client)
        reached: list[str] = []
        browser.find("body").send_keys(Keys.TAB)
        assert focused() == "Skip to the instances"
        press(Keys.ENTER)
        while "Drain decode-1" not in reached:
            press(Keys.TAB)
            reached.append(focused())
            assert len(reached) < 30, reached
        assert [each for each in reached if each.startswith(("Drain", "Remove"))][:2] == [
            "Drain prefill-0",
            "Remove prefill-0",
        ]
        press(Keys.ENTER)
        browser.until(lambda: focused() == "Drain")
        press(Keys.ESCAPE)
        browser.until(lambda: focused() == "Drain decode-1")
        browser.find("#charts svg").send_keys(Keys.ARROW_LEFT)
        browser.until(lambda: " at " in focused() or "now" in focused())

    await on(steer)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
async def test_each_text_stands_out(browser: Browser, client: Client, dark: bool) -> None:
    def look() -> None:
        browser.open(client.stack.admin + "/", dark=dark)
        browser.until_text(row("decode-0"), "drained")
        found = browser.contrasts()
        assert len(found) > 80
        assert [each for each in found if each[0] < 4.5] == []
        before = browser.run("return getComputedStyle(document.body).backgroundColor")
        Select(browser.find("#theme")).select_by_visible_text("Light" if dark else "Dark")
        assert browser.run("return getComputedStyle(document.body).backgroundColor") != before
        Select(browser.find("#theme")).select_by_visible_text("Auto")

    await client.admin("POST", "/instances/decode-0/drain")
    await client.admin("POST", "/instances", {"id": "p9", "role": "prefill", "host": "127.0.0.1", "port": 9})
    try:
        await on(look)
    finally:
        await client.admin("DELETE", "/instances/p9")
        await client.admin("POST", "/instances/decode-0/undrain")


@pytest.mark.parametrize("width", [360, 800])
async def test_a_small_screen_scrolls_one_way(browser: Browser, client: Client, width: int) -> None:
    def look() -> None:
        see(browser, client, width=width, height=800)
        assert browser.run("return document.documentElement.scrollWidth") == width
        browser.click(f"{row('prefill-0')} .actions button")
        assert browser.run("return document.documentElement.scrollWidth") == width
        browser.find("#dialog").send_keys(Keys.ESCAPE)

    await on(look)


def test_the_token_is_asked_for_and_kept_in_the_tab(browser: Browser) -> None:
    def give(token: str) -> None:
        browser.type("#dialog [name=token]", token)
        browser.click("#dialog [type=submit]")

    with AdminThread(token="s3cret") as admin:
        browser.open(admin.url + "/")
        browser.until_text("#dialog", "Admin token")
        assert "prefill-0" not in browser.text("main")
        browser.run("document.querySelector('#dialog form').id = 'old'")
        browser.find("#dialog").send_keys(Keys.ESCAPE)
        browser.until(lambda: browser.run("return document.querySelector('#dialog form:not(#old)')"))
        browser.until_text("#dialog", "Admin token")
        give("wrong")
        browser.until_text("#dialog", "The token is wrong")
        give("s3cret")
        browser.until_text("#problems", "1 of 1 prefill")
        assert browser.run("return [localStorage.length, document.cookie]") == [0, ""]
        browser.driver.refresh()
        browser.until_text("#problems", "1 of 1 prefill")
        browser.click("#forget")
        browser.until_text("#dialog", "Admin token")


def test_a_scheduler_that_ends_is_told(browser: Browser) -> None:
    with AdminThread() as admin:
        browser.open(admin.url + "/")
        browser.until_text("#problems", "1 of 1 prefill")
    browser.until_text("#state", "no connection")
    browser.until_text("#problems", "Problem", "What is shown is from")
    browser.until(lambda: browser.complaints())  # each try that finds nobody is one
    browser.driver.get("about:blank")
    browser.complaints()
