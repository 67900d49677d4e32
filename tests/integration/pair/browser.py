"""Headless Chromium, and the page in it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import HANG_S

CONTRAST = """
const light = (c) => { const [r, g, b] = c.map((v) => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b; };
const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
const rgba = (text) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data]; };
const ground = (e) => { for (; e; e = e.parentElement) { const c = rgba(getComputedStyle(e).backgroundColor);
  if (c[3] > 250) return c.slice(0, 3); } return [255, 255, 255]; };
const low = [];
for (const e of document.querySelectorAll('body *')) {
  if (!e.checkVisibility() || e.disabled || e instanceof SVGElement) continue;
  if (![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
  const a = light(rgba(getComputedStyle(e).color).slice(0, 3)), b = light(ground(e));
  const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  if (ratio < 4.5) low.push(`${e.tagName} ${e.className} ${e.textContent.trim().slice(0, 20)}: ${ratio.toFixed(2)}`);
}
return low;
"""
NAMELESS = """
const name = (e) => e.getAttribute('aria-label') || [...(e.labels ?? [])].map((l) => l.textContent).join('')
  || e.textContent || e.alt;
return [...document.querySelectorAll('a, button, input, textarea, select, [tabindex="0"], svg[role=img]')]
  .filter((e) => e.tagName !== 'TABLE' && !name(e).trim()).map((e) => e.outerHTML.slice(0, 80));
"""


@contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """A browser that knows nobody, to be driven.

    Args:
        profile: an empty folder.
    """
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (browser and driver):
        pytest.fail("the page's tests need chromium and chromedriver on the PATH; -m 'not browser' leaves them out")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    # The page scrolls smoothly unless asked not to, and a click would land where its button stood before.
    options.add_argument("--force-prefers-reduced-motion")
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    for flag in f"{flags} disable-component-update disable-sync".split():
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={profile}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield made
    finally:
        made.quit()


class Page:
    """The page in the browser, by the ids that its own scripts use."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver = driver
        self.url = url

    def __getitem__(self, name: str) -> Any:
        return self.driver.find_element("id", name)

    def answer(self, side: str, part: str) -> str:
        return str(self.driver.find_element("css selector", f"[data-side={side}] {part}").text)

    def mode(self, name: str) -> None:
        self.driver.find_element("css selector", f"label[for=mode-{name}]").click()

    def js(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def fill(self, **fields: object) -> None:
        for name, value in fields.items():
            element = self[name.replace("_", "-")]
            element.clear()
            element.send_keys(str(value))

    def until(self, what: Callable[[], Any], *, within_s: float = HANG_S) -> Any:
        deadline_s = time.monotonic() + within_s
        while not (seen := what()):
            assert time.monotonic() < deadline_s, self.driver.find_element("tag name", "body").text
            time.sleep(0.05)
        return seen

    def size(self, width: int, height: int = 900) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def scheme(self, name: str) -> None:
        feature = {"name": "prefers-color-scheme", "value": name}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] != "INFO"]
