"""Take the page's images of the documentation, in headless Chromium from a server that runs a pair:

    pat-serve --model demo-out/pruned --baseline demo-out/parent --port 8000
    python -m tests.integration.pair.take_images http://127.0.0.1:8000 docs/images

Needs chromium, chromedriver, and a machine with nothing else to do: the images show times.
"""

from __future__ import annotations

import base64
import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.integration.pair.browser import Page, chromium

QUESTIONS = ("What is the capital of France?", "What can a visitor see there?")
ENDED = "Pruned: finished. Dense: finished."
COLOURS = 64


def main() -> None:
    """Ask, check the speed-up, and take all images."""
    url, folder = sys.argv[1], Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as profile, chromium(Path(profile)) as driver:
        page = Page(driver, url)
        page.size(1100)
        driver.get(f"{url}/")
        page.until(lambda: page["main"].is_displayed())
        page.until(lambda: "ready" in page["state"].get_attribute("class"))
        page.fill(temperature=0, max_tokens=96)
        page["turns"].click()
        for question in QUESTIONS:
            page.js("document.getElementById('play-news').textContent = ''")
            page["prompt"].send_keys(question, "\n")
            page.until(lambda: ENDED in page["play-news"].get_attribute("textContent"), within_s=300)
        page.js("document.getElementById('card').hidden = true")
        page.fill(claim=1.05)
        # The button may lie under the page's edge, where a click of the mouse would meet something else.
        page.js("document.getElementById('check-run').click()")
        page.until(lambda: page.driver.find_elements("id", "verdict-word"), within_s=600)
        # The page's head stays in view where it is scrolled, and would lie over what is below.
        page.js("document.activeElement.blur(); window.scrollTo({top: 0, behavior: 'instant'})")
        for scheme in ("light", "dark"):
            page.scheme(scheme)
            take(page, folder / f"page-{scheme}.png", width=1100)
        page.scheme("light")
        take(page, folder / "page-verdict.png", width=1100, element="speedup")
        page.size(375, 812)
        take(page, folder / "page-phone.png", width=375, height=1180)


def take(page: Page, path: Path, *, width: int, height: int | None = None, element: str = "main") -> None:
    """One image, in few colours.

    Args:
        page: as it is.
        path: of the PNG.
        width: of the page.
        height: of the image; the element's when None.
        element: whose part of the page it shows; the whole page above and beside `main`.
    """
    box = f"const box = document.getElementById('{element}').getBoundingClientRect(); "
    x, y, wide, high = page.js(box + "return [box.x, box.y + scrollY, box.width, box.height]")
    if element == "main":
        x, y, wide, high = 0, 0, width, height or y + high
    clip = {"x": x, "y": y, "width": wide, "height": high, "scale": 1}
    settings = {"format": "png", "captureBeyondViewport": True, "clip": clip}
    taken = page.driver.execute_cdp_cmd("Page.captureScreenshot", settings)["data"]
    image = Image.open(io.BytesIO(base64.b64decode(taken))).convert("RGB")
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main()
