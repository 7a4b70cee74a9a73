"""A headless Chromium that looks at the dashboard."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from selenium.common.exceptions import (
    ElementClickInterceptedException,
    ElementNotInteractableException,
    NoSuchElementException,
    StaleElementReferenceException,
)
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from tests.support.waiting import HUNG_S

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

MISSING = "" if CHROMIUM and DRIVER else "needs chromium and its driver (Debian: chromium, chromium-driver)"
"""Why the tests cannot run here; empty if they can."""

_ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)

_CONTRASTS = """
const channels = (color) => color.match(/[\\d.]+/g).map(Number);
const light = (color) => {
  const [r, g, b] = channels(color).slice(0, 3).map((each) => each / 255)
    .map((each) => (each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (element) => {
  for (; element; element = element.parentElement) {
    const color = getComputedStyle(element).backgroundColor;
    if ((channels(color)[3] ?? 1) === 1) return color;
  }
};
const found = [];
for (const element of document.body.querySelectorAll("*")) {
  const text = [...element.childNodes].map((each) => (each.nodeType === 3 ? each.data.trim() : "")).join("");
  if (!text || !element.checkVisibility() || element.disabled) continue;
  const style = getComputedStyle(element);
  const ink = light(element.closest("svg") ? style.fill : style.color);
  const [a, b] = [ink, light(behind(element))].sort((x, y) => y - x);
  found.push([(a + 0.05) / (b + 0.05), text]);
}
return found;
"""


class Browser:
    """Looks at one page."""

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver

    def open(self, url: str, width: int = 1360, height: int = 1000, *, dark: bool = False) -> None:
        """Open a page anew, in a window of this size, for a reader who likes dark pages or not."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get(url)

    def find(self, css: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def run(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def text(self, css: str) -> str:
        """Return an element's text, as it is in the document at once: elements come and go."""
        return str(self.run(f"return document.querySelector({css!r})?.innerText ?? ''"))

    def until(self, condition: Callable[[], object]) -> None:
        WebDriverWait(self.driver, HUNG_S, 0.02).until(lambda _: condition())

    def until_text(self, css: str, *parts: str) -> None:
        """Wait until an element's text has all these parts."""
        try:
            self.until(lambda: all(part in self.text(css) for part in parts))
        except Exception as error:
            raise AssertionError(f"{css} reads {self.text(css)!r}, not {parts}") from error

    def click(self, css: str) -> None:
        """Click an element as soon as it is there and can be clicked."""
        self._until_done(lambda: self.find(css).click())

    def type(self, css: str, text: str) -> None:
        """Have a field contain a text, as soon as it is there."""

        def typed() -> None:
            field = self.find(css)
            field.clear()
            field.send_keys(text)

        self._until_done(typed)

    def _until_done(self, act: Callable[[], None]) -> None:
        """Try again what meets an element that is not there yet, or is replaced meanwhile."""

        def done() -> bool:
            try:
                act()
            except (
                ElementClickInterceptedException,
                ElementNotInteractableException,
                NoSuchElementException,
                StaleElementReferenceException,
            ):
                return False
            return True

        self.until(done)

    def contrasts(self) -> list[tuple[float, str]]:
        """Return the contrast of each text that is shown, as WCAG has it."""
        return [(ratio, text) for ratio, text in self.run(_CONTRASTS)]

    def complaints(self) -> list[str]:
        """Return what the browser has logged since the last call: errors, violated policies."""
        return [each["message"] for each in self.driver.get_log("browser")]  # type: ignore[no-untyped-call]


@contextmanager
def browsing() -> Iterator[Browser]:
    """Start a Chromium that is as new; skipped tests must not come here."""
    options = ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for argument in _ARGUMENTS:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=Service(DRIVER))  # its profile is a new folder, and ends with it
    try:
        yield Browser(driver)
    finally:
        driver.quit()
